"""The cells of a benchmark as the tasks and baselines see them.

Legend: N scored cells, M all cells of the shards, V genes in the vocabulary, P principal components.
"""

from collections.abc import Callable
from functools import cached_property

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from cellmill.errors import CellmillError
from cellmill.shards.dataset import Shards

UNLABELLED = ("unknown", "na", "nan", "")
"""Labels, in lower case, that name no cell type."""

_CELLS_PER_READ = 4096


def to_anndata(shards: Shards, split: str, rows: np.ndarray | None = None) -> anndata.AnnData:
    """Cells of a split as AnnData: raw counts in a CSR matrix, metadata in `obs`, vocabulary ids as `var_names`.

    Parameters
    ----------
    shards
        The folder of shards.
    split
        One of ``shards.splits``.
    rows
        Boolean [M], the cells to keep. Default: all.

    Returns
    -------
    AnnData
        ``obs["total_counts"]`` holds the counts over all measured genes, also those outside the vocabulary.
    """
    obs = shards.obs(split).to_pandas()
    keep = np.ones(len(obs), bool) if rows is None else rows
    counts, genes, lengths, totals = [], [], [], []
    start = 0
    for batch in shards.batches(split, _CELLS_PER_READ):
        kept = batch.take(np.flatnonzero(keep[start : start + len(batch)]))
        start += len(batch)
        counts.append(kept.counts.astype(np.float32))
        genes.append(kept.genes.astype(np.int32))
        lengths.append(kept.lengths)
        totals.append(kept.totals)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    obs = obs[keep].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    obs["total_counts"] = np.concatenate(totals)
    x_MV = sparse.csr_matrix((np.concatenate(counts), np.concatenate(genes), offsets), shape=(len(obs), shards.n_genes))
    return anndata.AnnData(x_MV, obs=obs, var=pd.DataFrame(index=np.arange(shards.n_genes).astype(str)))


def log1p_cp10k(cells: anndata.AnnData) -> sparse.csr_matrix:
    """log(1 + counts per 10,000), the counts divided by ``obs["total_counts"]`` (all measured genes), float32 CSR."""
    x_MV = sparse.csr_matrix(cells.X, dtype=np.float32, copy=True)
    scale_M = 1e4 / np.maximum(cells.obs["total_counts"].to_numpy(np.float64), 1)
    x_MV.data *= np.repeat(scale_M, np.diff(x_MV.indptr)).astype(np.float32)
    np.log1p(x_MV.data, out=x_MV.data)
    return x_MV


def column(obs: pd.DataFrame, name: str, what: str) -> np.ndarray:
    """A column of `obs` as strings, missing values as "".

    Raises
    ------
    CellmillError
        If there is no such column.
    """
    if name not in obs:
        raise CellmillError(f"the cells have no column '{name}' for the {what}; take one of {', '.join(obs.columns)}")
    return obs[name].astype(object).where(obs[name].notna(), "").astype(str).to_numpy()


class Target:
    """The labelled cells of a benchmark.

    Cells without a label, and those of types with fewer than `min_cells_per_label` cells, are left out and counted.

    Parameters
    ----------
    obs
        [M, columns] metadata of all cells, in shard order.
    label, batch
        Columns of the cell types and of the batches.
    min_cells_per_label
        Smallest number of cells of a type that is scored.
    read_cells
        Gives the counts of the cells at a boolean [M]; called only where a metric needs them.

    Attributes
    ----------
    rows_N : numpy.ndarray
        int64 [N], rows of `obs` that are scored.
    labels_N, batches_N : numpy.ndarray
        str [N].
    left_out : dict
        Number of cells left out, by label.

    Raises
    ------
    CellmillError
        If a column is missing, or no cell has a label.
    """

    def __init__(
        self,
        obs: pd.DataFrame,
        label: str,
        batch: str,
        min_cells_per_label: int,
        read_cells: Callable[[np.ndarray], anndata.AnnData],
    ):
        labels_M, batches_M = column(obs, label, "cell types"), column(obs, batch, "batches")
        names, counts = np.unique(labels_M, return_counts=True)
        count_of = dict(zip(names.tolist(), counts.tolist(), strict=True))
        scored = [name for name, n in count_of.items() if n >= min_cells_per_label and name.lower() not in UNLABELLED]
        self._keep_M = np.isin(labels_M, scored)
        self._read_cells = read_cells
        self.rows_N = np.flatnonzero(self._keep_M)
        self.labels_N, self.batches_N = labels_M[self._keep_M], batches_M[self._keep_M]
        self.left_out = {name: n for name, n in count_of.items() if name not in scored}
        self.n_all = len(obs)
        if not scored:
            raise CellmillError(
                f"column '{label}' has no cell type with at least {min_cells_per_label} cells; "
                "name another column or lower min_cells_per_label"
            )

    @classmethod
    def read(cls, shards: Shards, label: str, batch: str, min_cells_per_label: int) -> "Target":
        """The target in the split "all" of a benchmark's shards."""
        obs = shards.obs("all").to_pandas()
        return cls(obs, label, batch, min_cells_per_label, lambda keep_M: to_anndata(shards, "all", keep_M))

    @cached_property
    def pca_NP(self) -> np.ndarray:
        """float32 [N, 50], principal components of log1p(CP10k) over the vocabulary: the data before integration."""
        from cellmill.tasks.baselines import fit_pca

        x_NV = log1p_cp10k(self._read_cells(self._keep_M))
        return fit_pca(x_NV, 50, seed=0).transform(x_NV).astype(np.float32)
