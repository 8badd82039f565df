"""Build a private Census from a folder of .h5ad files."""

from pathlib import Path

from cellmill.census.build import build_census
from cellmill.census.h5ad import find_h5ads
from cellmill.job import job

with job(snakemake.log[0]):
    organisms, files = snakemake.params.organisms, snakemake.params.files
    h5ads = [Path(path) for path in snakemake.input.h5ads]
    build_census(
        find_h5ads(h5ads[0]) if len(h5ads) == 1 and h5ads[0].is_dir() else h5ads,
        dict(zip(organisms, map(Path, snakemake.input.genes), strict=True)),
        Path(snakemake.output.census),
        organism=organisms[0],
        file_organisms=files["organisms"],
        obs_columns=files["obs_columns"],
        extra_obs=files["extra_obs"],
        mapping=Path(snakemake.output.mapping),
        wheels=Path(snakemake.input.wheels),
    )
