"""Write the report page of a run."""

from pathlib import Path

from cellmill.job import job
from cellmill.provenance import content_hash, git_commit, versions
from cellmill.report.page import write_report

with job(snakemake.log[0]):
    names = snakemake.params.selections
    write_report(
        scores=Path(snakemake.input.scores),
        logs=[Path(path) for path in snakemake.input.logs],
        qc=[Path(path) for path in snakemake.input.qc],
        plans=[Path(path) for path in snakemake.input.plans],
        qc_cells=[Path(path) for path in snakemake.input.qc_cells],
        embeddings=[Path(path) for path in snakemake.input.embeddings],
        shards=dict(zip(names, map(Path, snakemake.input.shards), strict=True)),
        vocabulary=Path(snakemake.input.vocabulary),
        genes_mapping=Path(snakemake.input.mapping[0]) if snakemake.input.mapping else None,
        timings=sorted(Path(snakemake.params.benchmarks).rglob("*.tsv")),
        config=snakemake.params.config,
        provenance={
            "commit": git_commit(),
            "config_hash": content_hash(snakemake.params.config),
            "versions": versions(),
            "command": snakemake.params.command,
        },
        out=Path(snakemake.output[0]),
    )
