"""The shuffled, endless, resumable stream of training cells.

Each epoch permutes the row groups of a split, reads them a window at a time and permutes the cells of the window. All
permutations are keyed by (seed, epoch), so the whole state of the stream is (epoch, position), and it is gone on from
anywhere by reading the windows of the next batch alone. Memory is bounded by two windows: the one that is served and
the next one, which a thread reads meanwhile.

Legend: B cells of a batch, W cells of a window.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cellmill.errors import CellmillError
from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards

WINDOW = 8
"""Row groups that are shuffled together."""


class _Window(NamedTuple):
    epoch: int
    start: int
    """Position of the window's first cell in its epoch."""
    cells: CellBatch
    order_W: np.ndarray
    """Rows of `cells` in the order of the stream."""


class Loader:
    """Endless iterator over a split's cells in a deterministic shuffled order.

    The stream holds every cell exactly once per epoch; a batch may straddle two epochs. Batch t is a function of
    (shards, split, batch_size, seed). Of each batch rank r of `world` takes the r-th part, so every rank reads every
    window.

    Parameters
    ----------
    shards
        The folder of shards.
    split
        One of its splits.
    batch_size
        Cells per batch of all ranks together, B.
    seed
        Key of the order.
    rank, world
        Which part of each batch to take, of how many.

    Raises
    ------
    CellmillError
        If the split is empty, or `batch_size` is no multiple of `world`; from ``next``, if a shard is corrupt.

    Examples
    --------
    >>> with Loader(shards, "train", batch_size=64, seed=0) as loader:  # doctest: +SKIP
    ...     cells = next(loader)
    """

    def __init__(self, shards: Shards, split: str, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size < 1 or batch_size % world:
            raise CellmillError(f"batch_size {batch_size} is no multiple of {world} processes; choose one that is")
        if not 0 <= rank < world:
            raise CellmillError(f"rank {rank} is not one of {world} processes; ranks run from 0 to {world - 1}")
        self._n_cells = shards.n_cells(split)
        if not self._n_cells:
            raise CellmillError(f"split '{split}' of {shards.folder} has no cells; choose cells for it")
        self._shards = shards
        self._groups = shards.row_groups(split)
        self._sizes = np.array([group.cells for group in self._groups])
        self._seed = seed
        self._batch_size = batch_size
        self._rank, self._world = rank, world
        self._epoch = 0
        self._position = 0
        self._window: _Window | None = None
        self._ahead: Future[_Window] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cellmill-loader")

    def __iter__(self) -> "Loader":
        return self

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def __next__(self) -> CellBatch:
        share = self._batch_size // self._world
        first, last = self._rank * share, (self._rank + 1) * share
        pieces = []
        served = 0  # cells of the global batch
        while served < self._batch_size:
            window = self._window_at(self._epoch, self._position)
            begin = self._position - window.start
            taken = min(self._batch_size - served, len(window.order_W) - begin)
            mine = window.order_W[begin + max(first - served, 0) : begin + min(max(last - served, 0), taken)]
            if len(mine):
                pieces.append(window.cells.take(mine))
            served += taken
            self._position += taken
            if self._position == self._n_cells:
                self._epoch, self._position = self._epoch + 1, 0
        cells = CellBatch.concatenate(pieces)
        return replace(cells, genes=cells.genes.astype(np.int64), counts=cells.counts.astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts: `epoch`, and `position` (cells) in it."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state_dict` was taken, with the same shards, split and seed.

        Raises
        ------
        CellmillError
            If the position does not exist in this split.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < self._n_cells:
            raise CellmillError(
                f"the saved position {position} of epoch {epoch} does not exist in a split of {self._n_cells} cells;"
                " the state was saved with other shards, so delete it and train from the start"
            )
        self._epoch, self._position = epoch, position

    def close(self) -> None:
        """End the reading thread; the loader serves no more batches."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._window = self._ahead = None

    def _window_at(self, epoch: int, position: int) -> _Window:
        """The window that holds a position; its successor is read meanwhile."""
        if self._window is None or not self._covers(self._window, epoch, position):
            window = None
            self._window = None  # frees its memory before the next one but one is read
            if self._ahead is not None:
                ahead, self._ahead = self._ahead, None
                window = ahead.result()
            if window is None or not self._covers(window, epoch, position):
                window = self._thread.submit(self._read, epoch, position).result()
            self._window = window
            end = window.start + len(window.order_W)
            following = (epoch, end) if end < self._n_cells else (epoch + 1, 0)
            self._ahead = self._thread.submit(self._read, *following)
        return self._window

    @staticmethod
    def _covers(window: _Window, epoch: int, position: int) -> bool:
        return window.epoch == epoch and window.start <= position < window.start + len(window.order_W)

    def _read(self, epoch: int, position: int) -> _Window:
        """Read the window that holds a position."""
        order = np.argsort(
            hash64(self._seed, "order of row groups", epoch, np.arange(len(self._groups))), kind="stable"
        )
        ends = np.cumsum(self._sizes[order])
        number = int(np.searchsorted(ends, position, side="right")) // WINDOW
        members = order[number * WINDOW : (number + 1) * WINDOW]
        cells = CellBatch.concatenate([_compact(self._shards.read(self._groups[member])) for member in members])
        order_W = np.argsort(hash64(self._seed, "order of cells", epoch, number, np.arange(len(cells))), kind="stable")
        start = int(ends[number * WINDOW - 1]) if number else 0
        return _Window(epoch, start, cells, order_W)


def _compact(cells: CellBatch) -> CellBatch:
    """The same cells in 6 instead of 16 bytes a nonzero, for waiting in a window."""
    return replace(cells, genes=cells.genes.astype(np.uint16), counts=cells.counts.astype(np.uint32))
