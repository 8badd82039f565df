"""Read published weights and write them as a checkpoint of ours."""

from pathlib import Path

from cellmill.job import job
from cellmill.released import import_released

with job(snakemake.log[0]):
    genes = snakemake.params.released["genes"]
    remarks = import_released(
        snakemake.wildcards.model,
        snakemake.params.architecture,
        Path(snakemake.params.released["path"]),
        Path(genes) if genes else None,
        Path(snakemake.output.weights).parent,
    )
    print("\n".join(remarks))
