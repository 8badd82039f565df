"""Batch integration: do a cell's neighbours share its type, whatever their batch? The scIB metrics.

Luecken et al., Nature Methods 2022, through scib-metrics where it gives the same bits twice; docs/tasks/integration.md
says where it does not, and what stands in.

Legend: N cells, E width of an embedding, K neighbours, P principal components of the unintegrated data.
"""

import os
import platform
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import sparse

from cellmill.tasks.base import NotPossible, Task, check_finite
from cellmill.tasks.data import Target

# Weights of each aggregate's members: Luecken et al. (bio, batch, total), and the two of scGPT.
AGGREGATES = {
    "bio": dict.fromkeys(("nmi_leiden", "ari_leiden", "asw_label", "isolated_labels", "clisi"), 1),
    "batch": dict.fromkeys(("asw_batch", "pcr_comparison", "graph_connectivity", "ilisi", "kbet"), 1),
    "total": {"bio": 0.6, "batch": 0.4},
    "avg_bio": dict.fromkeys(("nmi_leiden", "ari_leiden", "asw_label"), 1),
    "avg_batch": dict.fromkeys(("asw_batch", "graph_connectivity"), 1),
}

_CHUNK = 2048  # a label's cells in one piece, since each shape of a piece is compiled


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How integration is scored."""

    neighbors: int = field(
        default=15, metadata={"description": "Neighbours for clustering and graph connectivity.", "ge": 2, "le": 90}
    )
    kbet_neighbors: int = field(default=50, metadata={"description": "Neighbours for kBET.", "ge": 10, "le": 90})
    lisi_neighbors: int = field(
        default=90, metadata={"description": "Neighbours for LISI; its perplexity is a third of them.", "ge": 6}
    )


def exact_neighbors(x_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's `k` nearest cells by Euclidean distance, itself first, ties by row number.

    Returns
    -------
    tuple
        indices int64 [N, K] and distances float64 [N, K], ascending.
    """
    x_NE = np.asarray(x_NE, np.float64)
    square_N = np.einsum("ne,ne->n", x_NE, x_NE)
    n, spare = len(x_NE), min(len(x_NE), k + 10)
    indices, distances = np.empty((n, k), np.int64), np.empty((n, k))
    for start in range(0, n, 512):
        rows = np.arange(start, min(start + 512, n))
        near = square_N[rows, None] + square_N - 2 * x_NE[rows] @ x_NE.T
        near[np.arange(len(rows)), rows] = -np.inf
        candidates = np.sort(np.argpartition(near, spare - 1, axis=1)[:, :spare], axis=1)
        for row, candidate in zip(rows, candidates, strict=True):
            # subtracting first keeps the digits that the product above cancels
            exact = np.sqrt(((x_NE[candidate] - x_NE[row]) ** 2).sum(axis=1))
            order = np.lexsort((candidate, exact, candidate != row))[:k]
            indices[row], distances[row] = candidate[order], exact[order]
    return indices, distances


