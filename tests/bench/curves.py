"""Loss curves of every optimisation beside the plain way: the same cells, the same weights, 200 steps.

For each architecture one plain run (padded, float32, eager, one process, the whole batch at once), and one run for each
thing that training may do instead. The curves' distance is stated and held to a tolerance, with the time beside it.
"""

import dataclasses
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Options, Row, at_most, child, failure

STEPS, BATCH = 200, 8
AT_ONCE = 2
"""Runs at a time, each on one core."""
ARCHITECTURES = {
    "geneformer": {"n_layers": 2, "width": 96, "n_heads": 3, "hidden": 192, "max_length": 1024, "dropout": 0.0},
    "scgpt": {
        **{"n_layers": 2, "width": 96, "n_heads": 3, "hidden": 96, "max_length": 1024, "dropout": 0.0},
        **{"cell_prompt_after": 100, "value_init": "spread"},
    },
    "scfoundation": {"max_length": 1024, "dropout": 0.0},
    "exceiver": {"width": 32, "n_latents": 16, "n_layers": 2, "n_heads": 2, "hidden": 64, "min_cells": 100},
    "scmulan": {"n_layers": 2, "width": 96, "n_heads": 3, "max_length": 1024, "dropout": 0.0},
}
"""Sizes that differ from those of the demo preset."""
PLAIN = {"packing": "padded", "precision": "float32", "compile": "off", "micro_batch_tokens": 10**6}
WAYS = {
    "packed": {"packing": "packed"},
    "accumulated": {"packing": "packed", "micro_batch_tokens": 1024},
    "checkpointed": {"packing": "packed", "checkpoint_activations": True},
    "compiled": {"packing": "packed", "compile": "on"},
    "two ranks": {"packing": "packed", "ranks": 2},
    "bfloat16": {"packing": "packed", "precision": "bfloat16"},
}
TOLERANCE = {"bfloat16": 1e-2}
EXACT = 1e-3
"""Of a way that only adds in another order: the largest distance over 200 steps, as a share of the loss."""


def measure(options: Options) -> list[Row]:
    """Rows of each architecture and way."""
    from corpora import real_corpus
    from engine import statistics_of

    corpus = real_corpus(options, "protein_coding")
    statistics_of(corpus)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {
            (architecture, way): pool.submit(child, "curves.py", str(corpus), architecture, way)
            for architecture in ARCHITECTURES
            for way in ("plain", *WAYS)
        }
    rows = []
    for (architecture, way), run in runs.items():
        what, plain = f"{architecture}: {way}", runs[architecture, "plain"]
        if run.exception() or plain.exception():
            rows.append(failure(what, run.exception() or plain.exception()))
        elif way != "plain":
            rows.append(compare(what, way, run.result(), plain.result()))
    return rows


def compare(what: str, way: str, found: dict, plain: dict) -> Row:
    """How far a curve lies from the plain one. In bfloat16 means of ten steps are compared: rounding averages out."""
    ours, theirs = (
        [mean(part) for part in chunks(side["losses"], 10 if way == "bfloat16" else 1)] for side in (found, plain)
    )
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    note = f"loss {plain['losses'][0]:.4g} to {plain['losses'][-1]:.4g}, {way} to {found['losses'][-1]:.4g}; "
    note += f"{found['seconds']:.1f} s, plain {plain['seconds']:.1f}; {found['memory_mb']:.0f} MB, plain "
    note += f"{plain['memory_mb']:.0f}"
    return Row(what, apart, "largest share apart", aim=at_most(TOLERANCE.get(way, EXACT)), note=note)


def chunks(losses: list, size: int) -> list:
    return [losses[i : i + size] for i in range(0, len(losses), size)]


def mean(values) -> float:
    return sum(values) / len(values)


def run(corpus: Path, architecture: str, way: str) -> dict:
    """One run's losses, seconds and peak memory."""
    import pandas as pd
    from cellmill.recipes import ModelRecipe, Training
    from cellmill.training.launch import train

    given = {"steps": STEPS, "batch_size": BATCH, "warmup_steps": 20, "learning_rate": 1e-3, "threads": 1}
    given |= {"validate_every": STEPS, "checkpoint_every": STEPS} | PLAIN | WAYS.get(way, {})
    sizes = ARCHITECTURES[architecture]
    recipe = ModelRecipe(architecture=architecture, preset="demo", sizes=sizes, training=Training(**given))
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        out = Path(folder) / "model"
        job = {"shards": str(corpus), "statistics": str(corpus.parent / "statistics.safetensors")}
        job |= {"vocabulary": str(corpus.parent / "vocabulary.parquet"), "recipe": dataclasses.asdict(recipe)}
        train(job | {"name": architecture, "seed": 0, "out": str(out), "code": "bench"})
        log = pd.read_parquet(out / "log.parquet")
    losses = log[(log.split == "train") & (log.metric == "loss")].sort_values("step")
    memory = log[log.metric == "memory_mb"].value.max()
    return {"losses": losses.value.tolist(), "seconds": float(log.seconds.max()), "memory_mb": float(memory)}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *sys.argv[2:])))
