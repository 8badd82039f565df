"""Score one model's own loss on held-out cells."""

from pathlib import Path

from cellmill import scores
from cellmill.device import use_threads
from cellmill.job import job
from cellmill.pretraining_scores import score_pretraining
from cellmill.provenance import git_commit
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import load_statistics

with job(snakemake.log[0]):
    use_threads(snakemake.threads)
    shards = Shards(snakemake.input.shards)
    rows = score_pretraining(
        snakemake.wildcards.model,
        [Path(path).parent for path in snakemake.input.checkpoints],
        shards,
        load_statistics(snakemake.input.statistics, shards.vocabulary_hash),
        snakemake.params.embedding["batch_size"],
        {
            "run": snakemake.wildcards.run,
            "code_version": snakemake.params.code,
            "commit": git_commit(),
            "config_hash": snakemake.params.config_hash,
        },
    )
    scores.write(rows, Path(snakemake.output[0]))
