"""Per-gene statistics of the training cells, in one pass over the shards.

CP10k is a gene's count by the cell's total counts over all measured genes, times 10,000.

Legend: V genes in the vocabulary, N nonzeros of a batch, Q bins, G genes of a chunk.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.base import GeneStatistics
from cellmill.shards.dataset import Shards

FORMAT, VERSION = "cellmill-statistics", 2

LOG_LOW, LOG_HIGH, BIN_WIDTH = np.log(1e-4), np.log(1e4), 0.01
"""Bins of ln(CP10k). CP10k is at most 1e4, and at least 1e-4 in cells of up to 1e8 counts."""
MEDIAN_ERROR = float(np.expm1(BIN_WIDTH))
"""Bound of the median's relative error: a value and its estimate lie in one bin."""
CATEGORIES = ("tissue_general", "cell_type", "development_stage", "disease", "tissue", "assay", "sex")
"""Columns whose values a model may learn from."""
SAYS_NOTHING = {"unknown", "na", ""}
_BINS = int(np.ceil((LOG_HIGH - LOG_LOW) / BIN_WIDTH))
_BATCH = 2048
_CHUNK = 512


def compute_statistics(shards: Shards, split: str = "train") -> GeneStatistics:
    """Statistics of every gene over the cells of a split, the median number of expressed genes, and obs values.

    Mean and standard deviation (population, divisor: number of cells) are of ln(1 + CP10k) over all cells, with zeros.
    The median is of CP10k over the cells that express the gene, from a histogram of ln(CP10k) with bins of `BIN_WIDTH`,
    log-linear within a bin; its relative error is at most `MEDIAN_ERROR`. Memory is one histogram of 4 bytes a bin and
    gene, whatever the number of cells.

    Parameters
    ----------
    shards
        The folder of shards.
    split
        The split whose cells count.

    Returns
    -------
    GeneStatistics
        int64 and float32 tensors [V]; floats are NaN where no cell expresses the gene. `categories` holds the values of
        the columns `CATEGORIES` but for those of `SAYS_NOTHING`.

    Raises
    ------
    CellmillError
        If the split has no cells or a shard is corrupt.
    """
    n_cells, n_genes = shards.n_cells(split), shards.n_genes
    if not n_cells:
        raise CellmillError(f"split '{split}' of {shards.folder} has no cells; choose cells for it")
    nonzero_V = np.zeros(n_genes, np.int64)
    cells_of_length = np.zeros(n_genes + 1, np.int64)
    sum_V = np.zeros(n_genes)
    sum_squares_V = np.zeros(n_genes)
    histogram_VQ = np.zeros((n_genes, _BINS), np.uint32)
    for cells in shards.batches(split, _BATCH):
        cp10k_N = cells.counts / np.repeat(cells.totals, cells.lengths) * 1e4
        log1p_N = np.log1p(cp10k_N)
        nonzero_V += np.bincount(cells.genes, minlength=n_genes)
        cells_of_length += np.bincount(cells.lengths, minlength=n_genes + 1)
        sum_V += np.bincount(cells.genes, log1p_N, n_genes)
        sum_squares_V += np.bincount(cells.genes, log1p_N * log1p_N, n_genes)
        bin_N = ((np.log(cp10k_N) - LOG_LOW) / BIN_WIDTH).astype(np.int64)
        np.add.at(histogram_VQ.reshape(-1), cells.genes * _BINS + np.clip(bin_N, 0, _BINS - 1), np.uint32(1))
    mean_V = sum_V / n_cells
    std_V = np.sqrt(np.maximum(sum_squares_V / n_cells - mean_V**2, 0))
    unseen_V = nonzero_V == 0
    mean_V[unseen_V] = std_V[unseen_V] = np.nan
    below = np.cumsum(cells_of_length)
    middles = np.searchsorted(below, [(n_cells - 1) // 2, n_cells // 2], side="right")
    values = shards.values(split, list(CATEGORIES))
    return GeneStatistics(
        nonzero_cells=torch.from_numpy(nonzero_V),
        median_nonzero_cp10k=torch.from_numpy(_medians(histogram_VQ, nonzero_V)).float(),
        mean_log1p_cp10k=torch.from_numpy(mean_V).float(),
        std_log1p_cp10k=torch.from_numpy(std_V).float(),
        median_genes=torch.tensor(middles.mean(), dtype=torch.float32),
        categories={column: sorted(values[column] - SAYS_NOTHING) for column in CATEGORIES},
    )


def _medians(histogram_VQ: np.ndarray, nonzero_V: np.ndarray) -> np.ndarray:
    """float64 [V], the mean of the lower and the upper middle value of each histogram."""
    medians_V = np.full(len(nonzero_V), np.nan)
    seen = np.flatnonzero(nonzero_V)
    for start in range(0, len(seen), _CHUNK):
        genes_G = seen[start : start + _CHUNK]
        below_GQ = np.cumsum(histogram_VQ[genes_G], axis=1, dtype=np.int64)
        middles = [(nonzero_V[genes_G] - 1) // 2, nonzero_V[genes_G] // 2]
        medians_V[genes_G] = sum(_order_statistic(below_GQ, rank_G) for rank_G in middles) / 2
    return medians_V


def _order_statistic(below_GQ: np.ndarray, rank_G: np.ndarray) -> np.ndarray:
    """The value of a rank (from 0), where the values of a bin lie evenly spaced in it on the log scale."""
    bin_G = (below_GQ <= rank_G[:, None]).sum(axis=1)
    rows_G = np.arange(len(bin_G))
    before_G = np.where(bin_G > 0, below_GQ[rows_G, bin_G - 1], 0)
    within_G = (rank_G - before_G + 0.5) / (below_GQ[rows_G, bin_G] - before_G)
    return np.exp(LOG_LOW + (bin_G + within_G) * BIN_WIDTH)


def save_statistics(path: str | Path, statistics: GeneStatistics, vocabulary_hash: str) -> None:
    """Write `statistics` as safetensors; the header says which vocabulary its rows are of."""
    tensors = {name: value.contiguous() for name, value in vars(statistics).items() if name != "categories"}
    # One key only: the order of several in the header is not fixed.
    header = {
        "format": FORMAT,
        "version": VERSION,
        "vocabulary_hash": vocabulary_hash,
        "categories": statistics.categories,
    }
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"cellmill": json.dumps(header)})


def load_statistics(path: str | Path, vocabulary_hash: str | None = None) -> GeneStatistics:
    """Read what `save_statistics` wrote.

    Parameters
    ----------
    path
        The file.
    vocabulary_hash
        The vocabulary that is expected; None takes any.

    Raises
    ------
    CellmillError
        If the file is missing, corrupt or of an unknown version, or of another vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; compute the statistics first")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("cellmill", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CellmillError(f"{path} is corrupt ({error}); delete it and run again") from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise CellmillError(f"{path} holds no statistics of version {VERSION}; delete it and run again")
    if vocabulary_hash is not None and header["vocabulary_hash"] != vocabulary_hash:
        raise CellmillError(
            f"{path} is of the vocabulary {header['vocabulary_hash']}, but {vocabulary_hash} is expected;"
            " delete it and run again"
        )
    return GeneStatistics(**tensors, categories=header["categories"])
