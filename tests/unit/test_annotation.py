import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cellmill.errors import CellmillError
from cellmill.shards.dataset import Shards
from cellmill.tasks import annotation, load_task, read_embedding, score_embeddings, tasks
from cellmill.tasks.annotation import Annotation, Settings, agreement, probe_predict
from cellmill.tasks.controls import labels_embedding, shuffled_embedding
from cellmill.tasks.data import Target, to_anndata
from shard_cells import real_cells, write_shards
from task_cells import baron, target_of, values

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1")


def score(x_NE, target, **settings):
    return Annotation(Settings(**settings)).score(x_NE[target.rows_N], target, seed=0)


@pytest.fixture(scope="module")
def cells(data):
    return baron(data)


@pytest.fixture(scope="module")
def target(cells):
    return target_of(cells)


@pytest.fixture(scope="module")
def labels(cells):
    return cells.obs["cell_type"].astype(str).to_numpy()


def test_rare_types_are_left_out_and_counted(target):
    assert target.left_out == {"mast": 8, "schwann": 5, "t_cell": 2}
    assert len(target.rows_N) == 1922


def test_labels_score_one(labels, target):
    rows = score(labels_embedding(labels, 0), target)
    assert len(rows) == 2 * 4 * 4  # regimes, metrics, three libraries and their mean
    assert {r["split"] for r in rows} == {
        "leave_out:human1_lib1",
        "leave_out:human1_lib2",
        "leave_out:human1_lib3",
        "mean",
    }
    assert {r["value"] for r in rows} == {1.0}
    assert {r["n"] for r in rows if r["split"] == "mean"} == {1922}


def test_shuffled_is_at_chance(labels, target):
    x = shuffled_embedding(labels, 0)
    share = np.unique(target.labels_N, return_counts=True)[1] / len(target.labels_N)
    for regime in ("zero_shot", "linear_probe"):
        found = values(score(x, target), "mean", regime)
        # between guessing in proportion to the types and always saying the commonest
        assert (share**2).sum() - 0.03 < found["accuracy"] < share.max() + 0.03
        assert found["balanced_accuracy"] == pytest.approx(1 / len(share), abs=0.03)


def test_knn_is_scikit_learns(cells, target):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier

    x = np.random.default_rng(0).normal(size=(cells.n_vars, 8)).astype(np.float32)
    x_NE = np.log1p(cells.X[target.rows_N]) @ x
    held = target.batches_N == "human1_lib2"
    knn = KNeighborsClassifier(7, weights="distance", metric="euclidean").fit(x_NE[~held], target.labels_N[~held])
    said, true = knn.predict(x_NE[held]), target.labels_N[held]
    rows = Annotation(Settings(neighbors=7, distance="euclidean")).score(x_NE, target, 0)
    assert values(rows, "leave_out:human1_lib2") == pytest.approx(
        {
            "accuracy": accuracy_score(true, said),
            "balanced_accuracy": balanced_accuracy_score(true, said),
            "macro_f1": f1_score(true, said, average="macro"),
            "weighted_f1": f1_score(true, said, average="weighted"),
        }
    )


def test_probe_is_scikit_learns(target):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    held = target.batches_N == "human1_lib1"
    x, y, batches = target.pca_NP[:, :20], target.labels_N, target.batches_N
    ours = probe_predict(x[~held], y[~held], batches[~held], x[held], (0.1,), 0)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x[~held], y[~held])
    assert (ours == theirs.predict(x[held])).mean() > 0.998


def test_c_is_chosen_without_the_test_cells(target):
    """Whatever the test cells' labels are, the probe says the same of them."""
    held = target.batches_N == "human1_lib1"
    x = target.pca_NP
    said = [
        probe_predict(x[~held], target.labels_N[~held], target.batches_N[~held], x[held][order], (0.001, 1.0), 0)
        for order in (slice(None), slice(None, None, -1))
    ]
    assert (said[0] == said[1][::-1]).all()
    one_batch = np.full((~held).sum(), "a")
    assert (
        agreement(
            target.labels_N[held], probe_predict(x[~held], target.labels_N[~held], one_batch, x[held], (0.001, 1.0), 0)
        )["accuracy"]
        > 0.95
    )


def test_a_type_of_one_batch_only_is_not_asked_for(cells, labels):
    obs = cells.obs.copy()
    obs["cell_type"] = np.where((labels == "beta") & (obs["batch"] != "human1_lib1"), "unknown", labels)
    target = Target(obs, "cell_type", "batch", 10, None)
    assert target.left_out["unknown"] == 616
    rows = score(labels_embedding(labels, 0), target)
    n = {r["split"]: r["n"] for r in rows}
    asked = (target.batches_N == "human1_lib1") & (target.labels_N != "beta")
    assert n["leave_out:human1_lib1"] == asked.sum()
    assert {r["value"] for r in rows} == {1.0}


