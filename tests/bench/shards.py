"""Speed and size of shards on real cells, one thread: ``python tests/bench/shards.py``.

The limit to compare with, in the same run: pyarrow reading the same columns without unpacking them.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from cellmill.shards.dataset import Shards  # noqa: E402
from cellmill.shards.loader import Loader  # noqa: E402
from cellmill.shards.statistics import compute_statistics  # noqa: E402
from cellmill.shards.writer import ShardWriter  # noqa: E402
from shard_cells import real_cells, write_shards  # noqa: E402

COLUMNS = ["soma_joinid", "total_counts", "n_genes", "genes", "counts", "counts_overflow"]
EPOCHS = 4
"""Of the loader, which reads one window more than it serves."""


def best(job, repeats: int) -> tuple[float, float]:
    """Seconds by the clock and of the CPU (all threads), each of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        job()
        seconds.append((time.perf_counter() - clock, time.process_time() - cpu))
    return tuple(map(min, zip(*seconds, strict=True)))


def main() -> None:
    """Measure and print one table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, default=os.environ.get("CELLMILL_DATA", ROOT.parent / "shared" / "data"))
    options.add_argument("--cells", default="baron_h1", help="name of a file of cells/")
    options.add_argument("--copies", type=int, default=8, help="times that its cells are written")
    options.add_argument("--repeats", type=int, default=3, help="runs of which the fastest counts")
    given = options.parse_args()

    cells, obs = real_cells(given.data, given.cells)
    with tempfile.TemporaryDirectory() as folder:  # the size without copies, which compress too well
        with ShardWriter(Path(folder) / "all-00000.parquet") as writer:
            writer.write(cells, obs)
        size = writer.close()["bytes"] / len(cells.genes)
    rows = np.random.default_rng(0).permutation(np.tile(np.arange(len(cells)), given.copies))
    cells, obs = cells.take(rows), obs.take(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all-00000.parquet"

        def write():
            with ShardWriter(path) as writer:
                writer.write(cells, obs)

        jobs = {"write": best(write, given.repeats)}
        path.unlink()
        n_genes = int(cells.genes.max()) + 1
        shards = Shards(write_shards(Path(folder), {"all": (cells, obs)}, n_genes=n_genes, cells_per_shard=len(cells)))

        def read_packed():
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group, columns=COLUMNS, use_threads=False)

        def load():
            with Loader(shards, "all", 64, seed=0) as loader:
                for _ in range(EPOCHS * len(cells) // 64):
                    next(loader)

        jobs |= {
            "limit: pyarrow, packed columns": best(read_packed, given.repeats),
            "read in order, unpacked": best(lambda: list(map(len, shards.batches("all", 2048))), given.repeats),
            "loader, shuffled batches of 64": best(load, given.repeats),
            "statistics": best(lambda: compute_statistics(shards, "all"), given.repeats),
        }
        jobs["loader, shuffled batches of 64"] = tuple(s / EPOCHS for s in jobs["loader, shuffled batches of 64"])
    per_cell = len(cells.genes) / len(cells)
    print(f"{given.cells} x {given.copies}: {len(cells):,} cells, {per_cell:,.0f} nonzeros per cell")
    print(f"{size:.3f} bytes per nonzero (one copy)")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'job':34}{'cells/s':>10}{'cells/CPU s':>13}{'of limit (CPU)':>16}")
    limit = jobs["limit: pyarrow, packed columns"][1]
    for name, (clock, cpu) in jobs.items():
        print(f"{name:34}{len(cells) / clock:>10,.0f}{len(cells) / cpu:>13,.0f}{limit / cpu:>16.0%}")


if __name__ == "__main__":
    main()
