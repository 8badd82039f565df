"""Put every part of the score table into one."""

from pathlib import Path

from cellmill.job import job
from cellmill.scores import collect

with job(snakemake.log[0]):
    collect([Path(path) for path in snakemake.input], Path(snakemake.output.parquet), Path(snakemake.output.csv))
