"""Ask the baselines for the hidden genes of held-out cells."""

from pathlib import Path

from cellmill import scores
from cellmill.job import job
from cellmill.provenance import git_commit
from cellmill.shards.dataset import Shards
from cellmill.yardstick_baselines import score_baselines

with job(snakemake.log[0]):
    rows = score_baselines(
        Shards(snakemake.input.shards),
        snakemake.params.seeds,
        {
            "run": snakemake.wildcards.run,
            "code_version": snakemake.params.code,
            "commit": git_commit(),
            "config_hash": snakemake.params.config_hash,
        },
    )
    scores.write(rows, Path(snakemake.output[0]))
