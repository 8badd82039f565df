"""Pretrain one model with one seed, on one or more processes, or go on where a killed job stopped."""

from pathlib import Path

from cellmill.job import job
from cellmill.training.launch import train

with job(snakemake.log[0]):
    train(
        {
            "shards": snakemake.input.shards,
            "statistics": snakemake.input.statistics,
            "vocabulary": snakemake.input.vocabulary,
            "recipe": snakemake.params.recipe,
            "name": snakemake.wildcards.model,
            "seed": int(snakemake.wildcards.seed),
            "out": str(Path(snakemake.output.weights).parent),
            "code": snakemake.params.code,
        }
    )
