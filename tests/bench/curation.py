"""Curation of 1, 10 and 100 data sets of the large Census: memory, time, and cells per second against a bare scan.

Every job of the corpus phase runs in a process of its own, two at a time. Before each pair of blocks, two processes
read the same ranges of X and do nothing with the counts (`corpus_job.Run.scan`): the limit, with the same buffers, in
the same minute. Speeds are of the jobs' own seconds, without the start of Python and its imports, which memory
includes; to curate_block's imports belongs the start of numba (some 0.3 s a job).

Thresholds are the config's defaults; 50,000 cells a block.
"""

import shutil

import numpy as np
from corpora import Corpus
from harness import Options, Row, at_least, at_most
from million import DATASETS, census_of

SIZES = (1, 10, 100)
"""Data sets."""
CELLS_PER_BLOCK = 50_000
MB_LIMIT, BYTES = 2000, 1.3


def measure(options: Options) -> list[Row]:
    """Curate the three sizes."""
    soma = census_of(options)
    done = {}
    for size in SIZES:
        cells = options.cells // DATASETS * size
        selection = {
            "include": {"dataset_id": [f"thinned{dataset:03d}" for dataset in range(size)]},
            "blocks": max(2, -(-cells // CELLS_PER_BLOCK)),
            "splits": {"unit": "donor", "validation_fraction": 0.05},
        }
        corpus = Corpus(soma, options.folder / "curation" / str(size), selection)
        done[cells] = corpus.all()
        shutil.rmtree(corpus.folder)  # a failed one stays, to be looked at
    return rows_of(done)


def rows_of(done: dict[int, dict[str, list[dict]]]) -> list[Row]:
    """Rows from the figures of all jobs, by number of cells and kind of job."""
    rows = []
    seconds, cpus, peaks = {}, {}, {}
    for cells, jobs in done.items():
        work = {kind: figures for kind, figures in jobs.items() if kind != "scan"}
        seconds[cells] = total(work, "seconds")
        cpus[cells] = total(work, "cpu")
        peaks[cells] = max(job["peak_mb"] for figures in work.values() for job in figures)
        made = jobs["shards"][0]["returned"]
        size = f"{cells:,} cells"
        rows += [
            Row(f"{size}: time of all jobs", seconds[cells], "s", note="sum over jobs, two of which run at a time"),
            Row(f"{size}: CPU time of all jobs", cpus[cells], "s"),
            Row(f"{size}: peak memory of any job", peaks[cells], "MB", "limit", MB_LIMIT, at_most(1, "ratio")),
        ]
        for kind, figures in work.items():
            note = f"{len(figures)} jobs, {total({kind: figures}, 'seconds'):.1f} s in all"
            rows.append(Row(f"{size}: peak memory of {kind}", max(job["peak_mb"] for job in figures), "MB", note=note))
        scan = {clock: total({"scan": jobs["scan"]}, clock) for clock in ("seconds", "cpu")}
        alone = {clock: total({"curate_block": jobs["curate_block"]}, clock) for clock in ("seconds", "cpu")}
        aim = at_least(0.7, "ratio") if cells > min(done) else None  # the smallest is too short: starting takes longer
        for what, mine in (("curate_block", alone), ("all jobs", {"seconds": seconds[cells], "cpu": cpus[cells]})):
            for clock, unit, promised in (("seconds", "cells/s", aim), ("cpu", "cells/CPU s", None)):
                ours, limit = cells / mine[clock], cells / scan[clock]
                note = "of one worker, from the page cache"
                rows.append(Row(f"{size}: {what}", ours, unit, "bare scan", limit, promised, note))
        density, note = made["bytes"] / made["nonzeros"], f"{made['cells']:,} cells, {made['nonzeros']:,} nonzeros"
        rows.append(
            Row(
                f"{size}: bytes per nonzero", density, "bytes", "limit", BYTES, at_most(1, "ratio"), f"{note} in shards"
            )
        )
    sizes, many = list(done), list(done)[1:]
    limit, even = at_most(1.05), at_most(1.1, "ratio")
    return rows + [
        Row("peak memory, largest size", peaks[many[-1]], "MB", f"{many[0]:,} cells", peaks[many[0]], even),
        Row("exponent of time, all sizes", exponent(sizes, seconds), "", aim=limit),
        Row("exponent of time, two largest", exponent(many, seconds), "", aim=limit),
        Row("exponent of CPU time, two largest", exponent(many, cpus), "", aim=limit, note="less noisy than the clock"),
    ]


def total(jobs: dict[str, list[dict]], clock: str) -> float:
    """Sum of a figure over jobs."""
    return sum(job[clock] for figures in jobs.values() for job in figures)


def exponent(sizes: list[int], seconds: dict[int, float]) -> float:
    """Slope of log time over log cells, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log([seconds[size] for size in sizes]), 1)[0])
