"""Show what is planned, before anything heavy starts."""

import sys
from pathlib import Path

from cellmill.census.plan import show_plans
from cellmill.job import job

with job(snakemake.log[0]):
    print(show_plans([Path(path) for path in snakemake.input], Path(snakemake.output[0])), file=sys.stderr)
