"""Pretraining and embedding on the demo's cells, one core: a step by part, validation, a saved state, embedding.

Needs the shards of ``make demo``. Steps are in CPU seconds, which other work on the machine changes little.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import ROOT, Options, Row, child, failure, last_core

MODELS = ("geneformer-demo", "scgpt-demo")
STEPS = 8
"""Of which the median is shown."""
REPEATS = 2


def timed(job) -> tuple[float, float]:
    """CPU seconds of this thread and seconds by the clock."""
    clock, cpu = time.perf_counter(), time.thread_time()
    job()
    return time.thread_time() - cpu, time.perf_counter() - clock


def work(run_folder: Path, model: str) -> dict:
    """Seconds of every part, in this process."""
    import yaml
    from cellmill import pretrain
    from cellmill.embed import embed_shards
    from cellmill.models.base import parameter_counts
    from cellmill.recipes import ModelRecipe
    from cellmill.shards.dataset import Shards
    from cellmill.shards.statistics import load_statistics
    from cellmill.training.state import save_state

    shards = Shards(run_folder / "shards" / "corpus")
    statistics = load_statistics(run_folder / "statistics.safetensors")
    recipe = ModelRecipe.from_dict(yaml.safe_load((ROOT / "config" / "models" / f"{model}.yaml").read_text()))
    run = pretrain._Run(shards, statistics, recipe, seed=0)
    run.step = recipe.training.steps // 2  # where every term of the objective is at work
    views, updates = [], []
    with run.loader, tempfile.TemporaryDirectory(dir=run_folder) as folder:
        run.model.train()
        for _ in range(STEPS):
            made = []
            views.append(timed(lambda made=made: made.append(run.prepare(run.step)))[0])
            updates.append(timed(lambda made=made: run.update(made[0]))[0])
            run.step += 1
        state = run.state(run.loader.state_dict())
        saving = min(timed(lambda: save_state(Path(folder) / "state", state, "bench"))[1] for _ in range(REPEATS))
    batch_size = recipe.embedding.batch_size
    return {
        "parameters": parameter_counts(run.model)["total"],
        "batch": recipe.training.batch_size,
        "view": median(views),
        "update": median(updates),
        "saving": saving,
        "validation": min(timed(run._validate)[0] for _ in range(REPEATS)),
        "embedding": min(
            timed(lambda: embed_shards(run.model, shards, "validation", batch_size, progress=False))[0]
            for _ in range(REPEATS)
        ),
        "held_out": shards.n_cells("validation"),
    }


def measure(options: Options) -> list[Row]:
    """Rows of each model of the demo."""
    rows = []
    for model in MODELS:
        try:
            found = child("training.py", str(ROOT / "results" / "demo"), model, core=last_core())
        except RuntimeError as error:
            rows.append(failure(model, error))
            continue
        step = found["view"] + found["update"]
        note = f"{found['parameters']:,} parameters, batches of {found['batch']}, one core, CPU seconds"
        rows += [
            Row(f"{model}: step", 1000 * step, "ms", note=note),
            Row(f"{model}: loader and view", 1000 * found["view"], "ms", "step", 1000 * step, note="share of a step"),
            Row(f"{model}: training", found["batch"] / step, "cells/s", note=note),
            Row(f"{model}: embedding", found["held_out"] / found["embedding"], "cells/s", note=note),
            Row(f"{model}: validation", found["validation"], "s", note=f"{found['held_out']} cells"),
            Row(f"{model}: saved state", 1000 * found["saving"], "ms", note="by the clock"),
        ]
    return rows


if __name__ == "__main__":
    print(json.dumps(work(Path(sys.argv[1]), sys.argv[2])))
