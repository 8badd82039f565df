"""Ask one model for the hidden genes of held-out cells."""

from pathlib import Path

from cellmill import scores
from cellmill.device import use_threads
from cellmill.job import job
from cellmill.provenance import git_commit
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import load_statistics
from cellmill.vocabulary import Vocabulary
from cellmill.yardstick import score_yardstick

with job(snakemake.log[0]):
    use_threads(snakemake.threads)
    shards = Shards(snakemake.input.shards)
    rows = score_yardstick(
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
        Vocabulary.read(Path(snakemake.input.vocabulary[0])) if snakemake.input.vocabulary else None,
    )
    scores.write(rows, Path(snakemake.output[0]))
