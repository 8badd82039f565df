"""The bag of genes' view: log1p(CP10k) of what is visible of a cell, which is thinned and misses genes.

Every molecule of a cell is kept with a probability of the cell's own, log-uniform between a smallest share and 1; then
every gene that is left is hidden with a probability of the cell's own, uniform between 0 and a largest share. Values
are of the visible counts alone, so what is hidden says nothing, not even by its total.

Two views of the same cell and step are independent of each other.

Legend: B cells, N nonzeros, M of them visible.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import hash64, next_key, next_mixed, unit
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_within, log1p_cp10k, select, spread, sum_within
from cellmill.views.scfoundation import binomial

EXACT = 64
"""Counts up to this are thinned to exactly binomial numbers, larger ones by the normal approximation."""
_HIDE, _ANGLE = hash64("bag hide"), hash64("bag angle")
"""What a gene's hash is hashed with for further draws."""


class Weights(NamedTuple):
    """Visible genes with their weights."""

    genes: Genes
    weights: np.ndarray
    """float32 [M], log1p(CP10k) by its length in the cell: their squares sum to 1 in a cell."""


def embed(cells: CellBatch) -> Weights:
    """Weights of all the genes of `cells`; CP10k is of the counts that `cells` shows."""
    visible_B = sum_within(cells.offsets, cells.counts)
    values_N = log1p_cp10k(CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, visible_B))
    length_B = np.sqrt(sum_within(cells.offsets, values_N * values_N, np.float64))
    weights_N = values_N / spread(np.maximum(length_B, 1e-12), cells.offsets).astype(np.float32)
    return Weights(Genes(cells.joinids, cells.offsets, cells.genes), weights_N)


def pretrain(
    cells: CellBatch, *, min_share: float, max_hidden: float, view: int, seed: int, step: int | None
) -> Weights:
    """Weights of what is left of thinned cells with hidden genes.

    Parameters
    ----------
    min_share
        Smallest share of its molecules that a cell keeps.
    max_hidden
        Largest share of its genes that a cell hides.
    view
        Number of the view: others are drawn independently.
    step
        None in validation.
    """
    hash_B = hash64("bag", view, seed, -1 if step is None else step, cells.joinids)
    share_B = min_share ** unit(next_key(hash_B, np.array([0])))
    hidden_B = max_hidden * unit(next_key(hash_B, np.array([1])))
    hash_N = hash_within(hash_B, cells)
    counts_N = thin(cells, share_B, hash_N)
    visible_N = (counts_N > 0) & (unit(next_mixed(hash_N, _HIDE)) >= spread(hidden_B, cells.offsets))
    thinned = CellBatch(cells.joinids, cells.offsets, cells.genes, counts_N, cells.totals)
    return embed(select(thinned, visible_N))


def thin(cells: CellBatch, share_B: np.ndarray, hash_N: np.ndarray) -> np.ndarray:
    """int64 [N], how many molecules are left of each gene if each is kept with its cell's probability `share_B`.

    Binomial numbers; above `EXACT` molecules the normal approximation, rounded, by Box and Muller's transform.
    """
    few_N = cells.counts <= EXACT
    kept_N = np.empty(len(few_N), np.int64)
    few, many = np.flatnonzero(few_N), np.flatnonzero(~few_N)
    # as 64 binary digits; a share that rounds to 1 is the largest number below
    digits_B = np.minimum(share_B * 2.0**64, 2.0**64 - 2**11).astype(np.uint64)
    kept_N[few] = binomial(cells.counts[few], hash_N[few], np.searchsorted(few, cells.offsets), digits_B)
    count, share, hashes = cells.counts[many], spread(share_B, np.searchsorted(many, cells.offsets)), hash_N[many]
    radius = np.sqrt(-2 * np.log1p(-unit(hashes)))
    normal = radius * np.cos(2 * np.pi * unit(next_mixed(hashes, _ANGLE)))
    kept_N[many] = np.clip(np.rint(count * share + normal * np.sqrt(count * share * (1 - share))), 0, count)
    return kept_N
