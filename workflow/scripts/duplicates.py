"""Find the cells of a corpus that have the profile of another one."""

from pathlib import Path

from cellmill.duplicates import find_duplicates
from cellmill.job import job

with job(snakemake.log[0]):
    find_duplicates([Path(path) for path in snakemake.input], out=Path(snakemake.output[0]))
