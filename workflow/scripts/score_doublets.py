"""Score how much each planned cell looks like two cells in one droplet."""

from pathlib import Path

from cellmill.config import Census
from cellmill.doublets import score_doublets
from cellmill.job import job

with job(snakemake.log[0]):
    score_doublets(
        Census(**snakemake.params.census, buffer_mb=snakemake.resources.soma_buffer),
        Path(snakemake.input.census[0]) if snakemake.input.census else None,
        plan=Path(snakemake.input.plan),
        block=int(snakemake.wildcards.block),
        blocks=snakemake.params.blocks,
        organism=snakemake.params.organism,
        seed=snakemake.params.seed,
        out=Path(snakemake.output[0]),
    )
