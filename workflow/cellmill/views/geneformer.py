"""Geneformer's view: the genes of a cell by falling count over the gene's nonzero median, some of them masked.

Legend: B cells, V genes, N ranked genes of all cells together, M of them to be predicted.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import below, unit
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, argsort_within, descending, hash_genes, keep_first, select

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
MASKED = -1
"""Stands for a gene that is shown as the mask."""


class MaskedRanks(NamedTuple):
    """Ranked genes, and those that are to be predicted."""

    ranks: Genes
    index_M: np.ndarray
    """int64 [M], ascending places in ``ranks.genes``."""
    shown_M: np.ndarray
    """int32 [M], what the model sees there: `MASKED`, another gene, or the gene itself."""


def embed(cells: CellBatch, median_V: np.ndarray, *, limit: int) -> Genes:
    """The genes of each cell by falling count / median, ties by gene id, cut to the first `limit`.

    The cell's total is a common factor of its values, so it never changes their order and is left out.

    Parameters
    ----------
    cells
        B cells.
    median_V
        float32 [V]; a gene whose median is NaN is never a token.
    limit
        Genes that a cell keeps at most.
    """
    value_N = cells.counts / median_V[cells.genes]
    known_N = ~np.isnan(value_N)
    kept = select(cells, known_N)
    order_N = argsort_within(kept.offsets, descending(value_N if kept is cells else value_N[known_N]))
    first, offsets = keep_first(kept.offsets, limit)
    return Genes(cells.joinids, offsets, kept.genes[order_N[first]])


def pretrain(
    cells: CellBatch, median_V: np.ndarray, *, limit: int, mask_rate: float, seed: int, step: int | None
) -> MaskedRanks:
    """Ranks with masked genes.

    Each gene is a target with probability `mask_rate`; of the targets 80 % show the mask, 10 % a random gene that has
    a median, 10 % themselves. `step` is None in validation.
    """
    ranks = embed(cells, median_V, limit=limit)
    keys = (seed, -1 if step is None else step)
    index_M = np.flatnonzero(below(hash_genes(ranks, "geneformer target", *keys), mask_rate))
    how_M = unit(hash_genes(ranks, "geneformer show", *keys, index_M=index_M))
    known_K = np.flatnonzero(~np.isnan(median_V)).astype(np.int32)  # a gene that is never a token would betray itself
    random_M = known_K[hash_genes(ranks, "geneformer gene", *keys, index_M=index_M) % np.uint64(len(known_K))]
    shown_M = np.where(how_M < MASK_SHARE + RANDOM_SHARE, random_M, ranks.genes[index_M])
    shown_M[how_M < MASK_SHARE] = MASKED
    return MaskedRanks(ranks, index_M, shown_M)
