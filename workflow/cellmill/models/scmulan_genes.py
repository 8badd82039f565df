"""Which genes are words of scMulan.

Legend: V genes in the vocabulary, G of them expressed, Q bins of genes of similar mean.
"""

import numpy as np
import torch
from torch import Tensor

from cellmill.models.base import GeneStatistics

MEAN_BINS = 20
MIN_CELLS = 10
"""A gene of fewer training cells is taken only where there are no others left."""


def gene_tokens(n_genes: int, n_model_genes: int, statistics: GeneStatistics | None) -> Tensor:
    """int32 [V], the token of each gene of the vocabulary, -1 where it is no word."""
    if n_genes <= n_model_genes:
        return torch.arange(1, n_genes + 1, dtype=torch.int32)
    token_V = torch.full((n_genes,), -1, dtype=torch.int32)
    if statistics is not None:
        genes_G = most_variable(statistics, n_model_genes)
        token_V[torch.from_numpy(genes_G)] = torch.arange(1, len(genes_G) + 1, dtype=torch.int32)
    return token_V


def most_variable(statistics: GeneStatistics, n: int) -> np.ndarray:
    """The n most variable genes, int64, ascending; fewer where fewer are expressed.

    Normalised dispersion (Satija et al., Nature Biotechnology 33, 495 (2015)): variance over mean of log1p(CP10k),
    standardised among the genes of similar mean, in 20 bins of equally many genes.
    """
    mean_V, std_V = statistics.mean_log1p_cp10k.double().numpy(), statistics.std_log1p_cp10k.double().numpy()
    genes_G = np.flatnonzero(np.isfinite(mean_V) & np.isfinite(std_V) & (mean_V > 0))
    dispersion_G = std_V[genes_G] ** 2 / mean_V[genes_G]
    bin_G = np.argsort(np.argsort(mean_V[genes_G], kind="stable")) * MEAN_BINS // max(len(genes_G), 1)
    size_Q = np.maximum(np.bincount(bin_G, minlength=MEAN_BINS), 1)
    mean_Q = np.bincount(bin_G, dispersion_G, MEAN_BINS) / size_Q
    spread_Q = np.sqrt(np.bincount(bin_G, (dispersion_G - mean_Q[bin_G]) ** 2, MEAN_BINS) / size_Q)
    z_G = (dispersion_G - mean_Q[bin_G]) / np.maximum(spread_Q[bin_G], 1e-12)
    rare_G = statistics.nonzero_cells.numpy()[genes_G] < MIN_CELLS
    return np.sort(genes_G[np.lexsort((-z_G, rare_G))[:n]])
