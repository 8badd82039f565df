"""Compare the profiles of a corpus's cells with those of the benchmarks', and fail on a leak."""

from pathlib import Path

from cellmill.duplicates import audit_leaks
from cellmill.job import job

with job(snakemake.log[0]):
    audit_leaks(
        {snakemake.wildcards.corpus: [Path(path) for path in snakemake.input.corpus]},
        dict(zip(snakemake.params.benchmarks, [[Path(p)] for p in snakemake.input.benchmarks], strict=True)),
        action=snakemake.params.action,
        out=Path(snakemake.output[0]),
        copies={snakemake.wildcards.corpus: Path(snakemake.input.duplicates)},
    )
