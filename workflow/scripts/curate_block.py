"""Read one block of cells from the Census, finish its quality control, and write it in shard format."""

from pathlib import Path

from cellmill.config import Census, Quality
from cellmill.job import job
from cellmill.shards.curate import curate_block

with job(snakemake.log[0]):
    curate_block(
        Census(**snakemake.params.census, buffer_mb=snakemake.resources.soma_buffer),
        Path(snakemake.input.census[0]) if snakemake.input.census else None,
        plan=Path(snakemake.input.plan),
        summary=Path(snakemake.input.summary),
        block=int(snakemake.wildcards.block),
        vocabulary=Path(snakemake.input.vocabulary),
        organism=snakemake.params.organism,
        quality=Quality(**snakemake.params.quality),
        extra_obs=list(snakemake.params.extra_obs),
        doublets=[Path(path) for path in snakemake.input.doublets],
        out=Path(snakemake.output.cells),
        qc=Path(snakemake.output.qc),
        prints=Path(snakemake.output.prints),
    )