def kbet_per_label(connectivities, batches_N: np.ndarray, labels_N: np.ndarray, alpha: float = 0.05) -> float:
    """Share of cells whose neighbourhood has their label's own mix of batches (chi-squared test), averaged over labels.

    This is kBET (Buttner et al., Nature Methods 2019) by the rules of `scib_metrics.kbet_per_label`: labels of fewer
    than 10 cells or a single batch are skipped, neighbours are sought in a diffusion map of its own graph, and a
    label that falls into too many small pieces scores 0. Here eigenvectors and neighbours are exact, so that two runs
    agree to the bit, and a label's number of diffusion components does not depend on the labels before it.

    Parameters
    ----------
    connectivities
        Sparse [N, N], symmetric graph of all cells.
    batches_N, labels_N
        str [N].
    alpha
        Level of the test.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.stats import chi2

    connectivities = sparse.csr_matrix(connectivities)
    scores = []
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        _, sizes = np.unique(batches_N[rows], return_counts=True)
        if len(rows) < 10 or len(sizes) == 1:
            continue
        k = min(70, max(10, int(sizes.mean() / 4)))
        graph = connectivities[rows][:, rows]
        n_components, part = connected_components(graph, connection="strong")
        if n_components > 1:
            kept = np.flatnonzero(np.bincount(part)[part] >= 3 * k)
            if len(kept) < 0.75 * len(rows):
                scores.append(0.0)
                continue
            rows, graph = rows[kept], graph[kept][:, kept]
        codes = np.unique(batches_N[rows], return_inverse=True)[1]
        share = np.bincount(codes) / len(rows)
        indices, _ = exact_neighbors(_diffusion_map(graph), min(k + 1, len(rows)))
        expected = share * indices.shape[1]
        observed = (codes[indices][:, :, None] == np.arange(len(share))).sum(axis=1)
        statistic = ((observed - expected) ** 2 / expected).sum(axis=1)
        scores.append(float((chi2.sf(statistic, len(share) - 1) >= alpha).mean()) if len(share) > 1 else 1.0)
    if not scores:
        raise NotPossible("no cell type has 10 cells in two batches")
    return float(np.mean(scores))


def _diffusion_map(graph: sparse.csr_matrix, n_components: int = 100) -> np.ndarray:
    """[N, components]: Euclidean distance in it sums diffusion over all numbers of steps (Haghverdi et al., 2016)."""
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    n = graph.shape[0]
    n_components = min(n_components, n - 1)
    degree = np.asarray(graph.sum(axis=0)).ravel()
    kernel = sparse.diags(1 / degree) @ graph @ sparse.diags(1 / degree)
    root = np.sqrt(np.asarray(kernel.sum(axis=0)).ravel())
    transitions = sparse.diags(1 / root) @ kernel @ sparse.diags(1 / root)
    if n <= 1000:
        values, vectors = eigh(transitions.toarray())
        order = np.argsort(-np.abs(values), kind="stable")[:n_components]
        values, vectors = values[order], vectors[:, order]
    else:
        values, vectors = eigsh(transitions, n_components, which="LM", v0=np.ones(n))
    # the stationary state, of eigenvalue 1, takes no step to reach: weight 1
    stationary = values > 1 - 1e-6
    return vectors * np.where(stationary, 1.0, values / np.where(stationary, 1.0, 1 - values))


def start_jax(cache: Path | None) -> None:
    """Load what scoring needs: JAX's sums in one thread, its compiled programs kept under the folder `cache`.

    Each machine has a folder of its own there: compiled programs are for one kind of processor, and the nodes of a
    cluster share the folder.
    """
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    import jax
    import numba
    import scib_metrics  # noqa: F401
    import sklearn.cluster
    import sklearn.decomposition  # noqa: F401

    numba.set_num_threads(1)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def scib():
    """scib-metrics, imported where it is first used (it takes seconds)."""
    import scib_metrics

    return scib_metrics


def kmeans(x_NE: np.ndarray, labels_N: np.ndarray, seed: int) -> dict[str, float]:
    """NMI and ARI of the best of 10 k-means clusterings, k being the number of labels."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = KMeans(len(np.unique(labels_N)), n_init=10, random_state=seed).fit_predict(x_NE)
    return {
        "nmi_kmeans": normalized_mutual_info_score(labels_N, found),
        "ari_kmeans": adjusted_rand_score(labels_N, found),
    }


