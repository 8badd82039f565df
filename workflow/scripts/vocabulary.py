"""Choose the genes of one organism that models of this run know."""

from pathlib import Path

from cellmill.census.vocabulary import build_vocabulary
from cellmill.config import Census, Genes
from cellmill.job import job

with job(snakemake.log[0]):
    build_vocabulary(
        Census(**snakemake.params.census, buffer_mb=snakemake.resources.soma_buffer),
        Path(snakemake.input.census[0]) if snakemake.input.census else None,
        organism=snakemake.wildcards.organism,
        genes=Genes(**snakemake.params.genes),
        plan=Path(snakemake.input.plan),
        out=Path(snakemake.output[0]),
    )
