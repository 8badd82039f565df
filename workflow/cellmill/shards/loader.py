"""The shuffled, endless, resumable stream of training cells.

Each epoch permutes the row groups of a split, reads them a window at a time and permutes the cells of the window. All
permutations are keyed by (seed, epoch), so the whole state of the stream is (epoch, position), and it is gone on from
anywhere by reading the windows of the next batch alone.

Cells wait in a window as they are packed on disk, about 3 bytes a nonzero. The shuffle copies a cell's packed bytes,
and only the cells that are served are unpacked, batch by batch. Threads read; no process is forked.

Legend: B cells, W cells of a window, R row groups of a window.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cellmill.errors import CellmillError
from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import RowGroup, Shards
from cellmill.shards.format import FROM_CELLS, PACKED
from cellmill.shards.reader import as_column, numbers, packed_bytes, unpack

WINDOW = 8
"""Row groups that are shuffled together."""
CHUNK = 2**18
"""Nonzeros, about, that are unpacked at once; many more would leave the processor's cache."""


class _Place(NamedTuple):
    """Where a window lies in the stream, and what it is read from."""

    epoch: int
    start: int
    """Position of the window's first cell in its epoch."""
    number: int
    groups: list[RowGroup]

    def covers(self, epoch: int, position: int) -> bool:
        return self.epoch == epoch and self.start <= position < self.start + self.n_cells

    @property
    def n_cells(self) -> int:
        return sum(group.cells for group in self.groups)


class _Ahead(NamedTuple):
    """A window that is being read: one future for each row group."""

    place: _Place
    tables: list[Future[pa.Table]]


