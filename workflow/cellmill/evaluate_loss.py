"""An architecture's own loss on held-out cells: of the trained model, its untrained twin and its trivial baseline.

All three are asked at the same positions: what is hidden depends on the seed and the cell alone (``step=None``).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from cellmill.device import best_device
from cellmill.errors import CellmillError
from cellmill.models.base import CellModel, Losses
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.training.micro_batches import views

TRIVIAL_CELLS = 65536
TOKENS = 16384
"""Of a forward pass, at most."""


def held_out_losses(
    model: CellModel,
    shards: Shards,
    split: str,
    batch_size: int,
    seed: int,
    max_cells: int | None = None,
    draws: int = 1,
) -> dict[str, float]:
    """The objective on a split, in evaluation mode and float32.

    Parameters
    ----------
    model
        Moved to `best_device`; its mode is left as it was.
    shards, split
        Cells that the model was not trained on.
    batch_size
        Cells per forward pass at most; where they have more than `TOKENS` tokens, they are cut.
    seed
        Decides which positions are hidden.
    max_cells
        At most so many cells, evenly spread over the split; all by default.
    draws
        How often each cell is asked, with other positions hidden each time.

    Returns
    -------
    dict
        ``loss`` (the sum of the terms' means, as in training), every term's mean over all its positions, ``cells``.

    Raises
    ------
    CellmillError
        If the split holds no cells, or a loss is not finite.
    """
    model.to(best_device())
    batches = spread_batches(shards, split, batch_size, max_cells, model.categories)
    return _finite(mean_losses(model, batches, seed, draws=draws), "the model")


def trivial_held_out(
    model: CellModel,
    shards: Shards,
    train_split: str,
    split: str,
    batch_size: int,
    seed: int,
    max_cells: int | None = None,
    draws: int = 1,
) -> dict[str, float]:
    """The objective on a split when the architecture's trivial baseline predicts; as `held_out_losses`.

    The baseline (gene frequencies, gene means) is fitted on at most 65,536 cells, evenly spread over `train_split`.
    """
    device = best_device()
    model.to(device)
    known = spread_batches(shards, train_split, batch_size, TRIVIAL_CELLS, model.categories)
    trivial = model.fit_trivial(known).to(device)
    sums = TermSums()
    with torch.inference_mode():
        for batch in spread_batches(shards, split, batch_size, max_cells, model.categories):
            for draw in range(draws):
                for inputs in views(model, batch, TOKENS, device, seed=seed + draw, step=None):
                    sums.add(model.trivial_losses(inputs, trivial))
            sums.cells += len(batch)
    return _finite(sums.means(), "the trivial baseline")


def mean_losses(
    model: CellModel,
    batches: Iterable[CellBatch],
    seed: int,
    autocast: AbstractContextManager | None = None,
    draws: int = 1,
    limit: int = TOKENS,
) -> dict[str, float]:
    """`held_out_losses` on given batches, `limit` tokens at a time, without the check of finiteness."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = TermSums()
    with torch.inference_mode(), autocast or nullcontext():
        for batch in batches:
            for draw in range(draws):
                for inputs in views(model, batch, limit, device, seed=seed + draw, step=None):
                    sums.add(model(inputs, step=None))
            sums.cells += len(batch)
    model.train(was_training)
    return sums.means()


class TermSums:
    """Sums and counts of loss terms over batches, kept on the model's device so that no batch waits for it."""

    def __init__(self):
        self._sums, self._counts, self.cells = {}, {}, 0

    def add(self, terms: Losses) -> None:
        """Add the terms of one forward pass."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.sum.detach().double()
            self._counts[name] = self._counts.get(name, 0.0) + term.count.detach().double()

    def means(self) -> dict[str, float]:
        """``loss``, every term's mean (0 for a term without positions), ``cells``."""
        terms = {name: float(total / self._counts[name].clamp(min=1)) for name, total in self._sums.items()}
        return {"loss": sum(terms.values()), **terms, "cells": self.cells}


def spread_batches(
    shards: Shards,
    split: str,
    batch_size: int,
    max_cells: int | None = None,
    categories: dict[str, list[str]] | None = None,
) -> Iterator[CellBatch]:
    """Batches of `batch_size` cells in shard order: all of a split, or `max_cells` in batches evenly spread over it.

    A corpus's shards are shuffled, so any run of neighbours is a random sample, and only what is yielded is read.
    The batches carry the codes of the obs columns `categories`: see `CellBatch.codes`.
    """
    n_cells = shards.n_cells(split) if split in shards.splits else 0
    if n_cells == 0:
        raise CellmillError(f"the shards hold no cells of the split '{split}'; set corpus.splits so that it has some")
    n_kept = min(n_cells, max_cells or n_cells)
    if n_kept == n_cells:
        yield from shards.batches(split, batch_size, categories=categories)
        return
    n_batches = -(-n_kept // batch_size)
    for i in range(n_batches):
        skipped = (n_cells - n_kept) * i // max(n_batches - 1, 1)
        size = min(batch_size, n_kept - i * batch_size)
        yield next(shards.batches(split, size, i * batch_size + skipped, categories))


def _finite(losses: dict[str, float], who: str) -> dict[str, float]:
    if not np.isfinite(losses["loss"]):
        raise CellmillError(
            f"the held-out loss of {who} is {losses['loss']}; train again with a lower training.learning_rate"
        )
    return losses
