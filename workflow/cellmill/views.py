"""Vectorised helpers over ragged cells that every architecture's view is built from; no loop over cells.

Legend: B cells, N nonzeros of all cells together, Q quantile edges, L padded length. A ragged array of N values belongs
to cells through ``offsets`` [B + 1], as in `cellmill.shards.batch.CellBatch`: cell b owns
``values[offsets[b]:offsets[b + 1]]``.
"""

import numpy as np

from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch


def offsets_of(lengths_B: np.ndarray) -> np.ndarray:
    """int64 [B + 1], where each cell starts, and the end of the last, from the cells' lengths."""
    return np.concatenate([[0], np.cumsum(lengths_B, dtype=np.int64)])


def place_within(offsets: np.ndarray) -> np.ndarray:
    """int64 [N], the place 0, 1, 2, ... of each value within its cell."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def argsort_within(offsets: np.ndarray, keys_N: np.ndarray) -> np.ndarray:
    """Order that sorts uint32 keys ascending within each cell; equal keys keep their order.

    Genes ascend within a cell of a `CellBatch`, so there ties are broken by gene id.

    Returns
    -------
    int64 [N], indices into the ragged array; cells stay where they are.
    """
    lengths_B = np.diff(offsets)
    n_cells, longest = len(lengths_B), int(lengths_B.max(initial=0))
    place_bits, cell_bits = max(longest - 1, 0).bit_length(), max(n_cells - 1, 0).bit_length()
    cell_of_N = np.repeat(np.arange(n_cells, dtype=np.uint64), lengths_B)
    if place_bits + cell_bits > 32:
        return np.lexsort((keys_N, cell_of_N))
    # (cell, key, place) packed into one integer each: numpy sorts plain integers several times as fast as it argsorts
    starts_N = np.repeat(offsets[:-1], lengths_B)
    place_N = (np.arange(offsets[-1]) - starts_N).astype(np.uint64)
    packed_N = (cell_of_N << np.uint64(32 + place_bits)) | (keys_N.astype(np.uint64) << np.uint64(place_bits)) | place_N
    packed_N.sort()
    return (packed_N & np.uint64((1 << place_bits) - 1)).astype(np.int64) + starts_N


def descending(values_N: np.ndarray) -> np.ndarray:
    """uint32 keys whose ascending order is the descending order of non-negative `values_N`, taken as float32."""
    # the bits of non-negative floats order as the floats do
    return ~(np.asarray(values_N, dtype=np.float32) + np.float32(0)).view(np.uint32)


def random_order(cells: CellBatch, *keys) -> np.ndarray:
    """A random order of each cell's genes, a function of `keys`, the joinid and the genes alone (smallest hash first).

    Parameters
    ----------
    *keys
        Purpose, seed, step: as for `cellmill.randomness.hash64`.

    Returns
    -------
    int64 [N], indices into the ragged array; cells stay where they are.
    """
    hash_N = hash64(*keys, cells.joinids[cells.cell_of], cells.genes)
    return argsort_within(cells.offsets, (hash_N >> np.uint64(32)).astype(np.uint32))


def keep_first(offsets: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` values of each cell.

    Returns
    -------
    bool [N], which values stay; int64 [B + 1], the offsets of those that do.
    """
    return place_within(offsets) < limit, offsets_of(np.minimum(np.diff(offsets), limit))


def select(cells: CellBatch, kept_N: np.ndarray) -> CellBatch:
    """`cells` with only the nonzeros where the boolean `kept_N` holds; joinids and totals stay."""
    offsets = np.concatenate([[0], np.cumsum(kept_N)])[cells.offsets]
    return CellBatch(cells.joinids, offsets, cells.genes[kept_N], cells.counts[kept_N], cells.totals)


def pad(offsets: np.ndarray, values_N: np.ndarray, fill, *, before: int = 0, after: int = 0) -> np.ndarray:
    """Right-padded matrix of ragged values.

    Parameters
    ----------
    fill
        Value where a cell has none.
    before, after
        Columns left free (holding `fill`) in front of each cell, and at least so many behind it.

    Returns
    -------
    [B, L] with L = before + the longest cell + after, at least 1, of the dtype of `values_N`.
    """
    lengths_B = np.diff(offsets)
    width = max(before + int(lengths_B.max(initial=0)) + after, 1)
    out_BL = np.full((len(lengths_B), width), fill, dtype=values_N.dtype)
    out_BL.ravel()[padded_index(offsets, width, before)] = values_N
    return out_BL


def padded_index(offsets: np.ndarray, width: int, before: int = 0) -> np.ndarray:
    """int64 [N], where each ragged value lies in the flattened [B, width] matrix of `pad`."""
    shift_B = np.arange(len(offsets) - 1) * width + before - offsets[:-1]
    return np.arange(offsets[-1]) + np.repeat(shift_B, np.diff(offsets))


def scaled_quantiles(offsets: np.ndarray, values_N: np.ndarray, n_edges: int) -> np.ndarray:
    """Evenly spaced empirical quantiles of each cell's integers, exact, times ``n_edges - 1``.

    The i-th edge lies at position i (n - 1) / (n_edges - 1) of the cell's n sorted values, linear between neighbours
    (numpy's default). Times n_edges - 1 it is an integer, so whether a value equals an edge does not hang on rounding.

    Returns
    -------
    int64 [B, n_edges], ascending; a cell without values gets zeros.
    """
    lengths_B = np.diff(offsets)
    cell_of_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    bits = int(values_N.max(initial=0)).bit_length()
    sorted_N = (cell_of_N << bits) | values_N
    sorted_N.sort()
    sorted_N = np.append(sorted_N & ((1 << bits) - 1), 0)  # one more, so that an empty cell at the end has what to read
    steps = n_edges - 1
    whole_BQ, rest_BQ = np.divmod(np.arange(n_edges) * np.maximum(lengths_B - 1, 0)[:, None], steps)
    low_BQ = sorted_N[offsets[:-1, None] + whole_BQ]
    high_BQ = sorted_N[offsets[:-1, None] + np.minimum(whole_BQ + 1, np.maximum(lengths_B - 1, 0)[:, None])]
    return np.where(lengths_B[:, None] > 0, low_BQ * steps + (high_BQ - low_BQ) * rest_BQ, 0)


def digitise(offsets: np.ndarray, values_N: np.ndarray, edges_BQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of edges of its own cell below each integer, and at or below it (int64 [N] each).

    Parameters
    ----------
    edges_BQ
        Ascending integer edges in the unit of `values_N`, both non-negative.
    """
    n_cells, n_edges = edges_BQ.shape
    span = max(int(values_N.max(initial=0)), int(edges_BQ.max(initial=0))) + 1
    # all cells' edges in one ascending line: cell b's lie between b * span and (b + 1) * span
    line = (edges_BQ + np.arange(n_cells)[:, None] * span).ravel()
    cell_of_N = np.repeat(np.arange(n_cells), np.diff(offsets))
    keys_N = values_N + cell_of_N * span
    before_N = cell_of_N * n_edges
    return (
        np.searchsorted(line, keys_N, side="left") - before_N,
        np.searchsorted(line, keys_N, side="right") - before_N,
    )
