"""Vectorised helpers over ragged cells that every architecture's view is built from; no loop over cells.

They are fastest where a batch stays in the processor's cache, up to a few hundred cells.

Legend: B cells, N nonzeros of all cells together, M of them picked. A ragged array of N values belongs
to cells through ``offsets`` [B + 1], as in `cellmill.shards.batch.CellBatch`: cell b owns
``values[offsets[b]:offsets[b + 1]]``.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import hash64, mixed_keys, next_mixed
from cellmill.shards.batch import CellBatch

_BLOCK = 2**15
"""Values that are hashed at once, so that intermediate ones stay in the processor's cache."""
_IDS = 2**16
"""Gene ids are 16 bits wide: to look up what they mix to costs less than to mix them."""


class Genes(NamedTuple):
    """Genes of cells in any order."""

    joinids: np.ndarray
    """int64 [B]."""
    offsets: np.ndarray
    """int64 [B + 1]."""
    genes: np.ndarray
    """int32 [N]."""


def offsets_of(lengths_B: np.ndarray) -> np.ndarray:
    """int64 [B + 1], where each cell starts, and the end of the last, from the cells' lengths."""
    offsets = np.zeros(len(lengths_B) + 1, np.int64)
    np.cumsum(lengths_B, out=offsets[1:])
    return offsets


def spread(values_B: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[N], each cell's value at all of its places."""
    return np.repeat(values_B, offsets[1:] - offsets[:-1])


def place_within(offsets: np.ndarray) -> np.ndarray:
    """int64 [N], the place 0, 1, 2, ... of each value within its cell."""
    return np.arange(offsets[-1]) - spread(offsets[:-1], offsets)


def sum_within(offsets: np.ndarray, values_N: np.ndarray, dtype=np.int64) -> np.ndarray:
    """[B], the sum of each cell's values; 0 for a cell without any."""
    filled_B = offsets[1:] > offsets[:-1]
    if filled_B.all() and len(filled_B):
        return np.add.reduceat(values_N, offsets[:-1], dtype=dtype)
    sums_B = np.zeros(len(offsets) - 1, dtype)
    if filled_B.any():
        sums_B[filled_B] = np.add.reduceat(values_N, offsets[:-1][filled_B], dtype=dtype)
    return sums_B


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
    if place_bits + cell_bits > 32:
        return np.lexsort((keys_N, np.repeat(np.arange(n_cells), lengths_B)))
    # (cell, key, place) packed into one integer each: numpy sorts plain integers several times as fast as it argsorts
    packed_N = keys_N.astype(np.int64)
    packed_N <<= place_bits
    packed_N += np.arange(offsets[-1])
    packed_N += np.repeat((np.arange(n_cells) << (32 + place_bits)) - offsets[:-1], lengths_B)
    packed_N.view(np.uint64).sort()
    packed_N &= (1 << place_bits) - 1
    packed_N += np.repeat(offsets[:-1], lengths_B)
    return packed_N


def descending(values_N: np.ndarray) -> np.ndarray:
    """uint32 keys whose ascending order is the descending order of non-negative `values_N`, taken as float32."""
    # the bits of non-negative floats order as the floats do
    return ~(np.asarray(values_N, dtype=np.float32) + np.float32(0)).view(np.uint32)


def hash_genes(cells: CellBatch | Genes, *keys, index_M: np.ndarray | None = None) -> np.ndarray:
    """``hash64(*keys, joinid, gene)`` of every gene of every cell; all but the gene is hashed once per cell.

    Parameters
    ----------
    cells
        The cells.
    *keys
        Purpose, seed, step: as for `cellmill.randomness.hash64`.
    index_M
        Places in the ragged array; by default all.

    Returns
    -------
    uint64 [N], or [M].
    """
    hash_B = hash64(*keys, cells.joinids)
    if index_M is None:
        return hash_within(hash_B, cells)
    return next_mixed(spread(hash_B, cells.offsets)[index_M], mixed_keys(_IDS).take(cells.genes[index_M]))


def hash_within(hash_B: np.ndarray, cells: CellBatch | Genes) -> np.ndarray:
    """uint64 [N], each gene of every cell hashed with its cell's hash, as `cellmill.randomness.next_key` does."""
    hash_N, mixed_V = spread(hash_B, cells.offsets), mixed_keys(_IDS)
    for start in range(0, len(hash_N), _BLOCK):
        block = slice(start, start + _BLOCK)
        next_mixed(hash_N[block], mixed_V.take(cells.genes[block]), out=hash_N[block])
    return hash_N


def random_order(offsets: np.ndarray, hash_N: np.ndarray) -> np.ndarray:
    """Order of each cell's values by the upper halves of their hashes: int64 [N]; cells stay where they are."""
    return argsort_within(offsets, (hash_N >> np.uint64(32)).astype(np.uint32))


def keep_first(offsets: np.ndarray, limit: int | np.ndarray) -> tuple[np.ndarray | slice, np.ndarray]:
    """The first `limit` values of each cell (one limit for all, or int64 [B]).

    Returns
    -------
    index of the values that stay, in their order; int64 [B + 1], their offsets.
    """
    lengths_B = np.diff(offsets)
    if (lengths_B <= limit).all():
        return slice(None), offsets
    kept_offsets = offsets_of(np.minimum(lengths_B, limit))
    return np.arange(kept_offsets[-1]) + spread(offsets[:-1] - kept_offsets[:-1], kept_offsets), kept_offsets


def select(cells: CellBatch, kept_N: np.ndarray) -> CellBatch:
    """`cells` with only the nonzeros where the boolean `kept_N` holds; joinids and totals stay."""
    index_M = np.flatnonzero(kept_N)
    if len(index_M) == len(kept_N):
        return cells
    offsets = np.searchsorted(index_M, cells.offsets)
    return CellBatch(cells.joinids, offsets, cells.genes[index_M], cells.counts[index_M], cells.totals, cells.codes)


def join(parts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where the values of ragged arrays go if each cell's are put one after the other, array after array.

    Parameters
    ----------
    parts
        Offsets of each array, int64 [B + 1].

    Returns
    -------
    int64 [B + 1], the offsets of the whole; for each array int64 [N], the place of each of its values.
    """
    offsets = sum(parts)
    begin_B, places = offsets[:-1], []
    for part in parts:
        places.append(np.arange(part[-1]) + spread(begin_B - part[:-1], part))
        begin_B = begin_B + np.diff(part)
    return offsets, places


def log1p_cp10k(cells: CellBatch) -> np.ndarray:
    """float32 [N], ln(1 + counts per 10,000 of the cell's counts over all measured genes)."""
    scale_B = (1e4 / np.maximum(cells.totals, 1)).astype(np.float32)
    values_N = cells.counts.astype(np.float32)
    values_N *= spread(scale_B, cells.offsets)
    return np.log1p(values_N, out=values_N)
