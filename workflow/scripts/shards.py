"""Shuffle the curated blocks of a selection into its shards, and sum up their quality control."""

from pathlib import Path

from cellmill.job import job
from cellmill.shards.assemble import assemble

with job(snakemake.log[0]):
    assemble(
        plan=Path(snakemake.input.plan),
        summary=Path(snakemake.input.summary),
        blocks=[Path(path) for path in snakemake.input.blocks],
        block_qcs=[Path(path) for path in snakemake.input.block_qcs],
        vocabulary=Path(snakemake.input.vocabulary),
        cells_per_shard=snakemake.params.cells_per_shard,
        seed=snakemake.params.seed,
        out=Path(snakemake.output.shards),
        qc=Path(snakemake.output.qc),
        qc_cells=Path(snakemake.output.qc_cells),
    )
