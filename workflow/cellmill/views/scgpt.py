"""scGPT's view: a random subset of a cell's genes in random order, with the quantile bins of their counts.

The edges of a cell's bins are Q evenly spaced quantiles of its n nonzero counts, linear between neighbours. Edge i lies
at the place i (n - 1) / (Q - 1) of the sorted counts. So of a count with F counts below it and C up to it, the edges
below it are those whose place is below F, and the edges up to it those whose place is at most C - 1: both numbers are
quotients of integers, exact, and need no sorting where F and C come from a histogram.

Legend: B cells, N nonzeros of all cells together, H counts of the histogram, Q quantile edges.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import uniform
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, argsort_within, hash_genes, keep_first, random_order, spread

HIDDEN_SHARES = (0.25, 0.5, 0.75)
VALIDATION_SHARE = 0.5
_HISTOGRAM = 256
"""Counts below it are counted; the few that are not are sorted."""


class Binned(NamedTuple):
    """Genes in random order and their bins."""

    genes: Genes
    bins: np.ndarray
    """int32 [N], 1..Q."""
    perceived_B: np.ndarray
    """int64 [B], how many genes at the front of each cell show their bins; the others hide them."""


def bin_counts(cells: CellBatch, n_edges: int, hash_N: np.ndarray) -> np.ndarray:
    """Quantile bin of each count among its cell's nonzero counts: int32 [N], 1..Q.

    A count that several edges equal is drawn uniformly between the lowest and the highest of their bins, by the lower
    half of its hash.
    """
    n_cells, lengths_B = len(cells), cells.lengths
    key_N = np.minimum(cells.counts, _HISTOGRAM - 1).astype(np.int64)
    key_N += spread(np.arange(n_cells) * _HISTOGRAM, cells.offsets)
    numbers_BH = np.bincount(key_N, minlength=n_cells * _HISTOGRAM).reshape(n_cells, _HISTOGRAM)
    upto_BH = np.cumsum(numbers_BH, axis=1)
    low_BH, high_BH = _edges(upto_BH - numbers_BH, upto_BH, lengths_B[:, None], n_edges)
    high_N, ties_N = high_BH.ravel()[key_N], (high_BH - low_BH).ravel()[key_N]

    large_O = np.flatnonzero(cells.counts >= _HISTOGRAM - 1)
    if len(large_O):
        cell_O = np.searchsorted(cells.offsets, large_O, side="right") - 1
        value_O = (cell_O << 32) + cells.counts[large_O]
        sorted_O = np.sort(value_O)
        # of the cells up to this one, large counts below and up to it; the other counts of this cell are below
        others_B = lengths_B - np.bincount(cell_O, minlength=n_cells)
        others_O = others_B[cell_O] - np.searchsorted(sorted_O, cell_O << 32)
        below_O = np.searchsorted(sorted_O, value_O, side="left") + others_O
        upto_O = np.searchsorted(sorted_O, value_O, side="right") + others_O
        low_O, high_N[large_O] = _edges(below_O, upto_O, lengths_B[cell_O], n_edges)
        ties_N[large_O] = high_N[large_O] - low_O

    drawn_N = hash_N & np.uint64(0xFFFFFFFF)
    drawn_N *= ties_N.view(np.uint64)
    drawn_N >>= np.uint64(32)
    high_N -= drawn_N.view(np.int64)
    return high_N.astype(np.int32)


def _edges(below: np.ndarray, upto: np.ndarray, n: np.ndarray, n_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges below, and up to, a count with `below` of its cell's `n` counts below it and `upto` up to it."""
    last, steps = np.maximum(n - 1, 1), n_edges - 1
    return -(-below * steps // last), np.where(n > 1, (upto - 1) * steps // last + 1, n_edges)


def count_edges(cells: CellBatch, n_edges: int) -> np.ndarray:
    """The edges of each cell's bins, as counts: float64 [B, Q], ascending; zeros for a cell without any."""
    sorted_N = cells.counts[argsort_within(cells.offsets, cells.counts.astype(np.uint32))]
    place_BQ = np.maximum(cells.lengths - 1, 0)[:, None] * np.linspace(0, 1, n_edges)
    low_BQ = place_BQ.astype(np.int64)
    high_BQ = np.minimum(low_BQ + 1, np.maximum(cells.lengths - 1, 0)[:, None])
    counts_N = np.append(sorted_N, 0).astype(np.float64)  # an empty last cell's place is behind all counts
    low_BQ, high_BQ, share_BQ = low_BQ + cells.offsets[:-1, None], high_BQ + cells.offsets[:-1, None], place_BQ - low_BQ
    edges_BQ = counts_N[low_BQ] + share_BQ * (counts_N[high_BQ] - counts_N[low_BQ])
    return edges_BQ * (cells.lengths > 0)[:, None]


def embed(cells: CellBatch, *, n_edges: int, limit: int, keys: tuple = ("embed", 0)) -> Binned:
    """At most `limit` genes of each cell in random order, with the bins that they have among all genes of the cell.

    Parameters
    ----------
    cells
        B cells.
    n_edges
        Q.
    limit
        Genes that a cell keeps at most.
    keys
        Of the draws of genes and of ties.
    """
    hash_N = hash_genes(cells, "scgpt genes", *keys)
    first, offsets = keep_first(cells.offsets, limit)
    index_N = random_order(cells.offsets, hash_N)[first]
    bins_N = bin_counts(cells, n_edges, hash_N)[index_N]
    return Binned(Genes(cells.joinids, offsets, cells.genes[index_N]), bins_N, np.diff(offsets))


def pretrain(cells: CellBatch, *, n_edges: int, limit: int, seed: int, step: int | None) -> Binned:
    """As `embed`, with a share of 1/4, 1/2 or 3/4 of each cell's genes hidden.

    The share is one for the whole step; 1/2 in validation, where `step` is None.
    """
    keys = (seed, -1 if step is None else step)
    share = VALIDATION_SHARE if step is None else HIDDEN_SHARES[int(uniform("scgpt share", *keys)[0] * 3)]
    binned = embed(cells, n_edges=n_edges, limit=limit, keys=keys)
    lengths_B = np.diff(binned.genes.offsets)
    return binned._replace(perceived_B=lengths_B - np.floor(lengths_B * share).astype(np.int64))
