"""How long the demo's scoring takes: 24 embeddings of Baron's cells in 4 processes, 2 at a time.

    python tests/bench/score_demo.py annotation|integration

Stand-ins of the models' embeddings (random projections of hvg_pca to width 128) cost what real ones cost.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
DATA = Path(os.environ.get("CELLMILL_DATA", Path(__file__).parents[3] / "shared" / "data"))
SEEDS = (0, 1, 2)
METHODS = {
    "model_a": ("a", "a.untrained"),
    "model_b": ("b", "b.untrained"),
    "baselines": ("hvg_pca", "harmony"),
    "controls": ("labels", "shuffled"),
}


def prepare(folder: Path) -> None:
    """Shards and one .npy per embedding and seed."""
    from cellmill.shards.dataset import Shards
    from cellmill.tasks.baselines import embed_baseline
    from cellmill.tasks.controls import embed_control
    from shard_cells import real_cells, write_shards

    cells, obs = real_cells(DATA, "baron_h1")
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
    """One process: all embeddings of a method."""
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


def timed(folder: Path, task: str, method: str) -> tuple[str, float]:
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, task, str(folder), method], check=True, stderr=subprocess.DEVNULL)
    return method, time.perf_counter() - started


if __name__ == "__main__":
    if len(sys.argv) == 4:
        score(Path(sys.argv[2]), sys.argv[1], sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            prepare(folder)
            for cache in ("cold", "warm"):
                cpu, started = os.times(), time.perf_counter()
                with ThreadPoolExecutor(2) as pool:
                    for method, seconds in pool.map(lambda m: timed(folder, sys.argv[1], m), METHODS):
                        print(f"{sys.argv[1]}, {method}: {seconds:.1f} s")
                wall, used = time.perf_counter() - started, os.times()
                cpu = used.children_user + used.children_system - cpu.children_user - cpu.children_system
                said = f"{wall:.1f} s wall, {cpu:.1f} s CPU; load {os.getloadavg()[0]:.1f}"
                print(f"{sys.argv[1]}, all, {cache} cache: {said}", flush=True)
