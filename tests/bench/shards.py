"""Writing and reading shards of real cells, one core, against pyarrow reading the same columns still packed."""

import json
import sys
import tempfile
from pathlib import Path

from harness import Options, Row, at_most, child, last_core, measured

COLUMNS = ["soma_joinid", "total_counts", "n_genes", "genes", "counts", "counts_overflow"]
REPEATS = 3
"""Runs of which the quickest counts."""
BYTES = 1.3


def best(job) -> dict:
    """Figures of the quickest of some runs."""
    runs = []
    for _ in range(REPEATS):
        with measured() as figures:
            job()
        runs.append(figures)
    return min(runs, key=lambda run: run["seconds"])


def work(folder: Path) -> dict:
    """All measurements, in this process."""
    import pyarrow.parquet as pq
    from cellmill.shards.batch import CellBatch
    from cellmill.shards.dataset import Shards
    from cellmill.shards.statistics import compute_statistics
    from cellmill.shards.writer import ShardWriter

    shards = Shards(folder)
    paths = [folder / shard["file"] for shard in shards.manifest["splits"]["train"]]
    cells, obs = CellBatch.concatenate(list(shards.batches("train", 4096))), shards.obs("train")
    obs = obs.drop_columns([name for name in ("soma_joinid", "total_counts", "n_genes") if name in obs.column_names])

    def write():
        with tempfile.TemporaryDirectory() as temporary, ShardWriter(Path(temporary) / "all-00000.parquet") as writer:
            writer.write(cells, obs)

    def read_packed():
        for path in paths:
            with pq.ParquetFile(path) as file:
                columns = [name for name in COLUMNS if name in file.schema_arrow.names]
                for group in range(file.num_row_groups):
                    file.read_row_group(group, columns=columns, use_threads=False)

    jobs = {
        "limit": read_packed,
        "read": lambda: list(map(len, shards.batches("train", 2048))),
        "write": write,
        "statistics": lambda: compute_statistics(shards, "train"),
    }
    totals = {key: sum(shard[key] for shard in shards.manifest["splits"]["train"]) for key in ("bytes", "nonzeros")}
    return {"cells": len(cells), "jobs": {name: best(job) for name, job in jobs.items()}} | totals


def measure(options: Options) -> list[Row]:
    """Cells per second of each job, and bytes per nonzero."""
    from corpora import real_corpus

    found = child("shards.py", str(real_corpus(options)), core=last_core())
    cells, jobs = found["cells"], found["jobs"]
    limit = cells / jobs.pop("limit")["seconds"]
    note = f"{cells:,} cells of {found['nonzeros'] / cells:,.0f} nonzeros, one core, quickest of {REPEATS}"
    speed = {name: cells / figures["seconds"] for name, figures in jobs.items()}
    rows = [
        Row("read in order, unpacked", speed["read"], "cells/s", "pyarrow, packed", limit, note=note),
        Row("write", speed["write"], "cells/s", note=note),
        Row("statistics", speed["statistics"], "cells/s", note=note),
    ]
    size = found["bytes"] / found["nonzeros"]
    return [*rows, Row("bytes per nonzero", size, "bytes", "limit", BYTES, at_most(1, "ratio"), "all real cells")]


if __name__ == "__main__":
    print(json.dumps(work(Path(sys.argv[1]))))
