import os
import subprocess
import sys

import numpy as np
import pytest
from cellmill.tasks.base import NotPossible
from cellmill.tasks.controls import labels_embedding, shuffled_embedding
from cellmill.tasks.data import Target
from cellmill.tasks.integration import (
    AGGREGATES,
    Integration,
    Settings,
    _Metrics,
    exact_neighbors,
    kbet_per_label,
)
from task_cells import baron, target_of, values
from threadpoolctl import threadpool_limits

ROWS = 18
BIO = ("nmi_leiden", "ari_leiden", "nmi_kmeans", "ari_kmeans", "asw_label", "isolated_labels", "clisi")


@pytest.fixture(scope="module")
def cells(data):
    return baron(data)


@pytest.fixture(scope="module")
def target(cells):
    return target_of(cells)


@pytest.fixture(scope="module")
def task():
    task = Integration(Settings())
    task.start()
    with threadpool_limits(1):
        yield task


@pytest.fixture(scope="module")
def pca(target, task):
    """The embedding most tests look at, and its scores."""
    x_NE = target.pca_NP[:, :20]
    return x_NE, task.score(x_NE, target, 0)


def score_labels(make, target, cells, task):
    x_NE = make(cells.obs["cell_type"].astype(str).to_numpy(), 0)[target.rows_N]
    return values(task.score(x_NE, target, 0), "all")


def test_labels_are_the_best_possible(cells, target, task):
    found = score_labels(labels_embedding, target, cells, task)
    assert len(found) == ROWS
    for metric in (*BIO, "bio", "avg_bio", "graph_connectivity"):
        assert found[metric] == pytest.approx(1, abs=2e-3), metric
    assert found["kbet"] > 0.9  # batches are mixed within a label, at a test level of 5 %
    assert found["asw_batch"] > 0.9


def test_shuffled_knows_nothing_of_the_labels(cells, target, task):
    found = score_labels(shuffled_embedding, target, cells, task)
    for metric in ("ari_leiden", "ari_kmeans"):
        assert abs(found[metric]) < 0.05
    assert max(found["nmi_leiden"], found["nmi_kmeans"]) < 0.1
    assert found["asw_label"] < 0.5


def test_values_are_those_of_scib_metrics_and_scikit_learn(pca, target):
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    x, rows = pca
    y, batches = target.labels_N, target.batches_N
    found = values(rows, "all")
    distances, indices = NearestNeighbors(n_neighbors=90, algorithm="brute").fit(x).kneighbors(x)
    graph = NeighborsResults(indices, distances)
    assert found["asw_label"] == pytest.approx((silhouette_score(x, y) + 1) / 2, abs=1e-4)
    assert found["clisi"] == pytest.approx(scib_metrics.clisi_knn(graph, y), abs=1e-4)
    assert found["ilisi"] == pytest.approx(scib_metrics.ilisi_knn(graph, batches), abs=1e-4)
    connectivity = scib_metrics.graph_connectivity(graph.subset_neighbors(15), y)
    assert found["graph_connectivity"] == pytest.approx(connectivity, abs=1e-4)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(graph.subset_neighbors(15), y, seed=0)
    assert found["nmi_leiden"] == pytest.approx(leiden["nmi"], abs=0.01)
    assert found["asw_batch"] == pytest.approx(scib_metrics.silhouette_batch(x, y, batches, chunk_size=2048), abs=1e-5)
    comparison = scib_metrics.pcr_comparison(target.pca_NP, x, batches, categorical=True)
    assert found["pcr_comparison"] == pytest.approx(comparison, abs=1e-5)


def test_aggregates(pca):
    found = values(pca[1], "all")
    bio = [found[m] for m in ("nmi_leiden", "ari_leiden", "asw_label", "isolated_labels", "clisi")]
    batch = [found[m] for m in ("asw_batch", "pcr_comparison", "graph_connectivity", "ilisi", "kbet")]
    assert found["bio"] == pytest.approx(np.mean(bio))
    assert found["batch"] == pytest.approx(np.mean(batch))
    assert found["total"] == pytest.approx(0.6 * found["bio"] + 0.4 * found["batch"])
    assert found["avg_bio"] == pytest.approx(np.mean(bio[:3]))
    assert found["avg_batch"] == pytest.approx((found["asw_batch"] + found["graph_connectivity"]) / 2)


def test_neighbors_are_exact_and_self_comes_first():
    from scipy.spatial.distance import cdist

    x = np.random.default_rng(1).normal(size=(700, 3))
    x[:40] = x[0]  # ties: duplicates of one cell
    indices, distances = exact_neighbors(x, 12)
    assert (indices[:, 0] == np.arange(700)).all()
    assert (distances[:, 0] == 0).all()
    np.testing.assert_allclose(distances, np.sort(cdist(x, x), axis=1)[:, :12], atol=1e-12)
    assert (distances[:40] == 0).all()
    assert indices[5].tolist() == [5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_near_cells_far_from_the_origin_keep_their_order():
    """|a|^2 + |b|^2 - 2ab would lose these differences."""
    x = np.array([[1000.0, 0], [1000.0, 2e-6], [1000.0, 5e-6], [1000.0, 9e-6]])
    assert exact_neighbors(x, 4)[0].tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 1, 3, 0], [3, 2, 1, 0]]


