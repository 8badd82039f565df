"""Score embeddings of one data set on one task."""

from pathlib import Path

from cellmill import scores
from cellmill.config import Dataset
from cellmill.embed import read_meta
from cellmill.job import job
from cellmill.provenance import git_commit
from cellmill.tasks import load_task, score_embeddings

with job(snakemake.log[0]):
    task = load_task(snakemake.params.task["task"])
    rows = score_embeddings(
        task,
        task.Settings(**snakemake.params.task["settings"]),
        snakemake.wildcards.dataset,
        [(Path(path), read_meta(path)) for path in snakemake.input.embeddings],
        Path(snakemake.input.shards),
        Dataset(**snakemake.params.dataset),
        {
            "run": snakemake.wildcards.run,
            "code_version": snakemake.params.code,
            "commit": git_commit(),
            "config_hash": snakemake.params.config_hash,
        },
        cache=Path(snakemake.params.cache),
    )
    scores.write(rows, Path(snakemake.output[0]))
