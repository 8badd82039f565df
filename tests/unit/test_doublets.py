"""Doublet scores on the demo's real cells, with doublets planted among them."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import tiledbsoma as soma
from cellmill import doublets
from cellmill.config import Census
from cellmill.doublets import score_doublets
from cellmill.errors import CellmillError
from cellmill.progress import Progress
from sklearn.metrics import roc_auc_score

HUMAN = "homo_sapiens"
N_PLANTED = 100


@pytest.fixture(scope="module")
def planted(demo_census, tmp_path_factory):
    """A copy of the demo's Census in which `N_PLANTED` Baron cells got the counts of a cell of another type on top.

    Returns the folder, the plan of all its cells, and the joinids of the planted ones.
    """
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(demo_census.soma, folder / "soma")
    with soma.open(str(folder / "soma")) as census:
        human = census["census_data"][HUMAN]
        obs = human.obs.read(column_names=["soma_joinid", "dataset_id", "author_cell_type", "nnz"]).concat().to_pandas()
        baron = obs[obs["dataset_id"] == "baron_pancreas"]
        rng = np.random.default_rng(0)
        first = rng.permutation(baron.index)
        second = rng.permutation(baron.index)
        types = obs["author_cell_type"].astype(str)
        mixed = np.flatnonzero(types[first].to_numpy() != types[second].to_numpy())[:N_PLANTED]
        first, second = first[mixed], second[mixed]
        X = human.ms["RNA"].X["raw"]
        uri = X.uri
        counts = X.read().coos().concat().to_scipy().tocsr()
    joinids = obs["soma_joinid"].to_numpy()
    sums = (counts[joinids[first]] + counts[joinids[second]]).tocoo()
    with soma.SparseNDArray.open(uri, "w") as X:
        columns = {"soma_dim_0": joinids[first][sums.row], "soma_dim_1": sums.col.astype(np.int64)}
        X.write(pa.table(columns | {"soma_data": sums.data.astype(np.float32)}))
    pq.write_table(pa.Table.from_pandas(obs[["soma_joinid", "nnz"]], preserve_index=False), folder / "plan.parquet")
    return folder / "soma", folder / "plan.parquet", joinids[first]


def scores(planted, out, *, blocks=1, seed=0, plan=None) -> dict[int, float | None]:
    """Score every block; the scores of all by joinid."""
    census, own, _ = planted
    found = {}
    for block in range(blocks):
        score_doublets(
            Census(source="local", path=str(census)),
            census,
            plan=plan or own,
            block=block,
            blocks=blocks,
            organism=HUMAN,
            seed=seed,
            out=out / f"{block}.parquet",
        )
        table = pq.read_table(out / f"{block}.parquet")
        assert table.schema.equals(doublets.SCHEMA)
        joinids = table["soma_joinid"].to_pylist()
        assert joinids == sorted(joinids)
        assert not found.keys() & set(joinids)
        found |= dict(zip(joinids, table["doublet_score"].to_pylist(), strict=True))
    return found


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    return scores(planted, tmp_path_factory.mktemp("scores"))


def test_planted_doublets_score_high(planted, whole):
    census, plan, doublet_ids = planted
    assert sorted(whole) == pq.read_table(plan)["soma_joinid"].to_pylist()
    with soma.open(str(census)) as opened:
        obs = opened["census_data"][HUMAN].obs.read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
    baron = obs[obs["dataset_id"] == "baron_pancreas"]["soma_joinid"].tolist()
    is_doublet = np.isin(baron, doublet_ids)
    assert is_doublet.sum() == N_PLANTED
    assert roc_auc_score(is_doublet, [whole[joinid] for joinid in baron]) > 0.8
    known = [score for score in whole.values() if score is not None]
    assert 0 <= min(known) <= max(known) <= 1


@pytest.mark.parametrize("blocks", [2, 3])
def test_scores_do_not_depend_on_the_number_of_blocks(planted, whole, tmp_path, blocks):
    assert scores(planted, tmp_path, blocks=blocks) == whole


def test_another_seed_simulates_other_doublets(planted, whole, tmp_path):
    other = scores(planted, tmp_path, seed=1)
    assert other.keys() == whole.keys()
    assert other != whole


def test_small_groups_have_no_score_and_the_log_says_so(planted, whole, tmp_path, capsys):
    """The first 50 cells of the plan: fewer than scrublet can simulate from."""
    table = pq.read_table(planted[1]).slice(0, 50)
    pq.write_table(table, tmp_path / "plan.parquet")
    found = scores(planted, tmp_path, plan=tmp_path / "plan.parquet")
    assert list(found) == table["soma_joinid"].to_pylist()
    assert set(found.values()) == {None}
    assert "no scores for data set baron_pancreas, donor" in capsys.readouterr().err


def test_large_groups_are_cut(monkeypatch):
    joinids = np.arange(10, 1510)
    group = doublets.Group("g", joinids, nonzeros=1500 * 2000)
    assert [part.tolist() for part in group.pieces()] == [joinids.tolist()]
    for limit, value in (("MAX_CELLS", 400), ("MAX_NONZEROS", 800_000)):
        with monkeypatch.context() as patch:
            patch.setattr(doublets, limit, value)
            pieces = group.pieces()
        assert [len(part) for part in pieces] == [375] * 4
        assert sorted(np.concatenate(pieces)) == joinids.tolist()
        assert all((np.diff(part) > 0).all() for part in pieces)
        assert all(np.ptp(part) > 1400 for part in pieces), "a piece is a sample of the whole group"


def test_cut_groups_are_scored_whole(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(doublets, "MAX_CELLS", 700)
    one = scores(planted, tmp_path)
    assert scores(planted, tmp_path, blocks=2) == one
    assert sum(score is not None for score in one.values()) > 2500


def test_scrublets_failure_is_said(planted, capsys):
    """Five genes have fewer than the 30 components that scrublet wants."""
    with soma.open(str(planted[0])) as census:
        X = census["census_data"][HUMAN].ms["RNA"].X["raw"]
        counts = doublets._read_counts(X, np.arange(150), X.shape[1])
    five = np.argsort(-counts.getnnz(axis=0))[:5]
    found = doublets._scrublet(sp.csr_matrix(counts[:, five]), 0, "data set D, donor H", Progress("doublets", 150))
    assert np.isnan(found).all()
    assert "warning: no scores for data set D, donor H: scrublet fails on its 150 cells" in capsys.readouterr().err


def test_plan_of_another_census(planted, tmp_path):
    pq.write_table(pa.table({"soma_joinid": [1, 2, 10_000_000], "nnz": [5, 5, 5]}), tmp_path / "plan.parquet")
    with pytest.raises(CellmillError, match="plan the selection anew"):
        scores(planted, tmp_path, plan=tmp_path / "plan.parquet")