def test_kbet_tells_mixed_from_separate_batches(pca, target):
    from scib_metrics.nearest_neighbors import NeighborsResults

    def kbet(x, batches_N):
        indices, distances = exact_neighbors(x, 50)
        graph = NeighborsResults(indices, distances.astype(np.float32)).knn_graph_connectivities
        return kbet_per_label(graph, batches_N, target.labels_N)

    shift = np.unique(target.batches_N, return_inverse=True)[1][:, None] * 30.0
    separate = kbet(pca[0] + shift * np.eye(20)[0], target.batches_N)
    mixed = kbet(pca[0], np.random.default_rng(0).permutation(target.batches_N))
    assert separate < 0.2
    assert mixed > 0.85  # a test at level .05 accepts about .95 of truly mixed neighbourhoods


@pytest.mark.slow
def test_kbet_is_near_that_of_scib_metrics(pca, target):
    """Theirs is approximate and starts from a random vector: it differs from run to run."""
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    indices, distances = exact_neighbors(pca[0], 50)
    graph = NeighborsResults(indices, distances.astype(np.float32))
    theirs = scib_metrics.kbet_per_label(graph, target.batches_N, target.labels_N)
    assert values(pca[1], "all")["kbet"] == pytest.approx(theirs, abs=0.05)


def test_an_embedding_is_scored_the_same_after_another(pca, target, task):
    """Nothing of one embedding (its graph, a generator's state) reaches the next."""
    x, rows = pca
    task.score(np.random.default_rng(0).normal(size=x.shape), target, 1)
    again = task.score(x, target, 0)
    assert values(again, "all") == values(rows, "all")


@pytest.mark.slow
def test_another_process_gives_the_same_bits(pca, target, tmp_path, data):
    np.save(tmp_path / "x.npy", pca[0])
    code = (
        "import numpy as np; from pathlib import Path; from task_cells import *\n"
        "from threadpoolctl import threadpool_limits\n"
        "from cellmill.tasks.integration import *\n"
        f"t = Integration(Settings()); t.start(); threadpool_limits(1); g = target_of(baron(Path({str(data)!r})))\n"
        f"print({{r['metric']: r['value'] for r in t.score(np.load({str(tmp_path / 'x.npy')!r}), g, 0)}})"
    )
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(values(pca[1], "all"))


@pytest.mark.filterwarnings("ignore:PCR comparison")
def test_what_cannot_be_computed_is_a_row_with_a_reason(cells, pca, task, target):
    one_batch = Target(cells.obs.assign(batch="one"), "cell_type", "batch", 10, None)
    rows = {r["metric"]: r for r in task.score(pca[0], one_batch, 0)}
    assert len(rows) == ROWS
    for metric in ("asw_batch", "bras", "pcr_comparison", "ilisi", "kbet"):
        assert (rows[metric]["value"], rows[metric]["reason"]) == (None, "the cells have only one batch")
    assert rows["bio"]["value"] == pytest.approx(values(pca[1], "all")["bio"], abs=0.1)
    assert rows["total"]["reason"] == "batch could not be computed"

    broken = pca[0].copy()
    broken[7] = np.inf
    rows = task.score(broken, target, 0)
    assert len(rows) == ROWS
    assert {r["value"] for r in rows} == {None}
    assert rows[0]["reason"] == "the embedding of 1 of 1922 cells holds NaN or infinity"


def test_a_collapsed_embedding_does_not_stop_the_others(target, task):
    rows = task.score(np.ones((len(target.rows_N), 4), np.float32), target, 0)
    assert len(rows) == ROWS
    assert all((r["value"] is None) == bool(r["reason"]) for r in rows)
    assert values(rows, "all")["ari_kmeans"] == 0


def test_few_cells_have_no_lisi(cells):
    few = cells[::25]
    small = Target(few.obs, "cell_type", "batch", 2, None)
    x = np.random.default_rng(0).normal(size=(len(small.rows_N), 5))
    said = f"90 neighbours are asked for and there are {len(x)} cells"
    with pytest.raises(NotPossible, match=said):
        _Metrics(x, small, Settings(), 0).ilisi()


def test_compiled_programs_are_kept_per_machine(tmp_path, monkeypatch):
    import jax

    monkeypatch.setattr("platform.node", lambda: "node7")
    try:
        Integration(Settings(), tmp_path).start()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "node7")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_every_metric_of_an_aggregate_exists():
    for parts in AGGREGATES.values():
        assert set(parts) <= set(Integration.metrics)
