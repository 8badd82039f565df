"""Put every part of the score table into one."""

from pathlib import Path

from cellmill.collect import collect
from cellmill.job import job

with job(snakemake.log[0]):
    collect([Path(path) for path in snakemake.input], Path(snakemake.output.parquet), Path(snakemake.output.csv))
