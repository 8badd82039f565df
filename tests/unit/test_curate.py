"""Blocks of the demo Census and the shards that they become."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cellxgene_census
import corpus_runs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiledbsoma as soma
from cellmill.config import Quality, Splits
from cellmill.errors import CellmillError
from cellmill.shards import assemble, curate
from cellmill.shards.dataset import Shards
from cellmill.shards.reader import read_shard
from cellmill.shards.writer import ShardWriter
from corpus_runs import PANCREAS, corpus

MITO = Quality(max_mito_fraction=0.1)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def milled(demo_census, tmp_path_factory):
    """The corpus with a strict mitochondrial rule, from 2 blocks."""
    folder = tmp_path_factory.mktemp("two")
    corpus_runs.mill_corpus(demo_census.soma, folder, corpus(quality=MITO, blocks=2))
    return folder


def test_the_number_of_blocks_does_not_show(demo_census, milled, tmp_path):
    corpus_runs.mill_corpus(demo_census.soma, tmp_path, corpus(quality=MITO, blocks=5))
    assert files(tmp_path / "shards") == files(milled / "shards")
    assert len(files(tmp_path / "shards")) >= 6  # several files of train, one of validation, the manifest
    for table in ("qc.parquet", "qc_cells.parquet"):
        assert (tmp_path / table).read_bytes() == (milled / table).read_bytes()


def test_mitochondrial_share_is_over_all_genes(demo_census, milled):
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        blood = cellxgene_census.get_anndata(
            census, "homo_sapiens", obs_value_filter="dataset_id == 'celltypist_blood'"
        )
    is_mito = blood.var["feature_name"].str.startswith("MT-").to_numpy()
    assert set(blood.var["feature_type"][is_mito]) > {"protein_coding"}  # the ribosomal ones are not in the vocabulary
    x = blood.X.astype(np.float64)
    share = np.asarray(x[:, is_mito].sum(axis=1) / x.sum(axis=1)).ravel()
    cells = pd.read_parquet(milled / "qc_cells.parquet").set_index("soma_joinid")
    cells = cells[cells["dataset_id"] == "celltypist_blood"]
    share = pd.Series(share, index=blood.obs["soma_joinid"])[cells.index]
    assert np.allclose(cells["mito_fraction"], share, rtol=1e-12)
    assert ((cells["removed_by"] == "max_mito_fraction") == (share > 0.1)).all()

    table = pd.read_parquet(milled / "qc.parquet").set_index(["dataset_id", "rule"])
    assert table.loc[("celltypist_blood", "max_mito_fraction"), "removed"] == (share > 0.1).sum() > 0
    kept = pd.concat([Shards(milled / "shards").obs(split).to_pandas() for split in ("train", "validation")])
    assert len(kept) == cells["removed_by"].isna().sum() + (kept["dataset_id"] == "li_cell_lines").sum()
    remaining = table["remaining"].groupby("dataset_id").last()
    assert remaining.sum() == len(kept)


def test_an_unmeasured_share_is_null_and_removes_nothing(demo_census, milled, tmp_path):
    selection = PANCREAS.model_copy(update={"quality": Quality(max_mito_fraction=0.0, min_counts=1, min_genes=1)})
    corpus_runs.mill_benchmark(demo_census.soma, tmp_path, "pancreas", selection, milled / "vocabulary.parquet")
    cells = pd.read_parquet(tmp_path / "qc_cells.parquet")
    assert len(cells) == 1937
    assert cells["mito_fraction"].isna().all()
    assert Shards(tmp_path / "shards").n_cells("all") == 1937


def test_a_benchmark_keeps_the_order_of_joinids_a_corpus_does_not(demo_census, milled, tmp_path):
    corpus_runs.mill_benchmark(demo_census.soma, tmp_path, "pancreas", PANCREAS, milled / "vocabulary.parquet")
    joinids = Shards(tmp_path / "shards").obs("all")["soma_joinid"].to_numpy()
    assert (np.diff(joinids) > 0).all()
    obs = Shards(tmp_path / "shards").obs("all").to_pandas()
    assert obs["library"].nunique() == 3
    assert (obs["organism"] == "homo_sapiens").all()

    train = Shards(milled / "shards").obs("train").to_pandas()
    assert not train["soma_joinid"].is_monotonic_increasing
    # well mixed: both data sets in every tenth of the order
    tenth = np.arange(len(train)) * 10 // len(train)
    assert (train.groupby(tenth)["dataset_id"].nunique() == 2).all()


def test_the_seed_moves_the_cells_and_nothing_else(milled, tmp_path):
    shutil.copytree(milled, tmp_path / "again")
    corpus_runs.join(tmp_path / "again", 2, milled / "vocabulary.parquet", seed=1)
    one, two = Shards(milled / "shards").obs("train"), Shards(tmp_path / "again" / "shards").obs("train")
    assert one["soma_joinid"].to_pylist() != two["soma_joinid"].to_pylist()
    assert one.sort_by("soma_joinid").to_pylist() == two.sort_by("soma_joinid").to_pylist()


def test_reads_cover_all_cells_and_end_at_tiles(monkeypatch):
    monkeypatch.setattr(curate, "CELLS_PER_READ", 100)
    monkeypatch.setattr(curate, "TILE", 64)
    joinids = np.flatnonzero(np.random.default_rng(0).random(5000) < 0.3)
    reads = curate._reads(joinids)
    assert [start for start, _ in reads[1:]] == [stop for _, stop in reads[:-1]]
    assert (reads[0][0], reads[-1][1]) == (0, len(joinids))
    assert all(stop - start <= 100 + 64 for start, stop in reads)
    assert all(joinids[stop - 1] // 64 < joinids[stop] // 64 for _, stop in reads[:-1])
    assert curate._reads(joinids[:0]) == []


def test_a_block_does_not_depend_on_how_it_is_read(demo_census, milled, tmp_path, monkeypatch):
    shutil.copy(milled / "plan.parquet", tmp_path)
    monkeypatch.setattr(curate, "CELLS_PER_READ", 50)
    monkeypatch.setattr(curate, "TILE", 16)
    selection = corpus(quality=MITO)
    corpus_runs.curate(demo_census.soma, tmp_path, 0, selection, milled / "vocabulary.parquet")
    assert (tmp_path / "0.parquet").read_bytes() == (milled / "0.parquet").read_bytes()


def test_sparse_plans_read_by_points(demo_census, milled, tmp_path):
    """One cell in five: the read names joinids instead of a range, and gives the same cells."""
    plan = pq.read_table(milled / "plan.parquet")
    sparse = plan.take(np.arange(0, len(plan), 5))
    pq.write_table(sparse.filter(pa.compute.equal(sparse["block"], 0)), tmp_path / "plan.parquet")
    corpus_runs.curate(demo_census.soma, tmp_path, 0, corpus(), milled / "vocabulary.parquet")
    cells, _ = read_shard(tmp_path / "0.parquet")
    shutil.copy(milled / "plan.parquet", tmp_path)
    corpus_runs.curate(demo_census.soma, tmp_path, 0, corpus(), milled / "vocabulary.parquet")
    every, _ = read_shard(tmp_path / "0.parquet")
    expected = every.take(np.flatnonzero(np.isin(every.joinids, cells.joinids)))
    for field in ("joinids", "offsets", "genes", "counts", "totals"):
        assert np.array_equal(getattr(cells, field), getattr(expected, field))


def test_blocks_without_cells(demo_census, milled, tmp_path):
    """A block may be empty (more blocks than cells), and the shards do not mind."""
    plan = pq.read_table(milled / "plan.parquet")
    blocks = pa.array(plan["block"].to_numpy() * 2)
    pq.write_table(plan.set_column(plan.column_names.index("block"), "block", blocks), tmp_path / "plan.parquet")
    shutil.copy(milled / "plan.json", tmp_path)
    for block in range(3):
        corpus_runs.curate(demo_census.soma, tmp_path, block, corpus(quality=MITO), milled / "vocabulary.parquet")
    assert pq.read_metadata(tmp_path / "1.parquet").num_rows == 0
    corpus_runs.join(tmp_path, 3, milled / "vocabulary.parquet")
    assert files(tmp_path / "shards") == files(milled / "shards")


@pytest.fixture
def tampered(demo_census, milled, tmp_path):
    """A copy of the demo Census, and a function that changes one stored count of a planned cell."""
    copy = tmp_path / "soma"
    shutil.copytree(demo_census.soma, copy)
    shutil.copy(milled / "plan.parquet", tmp_path)
    joinid = pq.read_table(milled / "plan.parquet")["soma_joinid"][5].as_py()

    def change(to) -> int:
        with soma.SparseNDArray.open(str(copy / "census_data/homo_sapiens/ms/RNA/X/raw")) as x:
            first = x.read((joinid,)).tables().concat().slice(0, 1)
        values = pa.array([to(first["soma_data"][0].as_py())], pa.float32())
        with soma.SparseNDArray.open(str(copy / "census_data/homo_sapiens/ms/RNA/X/raw"), "w") as x:
            x.write(first.set_column(first.column_names.index("soma_data"), "soma_data", values))
        return joinid

    return tmp_path, change


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (lambda count: count + 0.5, r"has a count of \d+\.5 in X\['raw'\]; counts must be raw"),
        (lambda count: -count, r"has a count of -\d+ in X\['raw'\]"),
        (lambda count: float("nan"), r"has a count of nan in X\['raw'\]"),
        (lambda count: count + 1, r"obs says \d+ counts in \d+ genes, X\['raw'\] holds \d+ in \d+; build"),
    ],
)
def test_faulty_counts_name_the_data_set_and_cell(milled, tampered, to, said):
    folder, change = tampered
    joinid = change(to)
    with pytest.raises(CellmillError, match=rf"data set celltypist_blood, cell {joinid} \(soma_joinid\).*{said}"):
        corpus_runs.curate(folder / "soma", folder, 0, corpus(), milled / "vocabulary.parquet")
    assert sorted(path.name for path in folder.iterdir()) == ["plan.parquet", "soma"]


def test_a_plan_of_another_census_is_said(demo_census, milled, tmp_path):
    plan = pq.read_table(milled / "plan.parquet")
    shifted = pa.array(plan["soma_joinid"].to_numpy() + 10**6)
    pq.write_table(plan.set_column(0, "soma_joinid", shifted), tmp_path / "plan.parquet")
    with pytest.raises(CellmillError, match="the plan names cells that this Census does not have"):
        corpus_runs.curate(demo_census.soma, tmp_path, 0, corpus(), milled / "vocabulary.parquet")


def test_no_cell_left_by_the_mitochondrial_rule(demo_census, tmp_path):
    selection = corpus(
        include={"dataset_id": ["celltypist_blood", "li_cell_lines"]}, quality=Quality(max_mito_fraction=0.0)
    )
    with pytest.raises(CellmillError, match=r"no cell of split '\w+' is left .*max_mito_fraction removed [\d,]+"):
        corpus_runs.mill_corpus(demo_census.soma, tmp_path, selection)
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "shards.tmp").exists()


def test_a_named_donor_that_the_mitochondrial_rule_empties(demo_census, tmp_path):
    """The plan cannot know: the shards are refused, and the donor is named."""
    selection = corpus(
        include={"donor_id": ["H1437", "K562", "A549"]},
        splits=Splits(validation=["H1437", "K562"]),
        blocks=1,
    )
    corpus_runs.plan(demo_census.soma, tmp_path, selection)
    corpus_runs.vocabulary(demo_census.soma, tmp_path, selection)
    corpus_runs.curate(demo_census.soma, tmp_path, 0, selection, tmp_path / "vocabulary.parquet")
    cells, obs = read_shard(tmp_path / "0.parquet")
    kept = np.flatnonzero(np.array(obs["donor_id"].to_pylist()) != "K562")
    with ShardWriter(tmp_path / "0.parquet") as writer:
        writer.write(cells.take(kept), obs.drop_columns(["soma_joinid", "total_counts", "n_genes"]).take(kept))
    with pytest.raises(CellmillError, match="the donor 'K562', which has no cell left after quality control"):
        corpus_runs.join(tmp_path, 1, tmp_path / "vocabulary.parquet")


def test_extra_columns_that_the_census_lacks(demo_census, tmp_path, milled):
    with pytest.raises(CellmillError, match="census.extra_obs names 'librari', .*; did you mean 'library'"):
        curate.curate_block(
            corpus_runs.census_of(demo_census.soma),
            demo_census.soma,
            plan=milled / "plan.parquet",
            block=0,
            vocabulary=milled / "vocabulary.parquet",
            organism=corpus_runs.ORGANISM,
            quality=MITO,
            extra_obs=["librari"],
            out=tmp_path / "0.parquet",
            qc=tmp_path / "0.qc.parquet",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_assembly_keeps_the_old_shards(milled, tmp_path, monkeypatch):
    shutil.copytree(milled, tmp_path / "run")
    before = files(tmp_path / "run" / "shards")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assemble, "write_manifest", fail)
    with pytest.raises(OSError, match="No space left"):
        corpus_runs.join(tmp_path / "run", 2, milled / "vocabulary.parquet", seed=3)
    assert files(tmp_path / "run" / "shards") == before
    assert not (tmp_path / "run" / "shards.tmp").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import corpus_runs
from cellmill.shards import assemble, curate

soma, folder, genes, step = (Path(word) for word in sys.argv[1:])
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if str(step) == "curate":
    curate.CELLS_PER_READ, curate.TILE = 50, 16
    read, calls = curate._Reader.read, []
    curate._Reader.read = lambda *given: die() if calls.append(0) or len(calls) > 3 else read(*given)
    corpus_runs.curate(soma, folder, 0, corpus_runs.corpus(), genes)
else:
    assemble.write_manifest = die
    corpus_runs.join(folder, 2, genes, seed=5)
"""


@pytest.mark.parametrize("step", ["curate", "assemble"])
def test_a_killed_job_leaves_nothing_half_written(demo_census, milled, tmp_path, step):
    folder = tmp_path / "run"
    shutil.copytree(milled, folder)
    if step == "curate":
        (folder / "0.parquet").unlink()
        (folder / "0.qc.parquet").unlink()
    names, before = sorted(path.name for path in folder.iterdir()), files(folder / "shards")
    words = [demo_census.soma, folder, milled / "vocabulary.parquet", step]
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], cwd=tests, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp")) == names
    assert files(folder / "shards") == before

    corpus_runs.curate(demo_census.soma, folder, 0, corpus(quality=MITO), milled / "vocabulary.parquet")
    corpus_runs.join(folder, 2, milled / "vocabulary.parquet")
    assert files(folder / "shards") == before
    assert not list(folder.glob("*.tmp"))
