"""Baselines that every model must stand beside: linear embeddings of the same cells, done with care.

Care is worth points: genes in too few cells are dropped before highly variable genes are chosen, and those are chosen
within each batch, so that a gene that only tells batches apart does not win (docs/tasks/annotation.md).

Legend: N cells of the target, V genes in the vocabulary, G chosen genes, P principal components.
"""

import anndata
import numpy as np
from scipy import sparse

from cellmill.errors import CellmillError
from cellmill.randomness import uniform
from cellmill.shards.dataset import Shards
from cellmill.tasks.data import column, log1p_cp10k, to_anndata

COMPONENTS = 50
TARGET_GENES = 2000
CORPUS_GENES = 1000
CORPUS_CELLS = 50_000
"""Largest number of corpus cells that a baseline looks at; more are thinned by a hash of their joinids."""

_MIN_CELLS_PER_GENE = 10
_MIN_CELLS_PER_BATCH = 10


def fit_pca(x_NG: sparse.csr_matrix, n_components: int, seed: int):
    """Principal components of a sparse matrix, centred implicitly; at most one fewer than its smaller side."""
    from sklearn.decomposition import PCA

    n_components = min(n_components, min(x_NG.shape) - 1)
    if n_components < 1:
        raise CellmillError(f"no principal components of a {x_NG.shape[0]} x {x_NG.shape[1]} matrix; give more cells")
    return PCA(n_components, svd_solver="arpack", random_state=seed).fit(x_NG)


def variable_genes(x_NV: sparse.csr_matrix, batches_N: np.ndarray, n_genes: int) -> np.ndarray:
    """Highly variable genes of log1p(CP10k), chosen within each batch.

    Normalised dispersion (Satija et al., Nature Biotechnology 2015), ranked by the number of batches in which a gene
    is among the `n_genes` most variable, then by its mean dispersion, as scanpy does with a `batch_key`. Genes in
    fewer than 10 cells, and batches of fewer than 10 cells, are not looked at.

    Returns
    -------
    numpy.ndarray
        int64 [G], column numbers in ascending order; at most `n_genes`.
    """
    import scanpy

    batch_names, codes, sizes = np.unique(batches_N, return_inverse=True, return_counts=True)
    large_N = sizes[codes] >= _MIN_CELLS_PER_BATCH
    if not large_N.any():
        large_N[:] = True
    genes_V = np.flatnonzero(np.bincount(x_NV[large_N].indices, minlength=x_NV.shape[1]) >= _MIN_CELLS_PER_GENE)
    if not len(genes_V):
        raise CellmillError(f"no gene is expressed in {_MIN_CELLS_PER_GENE} of {len(batches_N)} cells; give more cells")
    if len(genes_V) <= n_genes:
        return genes_V
    cells = anndata.AnnData(x_NV[large_N][:, genes_V])
    cells.obs["batch"] = batches_N[large_N]
    cells.obs["batch"] = cells.obs["batch"].astype("category")
    several = cells.obs["batch"].nunique() > 1
    scanpy.pp.highly_variable_genes(cells, n_top_genes=n_genes, batch_key="batch" if several else None)
    return genes_V[cells.var["highly_variable"].to_numpy()]


def _corpus_cells(corpus: Shards, seed: int) -> anndata.AnnData:
    joinids_M = corpus.obs("train")["soma_joinid"].to_numpy()
    keep_M = np.ones(len(joinids_M), bool)
    if len(joinids_M) > CORPUS_CELLS:
        drawn_M = uniform(seed, "baseline corpus", joinids_M)
        keep_M = drawn_M <= np.partition(drawn_M, CORPUS_CELLS - 1)[CORPUS_CELLS - 1]
    return to_anndata(corpus, "train", keep_M)


def _corpus_genes(corpus: Shards, seed: int) -> tuple[sparse.csr_matrix, np.ndarray]:
    cells = _corpus_cells(corpus, seed)
    x_MV = log1p_cp10k(cells)
    return x_MV, variable_genes(x_MV, column(cells.obs, "dataset_id", "data sets"), CORPUS_GENES)


def hvg_pca(cells: anndata.AnnData, corpus: Shards, *, batch: str, seed: int) -> np.ndarray:
    """PCA of the target's own 2,000 highly variable genes."""
    x_NV = log1p_cp10k(cells)
    x_NG = x_NV[:, variable_genes(x_NV, column(cells.obs, batch, "batches"), TARGET_GENES)]
    return fit_pca(x_NG, COMPONENTS, seed).transform(x_NG)


def corpus_hvg_pca(cells: anndata.AnnData, corpus: Shards, *, batch: str, seed: int) -> np.ndarray:
    """PCA of the target on the 1,000 genes that vary most in the training corpus."""
    _, genes_G = _corpus_genes(corpus, seed)
    x_NG = log1p_cp10k(cells)[:, genes_G]
    return fit_pca(x_NG, COMPONENTS, seed).transform(x_NG)


def corpus_pca(cells: anndata.AnnData, corpus: Shards, *, batch: str, seed: int) -> np.ndarray:
    """The target projected on the principal components of the training corpus: the linear foundation model."""
    x_MV, genes_G = _corpus_genes(corpus, seed)
    return fit_pca(x_MV[:, genes_G], COMPONENTS, seed).transform(log1p_cp10k(cells)[:, genes_G])


def harmony(cells: anndata.AnnData, corpus: Shards, *, batch: str, seed: int) -> np.ndarray:
    """`hvg_pca` with the batches aligned by Harmony (Korsunsky et al., Nature Methods 2019); it sees no labels."""
    import harmonypy
    import pandas as pd

    batches_N = column(cells.obs, batch, "batches")
    if len(np.unique(batches_N)) < 2:
        raise CellmillError(
            f"harmony needs at least two batches in '{batch}'; name another column or drop the baseline"
        )
    x_NP = hvg_pca(cells, corpus, batch=batch, seed=seed)
    found = harmonypy.run_harmony(
        x_NP, pd.DataFrame({batch: batches_N}), batch, random_state=seed, ncores=1, verbose=False
    )
    return found.Z_corr


BASELINES = {"hvg_pca": hvg_pca, "corpus_hvg_pca": corpus_hvg_pca, "corpus_pca": corpus_pca, "harmony": harmony}


def embed_baseline(name: str, target: Shards, corpus: Shards, *, batch: str, seed: int) -> np.ndarray:
    """Embed all cells of a benchmark with a baseline; no labels are used.

    Parameters
    ----------
    name
        A key of `BASELINES`.
    target
        Shards of the benchmark (split "all").
    corpus
        Shards of the pretraining corpus (split "train"), with the same vocabulary.
    batch
        Column of the target's batches.
    seed
        Seed of the eigensolver, of Harmony and of the thinning of a large corpus.

    Returns
    -------
    numpy.ndarray
        float32 [N, P] in the order of the shards; the same bits for the same seed.

    Raises
    ------
    CellmillError
        If the baseline is unknown, a column is missing, or there are too few cells, genes or batches.
    """
    import scanpy  # noqa: F401, before the limit, which holds for the libraries that are loaded
    import sklearn.decomposition  # noqa: F401
    from threadpoolctl import threadpool_limits

    if name not in BASELINES:
        raise CellmillError(f"baseline '{name}' is unknown; known are {', '.join(BASELINES)}")
    corpus.check_vocabulary(target.vocabulary_hash)
    with threadpool_limits(1):  # sums depend on the number of threads, to the bit
        x_NP = BASELINES[name](to_anndata(target, "all"), corpus, batch=batch, seed=seed)
    return np.ascontiguousarray(x_NP, dtype=np.float32)