class _Room:
    """Memory for the packed cells of one window after another: to get new memory costs as much as to fill it."""

    def __init__(self):
        self._bytes = {name: np.empty(0, np.uint8) for name in PACKED}

    def gather(self, name: str, columns: list[pa.ChunkedArray]) -> pa.Array:
        """One large binary column of several, until the next one of this name is gathered."""
        pieces = [packed_bytes(chunk) for column in columns for chunk in column.chunks]
        ends = np.cumsum([0, *(len(values) for values, _ in pieces)])
        if ends[-1] > len(self._bytes[name]):
            self._bytes[name] = None  # goes before the larger one comes
            self._bytes[name] = np.empty(ends[-1] + ends[-1] // 8, np.uint8)
        for (values, _), end in zip(pieces, ends[1:], strict=True):
            self._bytes[name][end - len(values) : end] = values
        # large: a window's bytes may pass the 2 GiB of Arrow's 32-bit offsets
        offsets = [offsets[:-1] + start for (_, offsets), start in zip(pieces, ends[:-1], strict=True)]
        offsets_W1 = np.concatenate([*offsets, ends[-1:]])
        buffers = [None, pa.py_buffer(offsets_W1), pa.py_buffer(self._bytes[name])]
        return pa.Array.from_buffers(pa.large_binary(), len(offsets_W1) - 1, buffers)


class _Window:
    """The packed cells of R row groups, in shard order, and those that are still to be served."""

    def __init__(self, ahead: _Ahead, room: _Room, n_genes: int, coded: tuple[str, ...]):
        self.place, self._n_genes = ahead.place, n_genes
        tables = [future.result() for future in ahead.tables]
        ahead.tables.clear()
        columns = (*FROM_CELLS, *coded)
        self._numbers = {name: np.concatenate([numbers(table[name]) for table in tables]) for name in columns}
        self._packed = {}
        for name in PACKED:  # column by column: what has been gathered is no longer needed as it was read
            self._packed[name] = room.gather(name, [table[name] for table in tables])
            tables = [table.drop_columns([name]) for table in tables]

    def serve(self, rows: np.ndarray, share: int) -> None:
        """Serve the cells at `rows` (of the shard order) from now on, mostly `share` of them at a time."""
        self._rows = rows
        shares = CHUNK / max(self._numbers["n_genes"].mean(), 1) / share
        self._further = max(round(shares) - 1, 0) * share
        self._unpacked, self._served = self._unpack(rows[:0]), 0

    def take(self, n: int) -> list[CellBatch]:
        """The next `n` cells."""
        pieces = []
        while n:
            if self._served == len(self._unpacked):
                size = n + self._further  # whole batches beyond what is asked for now
                self._unpacked, self._served = self._unpack(self._rows[:size]), 0
                self._rows = self._rows[size:]
            pieces.append(self._unpacked.slice(self._served, self._served + n))
            self._served += len(pieces[-1])
            n -= len(pieces[-1])
        return pieces

    def _unpack(self, rows_B: np.ndarray) -> CellBatch:
        try:
            return self._decode(rows_B, "")
        except CellmillError:
            ends_R = np.cumsum([group.cells for group in self.place.groups])
            group_of_B = np.searchsorted(ends_R, rows_B, side="right")
            for number in np.unique(group_of_B):  # the one that is at fault names its file
                self._decode(rows_B[group_of_B == number], str(self.place.groups[number].path))
            raise

    def _decode(self, rows_B: np.ndarray, where: str) -> CellBatch:
        index = as_column(rows_B)
        columns = {name: values_W[rows_B] for name, values_W in self._numbers.items()}
        packed = {name: values_W.take(index) for name, values_W in self._packed.items()}
        return unpack(columns, packed, where, self._n_genes)


def _keep_freed_memory() -> None:
    """Have the C library use a batch's memory for the next one, instead of giving it back and getting it anew.

    glibc keeps as much freed memory as twice the largest block it has seen freed, and a new page costs as much as to
    fill it. Nothing is written to this block, so it is never in memory.
    """
    np.empty(2**24, np.uint8)


class Loader:
    """Endless iterator over a split's cells in a deterministic shuffled order.

    The stream holds every cell exactly once per epoch; a batch may straddle two epochs. Batch t is a function of
    (shards, split, batch_size, seed). Of each batch rank r of `world` takes the r-th part, so every rank reads the
    bytes of every window, and unpacks its own cells alone.

    Memory is bounded, whatever the corpus: the window that is served, in room that every window uses in turn, and the
    next one, which is read meanwhile. At 3 bytes a nonzero and row groups of 2,048 cells of 1,300 genes a window is
    45 MB.

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
    threads
        Row groups that are read at once.
    categories
        Metadata columns whose codes the batches carry, and the values that are coded: see `CellBatch.codes`.

    Raises
    ------
    CellmillError
        If the split is empty, or `batch_size` is no multiple of `world`; from ``next``, if a shard is corrupt.

    Examples
    --------
    >>> with Loader(shards, "train", batch_size=64, seed=0) as loader:  # doctest: +SKIP
    ...     cells = next(loader)
    """

    def __init__(
        self,
        shards: Shards,
        split: str,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        threads: int = 2,
        categories: dict[str, list[str]] | None = None,
    ):
        if batch_size < 1 or batch_size % world:
            raise CellmillError(f"batch_size {batch_size} is no multiple of {world} processes; choose one that is")
        if not 0 <= rank < world:
            raise CellmillError(f"rank {rank} is not one of {world} processes; ranks run from 0 to {world - 1}")
        if threads < 1:
            raise CellmillError(f"the loader cannot read with {threads} threads; choose at least 1")
        self._n_cells = shards.n_cells(split)
        if not self._n_cells:
            raise CellmillError(f"split '{split}' of {shards.folder} has no cells; choose cells for it")
        self._shards = shards
        self._groups = shards.row_groups(split)
        self._sizes = np.array([group.cells for group in self._groups])
        self._seed = seed
        self._categories = categories or {}
        self._batch_size = batch_size
        self._rank, self._share = rank, batch_size // world
        self._epoch = 0
        self._position = 0
        self._room = _Room()
        self._window: _Window | None = None
        self._ahead: _Ahead | None = None
        _keep_freed_memory()
        self._readers = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="cellmill-loader")

    def __iter__(self) -> "Loader":
        return self

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def __next__(self) -> CellBatch:
        try:
            return self._next()
        except CellmillError:
            self._window = None  # may have served a part of this batch
            raise

    def _next(self) -> CellBatch:
        first = self._rank * self._share
        pieces = []
        served = 0  # cells of the batch of all ranks
        epoch, position = self._epoch, self._position
        while served < self._batch_size:
            place = self._window_at(epoch, position, served)
            taken = min(self._batch_size - served, place.start + place.n_cells - position)
            mine = min(max(served + taken - first, 0), self._share) - min(max(served - first, 0), self._share)
            pieces += self._window.take(mine)
            served += taken
            position += taken
            if position == self._n_cells:
                epoch, position = epoch + 1, 0
        self._epoch, self._position = epoch, position
        return pieces[0] if len(pieces) == 1 else CellBatch.concatenate(pieces)

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
        self._window = None  # its cells are served in turn, from another place on

    def close(self) -> None:
        """End the reading threads; the loader serves no more batches."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._window = self._ahead = None

    def _window_at(self, epoch: int, position: int, served: int) -> _Place:
        """Have the window that holds a position, `served` cells into a batch; its successor is read meanwhile."""
        if self._window is None or not self._window.place.covers(epoch, position):
            self._window = None  # frees its memory before the next one is put together
            ahead, self._ahead = self._ahead, None
            if ahead is None or not ahead.place.covers(epoch, position):
                for future in ahead.tables if ahead else ():
                    future.cancel()
                ahead = self._read(self._place(epoch, position))
            place = ahead.place
            self._window = _Window(ahead, self._room, self._shards.n_genes, tuple(self._categories))
            order_W = self._order("order of cells", epoch, place.number, np.arange(place.n_cells))
            left = order_W[position - place.start :]
            owner = (served + np.arange(len(left))) % self._batch_size // self._share
            self._window.serve(left[owner == self._rank], self._share)
            end = place.start + place.n_cells
            self._ahead = self._read(self._place(*((epoch, end) if end < self._n_cells else (epoch + 1, 0))))
        return self._window.place

    def _place(self, epoch: int, position: int) -> _Place:
        """The window that holds a position."""
        order = self._order("order of row groups", epoch, np.arange(len(self._groups)))
        ends = np.cumsum(self._sizes[order])
        number = int(np.searchsorted(ends, position, side="right")) // WINDOW
        members = order[number * WINDOW : (number + 1) * WINDOW]
        start = int(ends[number * WINDOW - 1]) if number else 0
        return _Place(epoch, start, number, [self._groups[member] for member in members])

    def _order(self, *keys) -> np.ndarray:
        return np.argsort(hash64(self._seed, *keys), kind="stable")

    def _read(self, place: _Place) -> _Ahead:
        read, categories = self._shards.read_packed, self._categories
        return _Ahead(place, [self._readers.submit(read, group, categories) for group in place.groups])
