"""Plan a selection: which cells, in which split and block."""

from pathlib import Path

from cellmill.census.plan import plan_cells
from cellmill.config import Census, Corpus, Dataset
from cellmill.job import job

with job(snakemake.log[0]):
    kind = Corpus if snakemake.wildcards.cells == "corpus" else Dataset
    plan_cells(
        Census(**snakemake.params.census, buffer_mb=snakemake.resources.soma_buffer),
        Path(snakemake.input.census[0]) if snakemake.input.census else None,
        kind(**snakemake.params.selection),
        name=snakemake.wildcards.cells,
        organism=snakemake.params.organism,
        benchmarks={name: Dataset(**section) for name, section in snakemake.params.held_out.items()},
        plan=Path(snakemake.output.plan),
        summary=Path(snakemake.output.summary),
    )
