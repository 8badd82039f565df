"""Speed of pretraining and embedding on the demo's cells, one thread: ``python tests/bench/training.py``.

Needs the shards of a run (``make demo`` makes them). Prints for every model the time of one step by part, the share of
the time that is spent on anything but the network, and what validation, a saved state, a checkpoint and embedding cost.
Steps are in CPU seconds, which other work on the machine changes less than the clock.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402
import yaml  # noqa: E402
from cellmill import pretrain  # noqa: E402
from cellmill.checkpoints import save_checkpoint  # noqa: E402
from cellmill.embed import embed_shards  # noqa: E402
from cellmill.models.base import parameter_counts  # noqa: E402
from cellmill.recipes import ModelRecipe  # noqa: E402
from cellmill.shards.dataset import Shards  # noqa: E402
from cellmill.shards.statistics import load_statistics  # noqa: E402
from cellmill.training_state import save_state  # noqa: E402


def timed(job) -> tuple[float, float]:
    """CPU seconds of this thread and seconds by the clock."""
    clock, cpu = time.perf_counter(), time.thread_time()
    job()
    return time.thread_time() - cpu, time.perf_counter() - clock


def main() -> None:
    """Measure and print one table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--run", type=Path, default=ROOT / "results" / "demo", help="folder of a run")
    options.add_argument("--models", nargs="+", default=["geneformer-demo", "scgpt-demo"], help="of config/models")
    options.add_argument("--steps", type=int, default=15, help="steps of which the median is shown")
    given = options.parse_args()
    shards = Shards(given.run / "shards" / "corpus")
    statistics = load_statistics(given.run / "statistics.safetensors")
    print(f"{shards.n_cells('train')} training cells, {shards.n_genes} genes, torch {torch.__version__}, 1 thread")
    for name in given.models:
        recipe = ModelRecipe.from_dict(yaml.safe_load((ROOT / "config" / "models" / f"{name}.yaml").read_text()))
        run = pretrain._Run(shards, statistics, recipe, seed=0)
        run.step = recipe.training.steps // 2  # where every term of the objective is at work
        views, updates = [], []
        with run.loader, tempfile.TemporaryDirectory(dir=given.run) as folder:
            run.model.train()
            for _ in range(given.steps):
                parts = []
                views.append(timed(lambda: parts.extend(run._next_batch()[1]))[0])  # noqa: B023
                updates.append(timed(lambda: run._update(parts))[0])  # noqa: B023
                run.step += 1
            view, update = median(views), median(updates)
            state = run._state(run.loader.state_dict())
            saving = [timed(lambda: save_state(Path(folder) / "state", state, "bench"))[1] for _ in range(5)]  # noqa: B023
            meta = {"recipe": {}, "feature_ids": [str(gene) for gene in range(shards.n_genes)]}
            writing = [timed(lambda: save_checkpoint(Path(folder), run.model, meta))[1] for _ in range(5)]  # noqa: B023
            size = sum(path.stat().st_size for path in (Path(folder) / "state").rglob("*.safetensors"))
        validation = min(timed(run._validate)[0] for _ in range(3))
        n_held_out = shards.n_cells("validation")
        size_of_batch = recipe.embedding.batch_size
        embedding = min(
            timed(lambda: embed_shards(run.model, shards, "validation", size_of_batch, progress=False))[0]  # noqa: B023
            for _ in range(3)
        )
        batch = recipe.training.batch_size
        counts = parameter_counts(run.model)
        print(f"\n{name}: {counts['total']:,} parameters, {counts['without_embeddings']:,} without embeddings")
        print(f"  step of {batch} cells     {1e3 * (view + update):8.0f} ms CPU ({1 / (view + update):.1f} steps/s)")
        print(f"    loader and view     {1e3 * view:8.1f} ms CPU ({view / (view + update):.1%} of the step)")
        print(f"    network, optimiser  {1e3 * update:8.0f} ms CPU ({batch / (view + update):.0f} cells/s)")
        print(f"  validation            {1e3 * validation:8.0f} ms CPU for {n_held_out} cells")
        print(f"  saved state           {1e3 * min(saving):8.0f} to {1e3 * max(saving):.0f} ms, {size / 1e6:.1f} MB")
        print(f"  checkpoint            {1e3 * min(writing):8.0f} to {1e3 * max(writing):.0f} ms")
        print(f"  embedding             {n_held_out / embedding:8.0f} cells/s")


if __name__ == "__main__":
    main()
