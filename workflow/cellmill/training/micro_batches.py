"""How the cells of one optimiser step are cut into micro batches, and their views made and moved to the device.

Legend: B cells.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from cellmill.models.base import CellModel, Inputs
from cellmill.models.packing import Layout, Packing
from cellmill.shards.batch import CellBatch

SHAPES = 32
"""Numbers of slots that the layers of a compiled model meet, about, at most."""


def cut(lengths_B: np.ndarray, limit: int) -> list[np.ndarray]:
    """Cut cells into as few micro batches as suffice, all nearly equally long.

    The longest cell comes first, and each into the micro batch that is the shortest so far; where that leaves one above
    the limit, all is done again with one micro batch more. A function of the arguments alone.

    Parameters
    ----------
    lengths_B
        int64 [B], tokens of each cell.
    limit
        Tokens of a micro batch at most. A cell that is longer is a micro batch of its own.

    Returns
    -------
    list of np.ndarray
        int64, the rows of each micro batch, ascending; every row stands in one of them.
    """
    lengths_B = np.asarray(lengths_B, dtype=np.int64)
    single = lengths_B > limit
    parts = [np.array([row]) for row in np.flatnonzero(single)]
    rows = np.flatnonzero(~single)
    if len(rows) == 0:
        return parts
    rows = rows[np.argsort(-lengths_B[rows], kind="stable")]
    # cells that are longer than half the limit cannot share one
    n_parts = max(-(-int(lengths_B[rows].sum()) // limit), int((2 * lengths_B[rows] > limit).sum()), 1)
    while True:
        part_of, longest = _spread(lengths_B[rows], n_parts)
        if longest <= limit:
            break
        n_parts += 1
    return parts + [np.sort(rows[part_of == part]) for part in range(n_parts) if (part_of == part).any()]


def _spread(lengths: np.ndarray, n_parts: int) -> tuple[np.ndarray, int]:
    """The part of each cell when each goes into the shortest one so far, and the length of the longest part."""
    totals, part_of = np.zeros(n_parts, np.int64), np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths):
        part_of[i] = np.argmin(totals)
        totals[part_of[i]] += length
    return part_of, int(totals.max())


def few_shapes(tokens: int) -> Packing:
    """A packing that gives micro batches of at most so many tokens at most `SHAPES` numbers of slots.

    On average a half of a `SHAPES`-th is unused of one that is full: 1.6 %.
    """
    return Packing(grain=max(tokens // SHAPES, 1))


def read_step(
    loader: Iterator[CellBatch], tokens: Callable[[CellBatch], int], at_least: int | None
) -> tuple[CellBatch, int]:
    """The cells of one step: one batch of the loader, or as many as have so many tokens; and how many batches."""
    batches = [next(loader)]
    if at_least:
        n_tokens = tokens(batches[0])
        while n_tokens < at_least:
            batches.append(next(loader))
            n_tokens += max(tokens(batches[-1]), 1)  # cells without a token cannot be waited for
    return CellBatch.concatenate(batches) if len(batches) > 1 else batches[0], len(batches)


class Step(NamedTuple):
    """What one rank works on in one optimiser step."""

    cells: CellBatch
    parts: list[Inputs]
    """The views of its micro batches, on the device."""
    limit: int
    """Tokens that they were allowed."""
    n_cells: int
    """Cells of all ranks."""
    after: dict
    """The loader's state behind these cells."""


def views(
    model: CellModel, cells: CellBatch, limit: int, device: torch.device, *, seed: int, step: int | None
) -> list[Inputs]:
    """The training views of all micro batches of `cells`, on `device`; see `cut` and `CellModel.pretrain_inputs`."""
    parts = cut(model.token_lengths(cells), limit)
    return [_move(model.pretrain_inputs(cells.take(rows), seed=seed, step=step), device) for rows in parts]


def _move(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device; to a GPU through pinned memory, so that nobody waits for it."""
    if device.type != "cuda":
        return {name: value.to(device) for name, value in inputs.items()}
    return {
        name: value.to(device) if isinstance(value, Layout) else value.pin_memory().to(device, non_blocking=True)
        for name, value in inputs.items()
    }
