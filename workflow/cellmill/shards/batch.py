"""The ragged batch of raw cells that every view starts from.

Legend: B cells, N nonzeros of all cells together, V genes in the vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class CellBatch:
    """B cells as one ragged array of their nonzero counts.

    Attributes
    ----------
    joinids
        int64 [B], the cell's `soma_joinid` in the Census that it came from.
    offsets
        int64 [B + 1]; cell b owns the nonzeros ``offsets[b]:offsets[b + 1]``.
    genes
        int32 [N], vocabulary ids, ascending within a cell.
    counts
        int32 [N], raw counts, all at least 1.
    totals
        int64 [B], the cell's raw counts summed over all measured genes, also those outside the vocabulary.
    codes
        int32 [B] for each obs column that was asked for: the value's place in the categories that were given, -1 for
        a value that is not among them.
    """

    joinids: np.ndarray
    offsets: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    codes: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.joinids)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [B], nonzero genes per cell."""
        return np.diff(self.offsets)

    @property
    def cell_of(self) -> np.ndarray:
        """int64 [N], the batch row (0..B-1) that each nonzero belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def slice(self, start: int, stop: int) -> "CellBatch":
        """The cells ``start:stop``; nonzeros are views, not copies."""
        offsets = self.offsets[start : stop + 1]
        within = slice(offsets[0], offsets[-1])
        return CellBatch(
            joinids=self.joinids[start:stop],
            offsets=offsets - offsets[0],
            genes=self.genes[within],
            counts=self.counts[within],
            totals=self.totals[start:stop],
            codes={column: codes_B[start:stop] for column, codes_B in self.codes.items()},
        )

    def take(self, rows: np.ndarray) -> "CellBatch":
        """The cells at `rows` (integers), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # position of every kept nonzero: the start of its cell in self, plus its place within the cell
        index = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        codes = {column: codes_B[rows] for column, codes_B in self.codes.items()}
        return CellBatch(self.joinids[rows], offsets, self.genes[index], self.counts[index], self.totals[rows], codes)

    @staticmethod
    def concatenate(batches: list["CellBatch"]) -> "CellBatch":
        """All cells of `batches` in order."""
        lengths = np.concatenate([b.lengths for b in batches])
        return CellBatch(
            joinids=np.concatenate([b.joinids for b in batches]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            genes=np.concatenate([b.genes for b in batches]),
            counts=np.concatenate([b.counts for b in batches]),
            totals=np.concatenate([b.totals for b in batches]),
            codes={column: np.concatenate([b.codes[column] for b in batches]) for column in batches[0].codes},
        )