def test_what_cannot_be_scored_is_a_row_with_a_reason(cells, labels):
    x = labels_embedding(labels, 0)
    obs = cells.obs.assign(batch="one")
    rows = score(x, Target(obs, "cell_type", "batch", 10, None))
    assert {(r["value"], r["reason"]) for r in rows} == {(None, "there is only one batch, so none can be left out")}
    rows = score(x, Target(cells.obs.assign(cell_type="cell"), "cell_type", "batch", 10, None))
    assert {(r["value"], r["reason"]) for r in rows} == {(None, "the other batches hold fewer than two cell types")}
    x[3, 0] = np.nan
    rows = score(x, target_of(cells))
    assert {(r["value"], r["reason"]) for r in rows} == {
        (None, "the embedding of 1 of 1922 cells holds NaN or infinity")
    }
    assert len(rows) == 32


def test_a_mean_is_over_the_same_folds_for_every_embedding(labels, target, monkeypatch):
    """One fold that fails for one embedding leaves it without a mean, not with a mean over the others."""
    seen = []

    def fails_once(labels_S, predicted_S):
        seen.append(None)
        if len(seen) == 2:
            raise ValueError("no such luck")
        return agreement(labels_S, predicted_S)

    monkeypatch.setattr(annotation, "agreement", fails_once)
    rows = [r for r in score(labels_embedding(labels, 0), target) if r["regime"] == "zero_shot"]
    assert [r["value"] for r in rows if r["metric"] == "macro_f1"] == [1.0, None, 1.0, None]
    assert {r["reason"] for r in rows if r["split"] == "mean"} == {"ValueError: no such luck"}


def test_a_fold_that_nobody_can_score_is_not_in_the_mean(cells, labels):
    obs = cells.obs.copy()
    obs["cell_type"] = np.where(obs["batch"] == "human1_lib1", "only here", labels)
    target = Target(obs, "cell_type", "batch", 10, None)
    x_NE = labels_embedding(obs["cell_type"].to_numpy(), 0)
    rows = [r for r in score(x_NE, target) if r["regime"] == "zero_shot"]
    fold, *_, mean = (r for r in rows if r["metric"] == "accuracy")
    assert (fold["value"], fold["reason"]) == (None, "none of the batch's cell types is in another batch")
    assert (mean["split"], mean["value"], mean["reason"]) == ("mean", 1.0, None)
    assert mean["n"] == (target.batches_N != "human1_lib1").sum()


def test_missing_columns_and_labels(cells):
    with pytest.raises(CellmillError, match="no column 'louvain' for the cell types; take one of cell_type"):
        target_of(cells, label="louvain")
    with pytest.raises(CellmillError, match="no column 'donor' for the batches"):
        target_of(cells, batch="donor")
    with pytest.raises(CellmillError, match="no cell type with at least 1000 cells"):
        target_of(cells, min_cells=1000)


def test_tasks_by_name(tmp_path, monkeypatch):
    assert tasks() == ["annotation", "integration"]
    assert load_task("annotation") is Annotation
    with pytest.raises(CellmillError, match="task 'anotation' is unknown; take one of annotation, integration"):
        load_task("anotation")
    (tmp_path / "mine_tasks").mkdir()
    (tmp_path / "mine_tasks" / "own.py").write_text("from cellmill.tasks.annotation import Annotation as TASK\n")
    (tmp_path / "mine_tasks" / "empty.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_task("mine_tasks.own") is Annotation
    with pytest.raises(CellmillError, match="sets no TASK"):
        load_task("mine_tasks.empty")
    with pytest.raises(CellmillError, match="cannot be imported"):
        load_task("mine_tasks.none")
    sys.modules.pop("mine_tasks", None)


def test_score_embeddings_from_shards(data, cells, labels, tmp_path, capsys):
    batch, obs = real_cells(data, "baron_h1")
    folder = write_shards(tmp_path / "shards", {"all": (batch, obs)}, n_genes=cells.n_vars, cells_per_shard=900)
    read = to_anndata(Shards(folder), "all")
    assert (read.X != cells.X).nnz == 0
    assert (read.obs["total_counts"].to_numpy() == cells.obs["total_counts"].to_numpy()).all()

    np.save(tmp_path / "x.npy", labels_embedding(labels, 0))
    section = SimpleNamespace(label="cell_type", batch="library", min_cells_per_label=10)
    known = {"kind": "control", "seen": "no", "checkpoint": None, "seconds": 1.0}
    pairs = [(tmp_path / "x.npy", known | {"model": "labels", "seed": seed}) for seed in (0, 1)]
    made_by = {"run": "r", "code_version": "v", "commit": "c", "config_hash": "h"}
    rows = score_embeddings(Annotation, Settings(), "baron", pairs, folder, section, made_by)
    assert len(rows) == 64
    assert {(r["task"], r["dataset"], r["model"], r["kind"], r["value"]) for r in rows} == {
        ("annotation", "baron", "labels", "control", 1.0)
    }
    said = capsys.readouterr().err
    assert "15 of 1937 cells are left out: mast 8, schwann 5, t_cell 2" in said
    assert "labels, seed 1: 32 scores" in said

    np.save(tmp_path / "short.npy", np.zeros((5, 3), np.float32))
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(CellmillError, match=r"shape \(5, 3\), but the benchmark's shards hold 1937 cells"):
        read_embedding(tmp_path / "short.npy", 1937)
    for name in ("broken", "missing"):
        with pytest.raises(CellmillError, match="cannot be read as an embedding"):
            read_embedding(tmp_path / f"{name}.npy", 1937)
