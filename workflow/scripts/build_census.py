"""Build a private Census from a folder of .h5ad files."""

from pathlib import Path

from cellmill.census.build import build_census
from cellmill.census.h5ad import find_h5ads
from cellmill.job import job

with job(snakemake.log[0]):
    build_census(
        find_h5ads(Path(snakemake.input.h5ads)),
        Path(snakemake.input.genes),
        Path(snakemake.output.census),
        organism=snakemake.params.organism,
        extra_obs=list(snakemake.params.extra_obs),
        mapping=Path(snakemake.output.mapping),
        wheels=Path(snakemake.input.wheels),
    )
