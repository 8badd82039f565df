"""Geneformer's view: the genes of a cell by falling count over the gene's nonzero median, some of them masked.

Legend: B cells, V genes, N ranked genes of all cells together, M of them to be predicted, or masks put between them,
S stretches of ranks.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import below, unit
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import (
    Genes,
    argsort_within,
    descending,
    hash_genes,
    keep_first,
    offsets_of,
    place_within,
    select,
    spread,
    sum_within,
)

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
MASKED = -1
"""Stands for a gene that is shown as the mask."""
MAX_QUESTIONS = 32
"""Masks that are put into a cell at most, to ask which genes it lacks."""


class MaskedRanks(NamedTuple):
    """Ranked genes, and those that are to be predicted."""

    ranks: Genes
    index_M: np.ndarray
    """int64 [M], ascending places in ``ranks.genes``."""
    shown_M: np.ndarray
    """int32 [M], what the model sees there: `MASKED`, another gene, or the gene itself."""


class Questions(NamedTuple):
    """Ranked genes with masks between them, each standing for a stretch of ranks of the cell."""

    ranks: Genes
    """The visible genes, and `MASKED`."""
    index_M: np.ndarray
    """int64 [M], ascending places of the masks in ``ranks.genes``."""
    offsets: np.ndarray
    """int64 [B + 1] of the masks."""
    n_ranks_M: np.ndarray
    """int64 [M], ranks in the mask's stretch."""
    log_value_M: np.ndarray
    """float32 [M], mean over the stretch of ln(CP10k / median)."""
    rest_B: np.ndarray
    """float32 [B], share of the cell's ranks for which there is no room."""
    rest_log_value_B: np.ndarray
    """float32 [B], mean over those; 0 where there are none."""


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
    kept, _, order_N = _rank(cells, median_V)
    first, offsets = keep_first(kept.offsets, limit)
    return Genes(cells.joinids, offsets, kept.genes[order_N[first]])


def _rank(cells: CellBatch, median_V: np.ndarray) -> tuple[CellBatch, np.ndarray, np.ndarray]:
    """The cells without genes that have no median, their count / median [N], and the order by rank [N]."""
    value_N = cells.counts / median_V[cells.genes]
    known_N = ~np.isnan(value_N)
    kept = select(cells, known_N)
    if kept is not cells:
        value_N = value_N[known_N]
    return kept, value_N, argsort_within(kept.offsets, descending(value_N))


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


def impute(cells: CellBatch, median_V: np.ndarray, *, limit: int, mask_rate: float) -> Questions:
    """Ranks with masks put between them at even distances, for asking at which rank a gene would stand.

    A cell gets as many masks as training would make of its genes, at most `MAX_QUESTIONS`, and one at least. The ranks
    for which there is room are cut into as many stretches, with a mask in the middle of each. The mask of a cell
    without genes stands for one rank, at which a gene has its median.
    """
    kept, value_N, order_N = _rank(cells, median_V)
    room_B = np.minimum(kept.lengths, limit)
    n_masks_B = np.rint(mask_rate * room_B).astype(np.int64)
    n_masks_B = np.maximum(np.minimum(n_masks_B, np.minimum(room_B // 2, MAX_QUESTIONS)), 1)
    n_shown_B = np.minimum(kept.lengths, limit - n_masks_B)

    masks, stretches = offsets_of(n_masks_B), offsets_of(n_masks_B + 1)  # the last stretch: ranks without room
    k_S, n_masks_S, n_shown_S = place_within(stretches), spread(n_masks_B, stretches), spread(n_shown_B, stretches)
    start_S, is_mask_S = k_S * n_shown_S // n_masks_S, k_S < n_masks_S
    starts = np.append(spread(kept.offsets[:-1], stretches) + start_S, kept.offsets[-1])
    length_S = np.diff(starts)

    first, shown = keep_first(kept.offsets, n_shown_B)
    offsets = shown + masks
    index_M = spread(offsets[:-1], masks) + (start_S + length_S // 2 + k_S)[is_mask_S]
    genes_N = np.full(offsets[-1], MASKED, np.int32)
    is_gene_N = np.ones(offsets[-1], bool)
    is_gene_N[index_M] = False
    genes_N[is_gene_N] = kept.genes[order_N[first]]

    log_value_N = np.log(value_N[order_N] * spread(1e4 / np.maximum(cells.totals, 1), kept.offsets))
    log_value_S = (sum_within(starts, log_value_N, np.float64) / np.maximum(length_S, 1)).astype(np.float32)
    return Questions(
        ranks=Genes(cells.joinids, offsets, genes_N),
        index_M=index_M,
        offsets=masks,
        n_ranks_M=np.maximum(length_S[is_mask_S], 1),
        log_value_M=log_value_S[is_mask_S],
        rest_B=(1 - n_shown_B / np.maximum(kept.lengths, 1)).astype(np.float32) * (kept.lengths > 0),
        rest_log_value_B=log_value_S[~is_mask_S],
    )
