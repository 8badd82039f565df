"""Look up the pairs of a table of orthologs in the vocabularies of this run."""

from pathlib import Path

from cellmill.job import job
from cellmill.orthologs import build_orthologs

with job(snakemake.log[0]):
    build_orthologs(
        Path(snakemake.input.table),
        dict(zip(snakemake.params.organisms, map(Path, snakemake.input.vocabularies), strict=True)),
        Path(snakemake.output[0]),
    )