class _Metrics:
    """The metrics of one embedding; each method gives one or two of them by name.

    All share one graph of neighbours, made from this very embedding: a graph that an earlier embedding left behind is
    the best-known way to publish wrong scores (Kedzierska et al., Genome Biology 2025).
    """

    def __init__(self, x_NE: np.ndarray, target: Target, settings: Settings, seed: int):
        self.x_NE = np.ascontiguousarray(x_NE, np.float32)
        self.target, self.labels_N, self.batches_N = target, target.labels_N, target.batches_N
        self.settings, self.seed = settings, seed

    @cached_property
    def _nearest(self):
        from scib_metrics.nearest_neighbors import NeighborsResults

        settings = self.settings
        k = max(settings.neighbors, settings.kbet_neighbors, settings.lisi_neighbors)
        indices, distances = exact_neighbors(self.x_NE, min(k, len(self.x_NE)))
        return NeighborsResults(indices, distances.astype(np.float32))

    def _neighbors(self, k: int):
        if k > len(self.x_NE):
            raise NotPossible(f"{k} neighbours are asked for and there are {len(self.x_NE)} cells")
        return self._nearest.subset_neighbors(k)

    def leiden(self) -> dict[str, float]:
        graph = self._neighbors(self.settings.neighbors)
        found = scib().nmi_ari_cluster_labels_leiden(graph, self.labels_N, seed=self.seed)
        return {"nmi_leiden": found["nmi"], "ari_leiden": found["ari"]}

    def kmeans(self) -> dict[str, float]:
        return kmeans(self.x_NE, self.labels_N, self.seed)

    def asw_label(self) -> dict[str, float]:
        return {"asw_label": scib().silhouette_label(self.x_NE, self.labels_N)}

    def isolated_labels(self) -> dict[str, float]:
        return {"isolated_labels": scib().isolated_labels(self.x_NE, self.labels_N, self.batches_N)}

    def clisi(self) -> dict[str, float]:
        return {"clisi": scib().clisi_knn(self._neighbors(self.settings.lisi_neighbors), self.labels_N)}

    def asw_batch(self) -> dict[str, float]:
        return {"asw_batch": scib().silhouette_batch(self.x_NE, self.labels_N, self.batches_N, chunk_size=_CHUNK)}

    def bras(self) -> dict[str, float]:
        return {"bras": scib().bras(self.x_NE, self.labels_N, self.batches_N, chunk_size=_CHUNK)}

    def pcr_comparison(self) -> dict[str, float]:
        found = scib().pcr_comparison(self.target.pca_NP, self.x_NE, self.batches_N, categorical=True)
        return {"pcr_comparison": found}

    def graph_connectivity(self) -> dict[str, float]:
        graph = self._neighbors(self.settings.neighbors)
        return {"graph_connectivity": scib().graph_connectivity(graph, self.labels_N)}

    def ilisi(self) -> dict[str, float]:
        return {"ilisi": scib().ilisi_knn(self._neighbors(self.settings.lisi_neighbors), self.batches_N)}

    def kbet(self) -> dict[str, float]:
        graph = self._neighbors(self.settings.kbet_neighbors).knn_graph_connectivities
        return {"kbet": kbet_per_label(graph, self.batches_N, self.labels_N)}


# Each method of `_Metrics`, the metrics that it gives, and what it needs two of.
_STEPS = (
    (_Metrics.leiden, ("nmi_leiden", "ari_leiden"), "label"),
    (_Metrics.kmeans, ("nmi_kmeans", "ari_kmeans"), "label"),
    (_Metrics.asw_label, ("asw_label",), "label"),
    (_Metrics.isolated_labels, ("isolated_labels",), "label"),
    (_Metrics.clisi, ("clisi",), "label"),
    (_Metrics.asw_batch, ("asw_batch",), "batch"),
    (_Metrics.bras, ("bras",), "batch"),
    (_Metrics.pcr_comparison, ("pcr_comparison",), "batch"),
    (_Metrics.graph_connectivity, ("graph_connectivity",), "label"),
    (_Metrics.ilisi, ("ilisi",), "batch"),
    (_Metrics.kbet, ("kbet",), "batch"),
)


class Integration(Task):
    """The scIB set, its aggregates, and scGPT's AvgBIO and AvgBATCH."""

    name = "integration"
    regimes = ("zero_shot",)
    metrics = dict.fromkeys([m for _, metrics, _ in _STEPS for m in metrics] + list(AGGREGATES), True)
    Settings = Settings

    def start(self) -> None:
        """See `Task.start`."""
        start_jax(self.cache)

    def score(self, x_NE: np.ndarray, target: Target, seed: int) -> list[dict]:
        """See `Task.score`. One split: ``all``."""
        columns = {"split": "all", "regime": "zero_shot", "n": len(x_NE)}
        found = _Metrics(x_NE, target, self.settings, seed)
        distinct = {"label": len(np.unique(target.labels_N)), "batch": len(np.unique(target.batches_N))}

        def checked(method, needs):
            check_finite(x_NE)
            if distinct[needs] < 2:
                raise NotPossible(f"the cells have only one {needs}")
            return method(found)

        rows = []
        for method, metrics, needs in _STEPS:
            rows += self.measure(lambda method=method, needs=needs: checked(method, needs), metrics, **columns)
        for name, parts in AGGREGATES.items():
            values = {row["metric"]: row["value"] for row in rows}
            rows += self.measure(lambda n=name, p=parts, v=values: {n: weighted_mean(p, v)}, (name,), **columns)
        return rows


def weighted_mean(parts: dict[str, float], values: dict[str, float | None]) -> float:
    """The weighted mean of the metrics `parts` (weight by name), which exists only where all of them do."""
    missing = [metric for metric in parts if values[metric] is None]
    if missing:
        raise NotPossible(f"{', '.join(missing)} could not be computed")
    return sum(weight * values[metric] for metric, weight in parts.items()) / sum(parts.values())


TASK = Integration
