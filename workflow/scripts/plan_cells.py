"""Plan a selection: which cells, in which split, block and order."""

from pathlib import Path

from cellmill.census.plan import plan_cells
from cellmill.config import Census, Corpus, Dataset
from cellmill.job import job

with job(snakemake.log[0]):
    kind = Corpus if "splits" in snakemake.params.selection else Dataset
    plan_cells(
        Census(**snakemake.params.census, buffer_mb=snakemake.resources.soma_buffer),
        Path(snakemake.input.census[0]) if snakemake.input.census else None,
        kind(**snakemake.params.selection),
        name=snakemake.wildcards.cells,
        organism=snakemake.params.organism,
        benchmarks={name: Dataset(**section) for name, section in snakemake.params.held_out.items()},
        blocks=snakemake.params.blocks,
        cells_per_shard=snakemake.params.cells_per_shard,
        shuffle_seed=snakemake.params.seed,
        plan=Path(snakemake.output.plan),
        summary=Path(snakemake.output.summary),
    )
