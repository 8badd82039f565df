"""cellmill: from a Census to a report.

snakemake --cores all                                    the embedded default, config/demo.yaml
snakemake --cores all --configfile config/NAME.yaml      your run
snakemake --workflow-profile workflow/profiles/slurm     on a cluster
"""

import atexit
import sys
import time
from pathlib import Path

from snakemake.utils import min_version

from cellmill.config import check_names, check_paths, load
from cellmill.errors import CellmillError
from cellmill.flow import Flow, one_of, point_environments_here
from cellmill.job import ERROR_PREFIX, said_errors
from cellmill.provenance import PROJECT, code_version

min_version("9.27")


if not workflow.configfiles:

    # given here only when no other config is, since Snakemake would merge the two
    configfile: "config/demo.yaml"


try:
    run = load(config, PROJECT)
    if workflow.is_main_process:
        check_paths(run)
        check_names(run)
except CellmillError as error:
    sys.exit(f"{ERROR_PREFIX}{error}")

flow = Flow(run)
started = time.time()
point_environments_here()


wildcard_constraints:
    run=one_of([flow.name]),
    cells=one_of(flow.selections),
    dataset=one_of(flow.datasets),
    model=one_of(flow.models),
    baseline=one_of(flow.baselines),
    method=one_of(flow.methods),
    task=one_of(flow.tasks),
    seed=r"\d+",
    block=r"\d+",


report: "workflow/report/workflow.rst"


include: "workflow/rules/corpus.smk"
include: "workflow/rules/shards.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    fetch_wheels,


rule all:
    default_target: True
    input:
        f"{flow.results}/report/index.html",


onsuccess:
    print(
        f"results are in {flow.results}; the report is {flow.results}/report/index.html"
    )


onerror:
    # printed at exit, below all that Snakemake itself has to say
    for sentence in reversed(said_errors(Path(flow.results) / "logs", started)):
        atexit.register(print, sentence, file=sys.stderr)
