"""Score rows of the task ``pretraining``: a model's own loss on held-out cells.

It stands beside the losses of the model's untrained twin and of its trivial baseline (gene frequencies, gene means),
all asked at the same hidden positions.
"""

import time
from functools import partial
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
EVALUATED_CELLS = 384
"""Fewer held-out cells than this are asked several times, with other positions hidden each time."""
MAX_DRAWS = 8


def score_pretraining(
    name: str, checkpoints: list[Path], shards: Shards, statistics: GeneStatistics, provenance: dict
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
    provenance
        Columns of `cellmill.scores.row` that say where the rows come from: run, code_version, commit, config_hash.

    Returns
    -------
    list of dict
        One row per seed, method and metric (``loss``, the sum of the objective's terms, and each term).
    """
    rows = []
    draws = min(MAX_DRAWS, -(-EVALUATED_CELLS // max(shards.n_cells("validation"), 1)))
    with Progress(f"held-out loss of {name}", total=3 * len(checkpoints)) as progress:
        for number, folder in enumerate(checkpoints):
            model, meta = load_checkpoint(folder)
            recipe, seed = ModelRecipe.from_dict(meta["recipe"]), meta["seed"]
            untrained = build_model(recipe, shards.n_genes, statistics, seed)
            where = ("validation", recipe.embedding.batch_size, EVALUATION_SEED)
            methods = {
                (name, "model"): partial(held_out_losses, model, shards, *where),
                (f"{name}.untrained", "untrained"): partial(held_out_losses, untrained, shards, *where),
                (f"{name}.trivial", "baseline"): partial(trivial_held_out, model, shards, "train", *where),
            }
            for done, ((method, kind), losses) in enumerate(methods.items(), start=1):
                started = time.monotonic()
                values = losses(draws=draws)
                n = values.pop("cells")
                seconds = time.monotonic() - started
                rows += [
                    row(
                        task="pretraining",
                        dataset="corpus",
                        split="validation",
                        model=method,
                        kind=kind,
                        regime="none",
                        seed=seed,
                        metric=metric,
                        value=value,
                        higher_is_better=False,
                        n=int(n),
                        seconds=seconds,
                        reason=None,
                        seen="no",
                        checkpoint=meta["weights_sha256"] if kind == "model" else None,
                        **provenance,
                    )
                    for metric, value in values.items()
                ]
                progress.update(3 * number + done, f"{method} seed {seed}: {values['loss']:.4f}")
    return rows
