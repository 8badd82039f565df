"""Exceiver's view: standardised log1p(CP10k) of a cell's detected genes, a fixed number of them masked.

Genes that a cell does not express are padding of the published attention and stand in no array here; a network that
wants them knows their value, which is the same in every cell.

Legend: B cells, V genes, N nonzeros, H genes that are hidden in each cell.
"""

from typing import NamedTuple

import numpy as np

from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_genes, log1p_cp10k, random_order, select

CLIP = 10.0
SHIFT = 1.0
"""Added to z, so that the average is 1: a value multiplies its gene's embedding."""
HIDDEN_VALUE = 1.0
MASK_RATE = 0.15


class Standardised(NamedTuple):
    """Detected genes with their values."""

    genes: Genes
    values: np.ndarray
    """float32 [N], z clipped above at 10, plus 1; 1 where the gene is hidden."""


class MaskedValues(NamedTuple):
    """Detected genes, and those that are to be predicted."""

    shown: Standardised
    """A hidden gene has the id V, whose embedding is the padding's, and the value 1."""
    index_BH: np.ndarray
    """int64 [B, H], places of the hidden genes in ``shown``."""
    genes_BH: np.ndarray
    """int32 [B, H], their ids."""
    targets_BH: np.ndarray
    """float32 [B, H], their values."""


def hidden_genes(median_genes: float) -> int:
    """H, from the median number of genes that a training cell expresses."""
    return int(MASK_RATE * median_genes)


def embed(cells: CellBatch, mean_V: np.ndarray, std_V: np.ndarray) -> Standardised:
    """Values of all detected genes.

    Parameters
    ----------
    cells
        B cells.
    mean_V, std_V
        float32 [V], of log1p(CP10k) over all training cells, with zeros. A gene with NaN, which no training cell
        expresses or too few, is left out; a standard deviation of 0 counts as 1.
    """
    values_N, genes_N = log1p_cp10k(cells), cells.genes.astype(np.int64)
    values_N -= mean_V[genes_N]
    values_N /= np.where(std_V == 0, np.float32(1), std_V)[genes_N]
    known_N = ~np.isnan(values_N)
    kept = select(cells, known_N)
    if kept is not cells:
        values_N = values_N[known_N]
    np.minimum(values_N, np.float32(CLIP), out=values_N)
    values_N += np.float32(SHIFT)
    return Standardised(Genes(kept.joinids, kept.offsets, kept.genes), values_N)


def pretrain(
    cells: CellBatch, mean_V: np.ndarray, std_V: np.ndarray, *, n_hidden: int, seed: int, step: int | None
) -> MaskedValues:
    """Values with exactly `n_hidden` hidden genes in each cell, drawn at random.

    Cells with fewer than twice as many detected genes are left out, as in the original. `step` is None in validation.
    """
    whole = embed(cells, mean_V, std_V)
    enough_B = np.diff(whole.genes.offsets) >= 2 * n_hidden
    if not enough_B.all():
        whole = embed(cells.take(np.flatnonzero(enough_B)), mean_V, std_V)
    genes, values_N = whole
    hash_N = hash_genes(genes, "exceiver hidden", seed, -1 if step is None else step)
    order_N = random_order(genes.offsets, hash_N)
    index_BH = order_N[genes.offsets[:-1, None] + np.arange(n_hidden)]
    shown = Standardised(genes._replace(genes=genes.genes.copy()), values_N.copy())
    shown.genes.genes[index_BH] = len(mean_V)
    shown.values[index_BH] = HIDDEN_VALUE
    return MaskedValues(shown, index_BH, genes.genes[index_BH], values_N[index_BH])
