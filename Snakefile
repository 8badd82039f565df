"""cellmill: from a Census to a report.

snakemake --cores all                                    the embedded default, config/demo.yaml
snakemake --cores all --configfile config/NAME.yaml      your run
snakemake --workflow-profile workflow/profiles/slurm     on a cluster
snakemake plan                                           only show what would be read, and how long it takes
snakemake corpus                                         only the corpus: shards, and a page of what was kept and dropped
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
    corpus=one_of(flow.corpora),
    organism=one_of(flow.organisms),
    dataset=one_of(flow.datasets),
    model=one_of(flow.models),
    baseline=one_of(flow.baselines),
    method=one_of(flow.methods),
    task=one_of(flow.tasks),
    seed=r"\d+",
    block=r"\d+",
    part=r"\d+",


report: "workflow/report/workflow.rst"


include: "workflow/rules/corpus.smk"
include: "workflow/rules/shards.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    corpus,
    plan,
    fetch_wheels,
    show_plan,


rule all:
    default_target: True
    input:
        f"{flow.results}/report/index.html",


rule plan:
    input:
        f"{flow.results}/plan.txt",


rule corpus:
    input:
        f"{flow.results}/report/corpus.html",


onsuccess:
    for page in sorted(Path(flow.results, "report").glob("*.html")):
        print(f"written: {page}")


onerror:
    # printed at exit, below all that Snakemake itself has to say
    for sentence in reversed(said_errors(Path(flow.results) / "logs", started)):
        atexit.register(print, sentence, file=sys.stderr)
