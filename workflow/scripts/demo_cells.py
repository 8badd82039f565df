"""Write the demo's real cells as .h5ad files with the columns of CELLxGENE."""

from pathlib import Path

from cellmill.census.demo import write_demo_h5ads
from cellmill.job import job

with job(snakemake.log[0]):
    write_demo_h5ads(Path(snakemake.input.wheels), Path(snakemake.output[0]))
