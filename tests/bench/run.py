"""Measure cellmill against its peers and limits: ``python tests/bench/run.py [NAME ...]``; ``make bench`` runs all.

Every benchmark is a module of this folder with ``measure(options) -> list[Row]``. Each writes
``results/bench/NAME.json``, and one table of all rows is printed at the end. A part that fails says so in a row of its
own, the others go on, and the exit status is 1.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
from cellmill.provenance import git_commit  # noqa: E402

BENCHMARKS = (
    "shards",
    "loaders",
    "views",
    "reading",
    "million",
    "curation",
    "training",
    "attention",
    "memory",
    "scoring",
    "perturbation",
    "engine",
    "curves",
)


def main() -> int:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--cells", type=int, default=1_000_000, help="cells of the large Census (default 1,000,000)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each rate is measured (default 5)")
    parser.add_argument("--peers", type=Path, default=harness.ROOT / ".venv-bench" / "bin" / "python")
    parser.add_argument("--folder", type=Path, default=harness.ROOT / "results" / "bench")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(BENCHMARKS)}")
    if given.cells < 1000:
        parser.error("--cells must be at least 1000")
    data = Path(os.environ.get("CELLMILL_DATA", harness.ROOT.parent / "shared" / "data"))
    options = harness.Options(given.cells, given.seconds, given.peers, given.folder.resolve(), data)

    machine, rows = harness.machine(options.peers), []
    for name in given.names or BENCHMARKS:
        print(f"== {name}", file=sys.stderr, flush=True)
        about = {"date": harness.now(), "commit": git_commit(), "machine": machine, "load_before": os.getloadavg()}
        started = time.perf_counter()
        try:
            made = importlib.import_module(name).measure(options)
        except Exception as error:
            traceback.print_exc()
            made = [harness.failure(name, error)]
        about |= {"load_after": os.getloadavg(), "seconds": time.perf_counter() - started, "cells": options.cells}
        rows += harness.write(options.folder / f"{name}.json", name, made, about)
    print(harness.as_table(rows))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
