"""How long the demo's scoring takes: 24 embeddings of Baron's cells in 4 processes, 2 at a time, cold and warm cache.

Stand-ins of the models' embeddings (random projections of hvg_pca to width 128) cost what real ones cost.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from harness import HERE, Options, Row, child

sys.path.insert(0, str(HERE.parent))

TASKS = ("annotation", "integration")
SEEDS = (0, 1, 2)
METHODS = {
    "model_a": ("a", "a.untrained"),
    "model_b": ("b", "b.untrained"),
    "baselines": ("hvg_pca", "harmony"),
    "controls": ("labels", "shuffled"),
}


def prepare(folder: Path, data: Path) -> None:
    """Shards and one .npy per embedding and seed."""
    import numpy as np
    from cellmill.shards.dataset import Shards
    from cellmill.tasks.baselines import embed_baseline
    from cellmill.tasks.controls import embed_control
    from shard_cells import real_cells, write_shards

    cells, obs = real_cells(data, "baron_h1")
    n_genes = int(cells.genes.max()) + 1
    shards = Shards(write_shards(folder / "shards", {"all": (cells, obs)}, n_genes=n_genes, cells_per_shard=1024))
    for seed in SEEDS:
        for name in METHODS["baselines"]:
            np.save(folder / f"{name}.{seed}.npy", embed_baseline(name, shards, shards, batch="library", seed=seed))
        for name in METHODS["controls"]:
            np.save(folder / f"{name}.{seed}.npy", embed_control(name, shards, label="cell_type", seed=seed))
        pca = np.load(folder / f"hvg_pca.{seed}.npy")
        for i, name in enumerate((*METHODS["model_a"], *METHODS["model_b"])):
            projection = np.random.default_rng((seed, i)).normal(size=(50, 128)) / 8
            np.save(folder / f"{name}.{seed}.npy", np.tanh(pca @ projection).astype(np.float32))


def score(folder: Path, task_name: str, method: str) -> None:
    """All embeddings of a method, in this process."""
    from cellmill.tasks import load_task, score_embeddings

    task = load_task(task_name)
    known = {"kind": "model", "seen": "no", "checkpoint": None}
    pairs = [
        (folder / f"{name}.{seed}.npy", known | {"model": name, "seed": seed})
        for name in METHODS[method]
        for seed in SEEDS
    ]
    section = SimpleNamespace(label="cell_type", batch="library", min_cells_per_label=10)
    made_by = dict.fromkeys(("run", "code_version", "commit", "config_hash"), "bench")
    score_embeddings(task, task.Settings(), "baron", pairs, folder / "shards", section, made_by, folder / "cache")


def measure(options: Options) -> list[Row]:
    """Seconds of each task; a job's compiled programs are cached between the two rounds."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        child("scoring.py", "prepare", temporary, str(options.data))
        for task in TASKS:
            for cache in ("cold", "warm"):
                began = time.perf_counter()
                with ThreadPoolExecutor(2) as pool:
                    done = list(pool.map(lambda method: child("scoring.py", task, temporary, method), METHODS))  # noqa: B023
                cpu = sum(job["cpu"] for job in done)
                note = f"24 embeddings, 4 processes, two at a time; {cpu:.1f} s CPU; {cache} cache of compiled programs"
                rows.append(Row(f"{task}, {cache} cache", time.perf_counter() - began, "s", note=note))
    return rows


if __name__ == "__main__":
    from harness import measured

    what, where, more = sys.argv[1:]
    with measured() as figures:
        prepare(Path(where), Path(more)) if what == "prepare" else score(Path(where), what, more)
    print(json.dumps(figures))
