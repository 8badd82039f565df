"""Put the shuffled parts of a selection into one folder with a manifest, and sum up their quality control."""

from pathlib import Path

from cellmill.job import job
from cellmill.shards.assemble import assemble

with job(snakemake.log[0]):
    duplicates, leaks = snakemake.input.duplicates, snakemake.input.leaks
    assemble(
        summary=Path(snakemake.input.summary),
        parts=[Path(path) for path in snakemake.input.parts],
        block_qcs=[Path(path) for path in snakemake.input.block_qcs],
        vocabulary=Path(snakemake.input.vocabulary),
        duplicates=Path(duplicates[0]) if duplicates and snakemake.params.drop_duplicates else None,
        leaks=Path(leaks[0]) if leaks else None,
        out=Path(snakemake.output.shards),
        qc=Path(snakemake.output.qc),
        qc_cells=Path(snakemake.output.qc_cells),
    )
