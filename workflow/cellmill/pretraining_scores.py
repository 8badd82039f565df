"""Score rows of the task ``pretraining``: a model's own loss on held-out cells.

It stands beside the losses of the model's untrained twin and of its trivial baseline (gene frequencies, gene means),
all asked at the same hidden positions.
"""

import time
from pathlib import Path

from cellmill.checkpoints import build_model, load_checkpoint
from cellmill.evaluate_loss import held_out_losses, trivial_held_out
from cellmill.models.base import GeneStatistics
from cellmill.progress import Progress
from cellmill.recipes import ModelRecipe
from cellmill.scores import row
from cellmill.shards.dataset import Shards

EVALUATION_SEED = 0
"""Every seed of a model is asked at the same positions, so that intervals over seeds are of training alone."""
EVALUATED_CELLS = 8192
"""At most so many held-out cells are asked, evenly spread."""
FEW_CELLS = 252
"""Fewer held-out cells than this are asked several times, with other positions hidden each time."""
MAX_DRAWS = 8


def score_pretraining(
    name: str,
    checkpoints: list[Path],
    shards: Shards,
    statistics: GeneStatistics,
    batch_size: int,
    provenance: dict,
) -> list[dict]:
    """Rows for one model: for each seed the trained model, ``NAME.untrained`` and ``NAME.trivial``.

    Parameters
    ----------
    name
        The model.
    checkpoints
        Folders of its checkpoints, one per seed.
    shards
        The corpus, with splits ``train`` and ``validation``.
    statistics
        Those of the corpus.
    batch_size
        Cells per forward pass.
    provenance
        Columns of `cellmill.scores.row` that say where the rows come from: run, code_version, commit, config_hash.

    Returns
    -------
    list of dict
        One row per seed, method and metric (``loss``, the sum of the objective's terms, and each term). The trivial
        baseline does not depend on the seed: it is measured once and stands beside each.
    """
    where = ("validation", batch_size, EVALUATION_SEED, EVALUATED_CELLS)
    draws = min(MAX_DRAWS, -(-FEW_CELLS // max(shards.n_cells("validation"), 1)))
    rows, trivial = [], None
    with Progress(f"held-out loss of {name}", total=len(checkpoints)) as progress:
        for number, folder in enumerate(checkpoints, start=1):
            model, meta = load_checkpoint(folder)
            untrained = build_model(ModelRecipe.from_dict(meta["recipe"]), shards.n_genes, statistics, meta["seed"])
            trivial = trivial or _timed(trivial_held_out, model, shards, "train", *where, draws)
            measured = {
                (name, "model"): _timed(held_out_losses, model, shards, *where, draws),
                (f"{name}.untrained", "untrained"): _timed(held_out_losses, untrained, shards, *where, draws),
                (f"{name}.trivial", "baseline"): trivial,
            }
            for (method, kind), (losses, seconds) in measured.items():
                rows += [
                    row(
                        task="pretraining",
                        dataset="corpus",
                        split="validation",
                        model=method,
                        kind=kind,
                        regime="none",
                        seed=meta["seed"],
                        metric=metric,
                        value=value,
                        higher_is_better=False,
                        n=int(losses["cells"]),
                        seconds=seconds,
                        reason=None,
                        seen="no",
                        checkpoint=meta["weights_sha256"] if kind == "model" else None,
                        **provenance,
                    )
                    for metric, value in losses.items()
                    if metric != "cells"
                ]
            said = ", ".join(f"{kind} {losses['loss']:.4f}" for (_, kind), (losses, _) in measured.items())
            progress.update(number, f"seed {meta['seed']}: {said}")
    return rows


def _timed(function, *arguments) -> tuple[dict[str, float], float]:
    """What `function` returns, and the seconds that it took."""
    started = time.monotonic()
    return function(*arguments), time.monotonic() - started
