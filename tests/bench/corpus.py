"""Seconds of each step of the corpus phase on a Census, one thread: ``python tests/bench/corpus.py --soma CENSUS``.

Prints one table, and the figures that a plan's predicted bytes rest on.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import corpus_runs  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from corpus_runs import PANCREAS, corpus  # noqa: E402


def timed(name: str, cells: int | None, job):
    """Run `job` and print its row of the table."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = job()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    cells = cells or result["cells"]
    print(f"| {name} | {cells:,} | {clock:.2f} | {cpu:.2f} | {cells / cpu:,.0f} |", flush=True)
    return result


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--soma", type=Path, default=ROOT / "results" / "demo" / "census" / "soma")
    soma = options.parse_args().soma
    selection = corpus(blocks=1)
    with tempfile.TemporaryDirectory() as folder:
        folder, genes = Path(folder), Path(folder) / "vocabulary.parquet"
        print("| step | cells | seconds | CPU seconds | cells per CPU second |\n|---|---|---|---|---|")
        plan = timed("plan_cells", None, lambda: corpus_runs.plan(soma, folder, selection))
        cells = plan["cells"]
        timed("vocabulary", cells, lambda: corpus_runs.vocabulary(soma, folder, selection))
        timed("curate_block", cells, lambda: corpus_runs.curate(soma, folder, 0, selection, genes))
        made = timed("shards", cells, lambda: corpus_runs.join(folder, 1, genes))
        totals = made["totals"]
        pancreas = folder / "pancreas"
        more = corpus_runs.plan(soma, pancreas, PANCREAS, "pancreas")
        timed("curate_block, benchmark", more["cells"], lambda: corpus_runs.curate(soma, pancreas, 0, PANCREAS, genes))
        totals_more = corpus_runs.join(pancreas, 1, genes)["totals"]
        print(f"vocabulary: {pq.read_metadata(genes).num_rows:,} genes")
    for name, planned, shards in (("corpus", plan, totals), ("benchmark", more, totals_more)):
        print(
            f"{name}: {shards['bytes']:,} bytes of shards for {planned['nonzeros']:,} planned nonzeros of all genes, "
            f"{shards['bytes'] / planned['nonzeros']:.2f} a nonzero (predicted {planned['predicted_bytes']:,})"
        )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
