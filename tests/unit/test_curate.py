"""Blocks of the demo Census: the same cells as a slow and plain way gives, and what is said when something is wrong."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anndata
import cellxgene_census
import corpus_runs
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiledbsoma as soma
from cellmill.census.vocabulary import is_ribosomal
from cellmill.config import AssayQuality, Quality
from cellmill.errors import CellmillError
from cellmill.fingerprints import GROUPS, PRINTS, comparable_groups, comparable_prints, fingerprints, gene_keys
from cellmill.shards import curate, kernels
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import encode_cells
from cellmill.shards.order import Order
from cellmill.shards.shuffle import read_block
from cellmill.vocabulary import Vocabulary
from corpus_runs import PANCREAS, corpus
from scipy.sparse import csr_matrix

MITO = Quality(max_mito_fraction=0.1)
LAX = Quality(min_counts=0, min_genes=0, max_mito_fraction=1.0, max_mads=None)
SUFFIXES = (".parquet", ".qc.parquet", ".prints.parquet")


@pytest.fixture(scope="module")
def census(demo_census) -> anndata.AnnData:
    """All cells of the demo Census, by plain cellxgene_census; row number = soma_joinid."""
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as opened:
        cells = cellxgene_census.get_anndata(opened, "homo_sapiens")
    cells.X = csr_matrix(cells.X, dtype=np.int64)
    return cells


@pytest.fixture(scope="module")
def planned(demo_census, tmp_path_factory) -> Path:
    """A plan of all cells of the Census in one block, and the vocabulary."""
    folder = tmp_path_factory.mktemp("planned")
    selection = corpus(quality=LAX, blocks=1)
    corpus_runs.plan(demo_census.soma, folder, selection, benchmarks={})
    corpus_runs.vocabulary(demo_census.soma, folder, selection)
    return folder


@pytest.fixture
def run(demo_census, planned, tmp_path):
    """A function that curates the planned cells with a quality, and returns the folder."""
    shutil.copy(planned / "plan.parquet", tmp_path)
    shutil.copy(planned / "plan.json", tmp_path)

    def curated(quality: Quality = LAX, **more) -> Path:
        genes = planned / "vocabulary.parquet"
        corpus_runs.curate(demo_census.soma, tmp_path, 0, corpus(quality=quality), genes, **more)
        return tmp_path

    return curated


def cells_of(folder: Path, block: int = 0):
    """The cells of a block in the order of joinids, and their metadata."""
    order = Order(**json.loads((folder / "plan.json").read_text())["order"])
    cells, obs = read_block(folder / f"{block}.parquet", order)
    rows = np.argsort(cells.joinids)
    return cells.take(rows), obs.take(rows)


def qc_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "0.qc.parquet").set_index("soma_joinid")


def share(cells: anndata.AnnData, is_kind: np.ndarray) -> np.ndarray:
    """Share of counts in some genes, over all genes of the Census."""
    return np.asarray(cells.X[:, is_kind].sum(axis=1) / cells.X.sum(axis=1)).ravel()


@pytest.mark.parametrize("is_ascending", [False, True])
@pytest.mark.parametrize(("tile", "nonzeros"), [(2048, 10**7), (2048, 1), (200, 400_000)])
def test_cells_are_those_of_a_plain_matrix(run, planned, census, monkeypatch, is_ascending, tile, nonzeros):
    monkeypatch.setattr(curate, "TILE", tile)
    monkeypatch.setattr(curate, "NONZEROS_PER_READ", nonzeros)
    monkeypatch.setattr(curate, "CELLS_PER_OBS_READ", 3 * tile)  # what several reads need, and not all cells
    genes = Vocabulary.read(planned / "vocabulary.parquet")
    if not is_ascending:  # as the genes of a Census whose var is in another order
        genes = Vocabulary(genes.table.take(np.random.default_rng(0).permutation(len(genes))))
        monkeypatch.setattr(curate.Vocabulary, "read", lambda path: genes)
    column_of = pd.Series(np.arange(census.n_vars), index=census.var["feature_id"])
    columns = column_of[genes.feature_ids].to_numpy()
    assert (np.diff(columns) > 0).all() == is_ascending

    folder = run()
    cells, obs = cells_of(folder)
    assert cells.joinids.tolist() == census.obs["soma_joinid"].tolist()
    counts = csr_matrix((cells.counts, cells.genes, cells.offsets), shape=(len(cells), len(genes)))
    assert counts.has_sorted_indices
    assert (counts != census.X[:, columns]).nnz == 0
    assert counts.nnz == census.X[:, columns].nnz > 100_000
    assert (cells.totals == census.X.sum(axis=1).A1).all()
    for name in ("dataset_id", "cell_type", "assay", "donor_id", "library", "suspension_type"):
        assert obs[name].to_pylist() == census.obs[name].tolist()
    assert obs["n_measured_genes"].to_pylist() == census.obs["n_measured_vars"].tolist()

    qc = qc_of(folder)
    assert qc.index.tolist() == census.obs["soma_joinid"].tolist()
    assert (qc["nnz"] == np.diff(census.X.indptr)).all()
    assert (qc["raw_sum"] == cells.totals).all()
    assert qc["assay"].tolist() == census.obs["assay"].tolist()
    assert qc["removed_by"].isna().all()
    assert qc["doublet_score"].isna().all()


def test_shares_are_over_all_genes(run, census):
    qc = qc_of(run())
    names = census.var["feature_name"].astype(str)
    is_mito = names.str.startswith("MT-").to_numpy()
    assert set(census.var["feature_type"][is_mito]) > {"protein_coding"}  # the ribosomal ones are not in the vocabulary
    is_ribo = is_ribosomal(pa.array(names))
    blood = (census.obs["dataset_id"] == "celltypist_blood").to_numpy()
    assert np.allclose(qc["mito_fraction"][blood], share(census, is_mito)[blood], rtol=1e-12)
    assert np.allclose(qc["ribo_fraction"][blood], share(census, is_ribo)[blood], rtol=1e-12)
    assert qc["ribo_fraction"][blood].mean() > 0.1
    # the pancreas data set lacks the genes of mitochondria: not measured is not zero
    assert qc["mito_fraction"][qc["dataset_id"] == "baron_pancreas"].isna().all()


def test_rules_in_order_with_thresholds_of_assays(run, planned, census, tmp_path):
    joinids = census.obs["soma_joinid"].to_numpy()
    score = np.where(joinids % 7 == 0, np.nan, joinids % 10 / 10)
    halves = np.array_split(np.random.default_rng(0).permutation(len(joinids)), 2)
    for number, half in enumerate(map(np.sort, halves)):
        table = {"soma_joinid": joinids[half], "doublet_score": pa.array(score[half], from_pandas=True)}
        pq.write_table(pa.table(table), tmp_path / f"scores{number}.parquet")
    quality = Quality(
        max_mito_fraction=0.04,
        max_ribo_fraction=0.3,
        max_doublet_score=0.6,
        per_assay={"inDrop": AssayQuality(max_ribo_fraction=0.15), "unknown": AssayQuality(max_mito_fraction=0.05)},
    )
    folder = run(quality, doublets=(tmp_path / "scores0.parquet", tmp_path / "scores1.parquet"))
    qc = qc_of(folder)
    assert np.array_equal(qc["doublet_score"], score, equal_nan=True)
    mito_limit = np.where(qc["assay"] == "unknown", 0.05, 0.04)
    ribo_limit = np.where(qc["assay"] == "inDrop", 0.15, 0.3)
    expected = np.select(
        [qc["mito_fraction"] > mito_limit, qc["ribo_fraction"] > ribo_limit, qc["doublet_score"] > 0.6],
        ["max_mito_fraction", "max_ribo_fraction", "max_doublet_score"],
        "kept",
    )
    assert qc["removed_by"].fillna("kept").tolist() == expected.tolist()
    removed = set(zip(qc["dataset_id"], expected, strict=True))
    assert {rule for data_set, rule in removed if data_set == "celltypist_blood"} == {*expected}
    assert ("baron_pancreas", "max_ribo_fraction") in removed
    cells, _ = cells_of(folder)
    assert cells.joinids.tolist() == qc.index[expected == "kept"].tolist()
    assert pq.read_table(folder / "0.prints.parquet")["soma_joinid"].to_pylist() == cells.joinids.tolist()


def test_prints_are_those_of_the_kept_cells(run, planned, census, demo_census):
    folder = run(MITO)
    cells, obs = cells_of(folder)
    assert 0 < len(cells) < census.n_obs
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as opened:
        presence = cellxgene_census.get_presence_matrix(opened, "homo_sapiens").toarray().astype(bool)
        data_sets = opened["census_info"]["datasets"].read().concat().to_pandas().set_index("dataset_id")["soma_joinid"]
    genes = Vocabulary.read(planned / "vocabulary.parquet")
    columns = pd.Series(np.arange(census.n_vars), index=census.var["feature_id"])[genes.feature_ids].to_numpy()
    measured = {name: presence[row, columns] for name, row in data_sets.items()}
    comparable = comparable_groups(genes.group_V, measured)
    expected = fingerprints(
        cells, genes.group_V, np.array([comparable[name] for name in obs["dataset_id"].to_pylist()])
    )
    prints = pq.read_table(folder / "0.prints.parquet")
    assert np.array_equal(np.column_stack([prints[name].to_numpy() for name in PRINTS]), expected)
    assert (expected > 0).any(axis=1).mean() > 0.5
    assert prints["dataset_id"].to_pylist() == obs["dataset_id"].to_pylist()
    source = census.obs["observation_joinid"].astype(str).to_numpy()
    assert prints["observation_joinid"].to_pylist() == source[cells.joinids].tolist()


@pytest.mark.parametrize("row_group", [137, 10**6])
def test_reads_cover_all_cells_and_end_at_tiles(tmp_path, monkeypatch, row_group):
    monkeypatch.setattr(curate, "NONZEROS_PER_READ", 60_000)
    monkeypatch.setattr(curate, "TILE", 64)
    random = np.random.default_rng(0)
    joinids = np.flatnonzero(random.random(20_000) < 0.3)
    nnz = np.where(joinids // 64 == 150, 9000, random.integers(1, 3000, len(joinids)))
    block = (np.arange(len(joinids)) * 3 // len(joinids)).astype(np.int32)
    split = pa.array(np.where(joinids % 5 == 0, "validation", "train")).dictionary_encode()
    plan = pa.table({"soma_joinid": joinids, "split": split, "block": block, "nnz": nnz})
    pq.write_table(plan, tmp_path / "plan.parquet", row_group_size=row_group)
    reads = list(curate._reads(tmp_path / "plan.parquet", 1))
    assert (
        pa.concat_tables(reads)
        .unify_dictionaries()
        .equals(plan.filter(pc.equal(plan["block"], 1)).drop_columns("block").unify_dictionaries())
    )
    tiles = [read["soma_joinid"].to_numpy() // 64 for read in reads]
    assert all(one[-1] < two[0] for one, two in zip(tiles, tiles[1:], strict=False))
    nonzeros = [read["nnz"].to_numpy().sum() for read in reads]
    assert [len(set(tile)) for tile, n in zip(tiles, nonzeros, strict=True) if n > 60_000] == [1]
    assert all(one + two > 60_000 for one, two in zip(nonzeros, nonzeros[1:], strict=False))
    assert list(curate._reads(tmp_path / "plan.parquet", 3)) == []


def test_sparse_plans_read_by_points(run, planned, tmp_path):
    """One cell in five: the read names joinids instead of a range, and gives the same cells."""
    every, _ = cells_of(run())
    plan = pq.read_table(planned / "plan.parquet")
    pq.write_table(plan.take(np.arange(0, len(plan), 5)), tmp_path / "plan.parquet")
    cells, _ = cells_of(run())
    assert len(cells) == -(-len(plan) // 5)
    expected = every.take(np.flatnonzero(np.isin(every.joinids, cells.joinids)))
    for field in ("joinids", "offsets", "genes", "counts", "totals"):
        assert np.array_equal(getattr(cells, field), getattr(expected, field))


def test_a_block_without_cells(run, planned, tmp_path):
    plan = pq.read_table(planned / "plan.parquet")
    blocks = pa.array(np.ones(len(plan), np.int32))
    pq.write_table(plan.set_column(plan.column_names.index("block"), "block", blocks), tmp_path / "plan.parquet")
    content = json.loads((planned / "plan.json").read_text())
    content["blocks"] = [{**content["blocks"][0], "cells": 0, "nonzeros": 0, "joinids": None}]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    folder = run()
    assert len(cells_of(folder)[0]) == len(qc_of(folder)) == pq.read_metadata(folder / "0.prints.parquet").num_rows == 0


@pytest.fixture
def tampered(demo_census, planned, tmp_path):
    """A copy of the demo Census, and a function that changes one stored count of a planned cell."""
    copy = tmp_path / "soma"
    shutil.copytree(demo_census.soma, copy)
    for name in ("plan.parquet", "plan.json"):
        shutil.copy(planned / name, tmp_path)
    joinid = 2000

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
        (lambda count: float("inf"), r"has a count of inf in X\['raw'\]"),
        (lambda count: 2.0**31, r"has a count of 2.14748e\+09 in X\['raw'\]; .* below 2\^31"),
        (lambda count: count + 1, r"obs says \d+ counts in \d+ genes, X\['raw'\] holds \d+ in \d+; build"),
    ],
)
def test_faulty_counts_name_the_data_set_and_cell(planned, tampered, to, said):
    folder, change = tampered
    joinid = change(to)
    with pytest.raises(CellmillError, match=rf"data set celltypist_blood, cell {joinid} \(soma_joinid\).*{said}"):
        corpus_runs.curate(folder / "soma", folder, 0, corpus(), planned / "vocabulary.parquet")
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.parquet", "soma"]


def test_a_stored_zero_is_no_gene(planned, tampered):
    folder, change = tampered
    joinid = change(lambda _: 0)  # the array holds it beside the count
    corpus_runs.curate(folder / "soma", folder, 0, corpus(quality=LAX), planned / "vocabulary.parquet")
    cells, _ = cells_of(folder)
    assert cells.joinids[joinid] == joinid
    assert cells.counts.min() == 1


def test_more_genes_than_obs_says_overflow_nothing():
    """A cell has the room that obs says; what does not fit is counted, and the cell after it stays whole."""
    state_BS = kernels.new_state(np.array([2, 1]))
    pairs = np.full(3, -1)
    stored = np.array([7, 7, 7, 7, 9]), np.array([0, 1, 2, 3, 2]), np.array([1, 2, 3, 4, 5], np.float32)
    code_of = kernels.codes(np.arange(4), np.full(4, kernels.PLAIN))
    assert kernels.gather(*stored, np.array([7, 9]), code_of, state_BS, pairs) == -1
    assert state_BS[:, kernels.NNZ].tolist() == [4, 1]
    assert state_BS[:, kernels.TOTAL].tolist() == [10, 5]
    assert pairs.tolist() == [0 << 32 | 1, 1 << 32 | 2, 2 << 32 | 5]


@pytest.mark.parametrize("is_ascending", [False, True])
def test_packed_as_by_the_format_itself(is_ascending):
    """Steps and counts around 255 and at their largest, empty cells, cells left out."""
    random = np.random.default_rng(0)
    lengths = np.array([3, 0, 700, 1, 0, 256, 5])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    genes = np.concatenate([np.sort(random.choice(65_536, n, replace=False)) for n in lengths])
    genes[:3], genes[-6:] = [0, 254, 509], [65_535, 1, 2, 256, 511, 65_535]
    counts = random.choice([1, 7, 254, 255, 256, 70_000, 2**31 - 1], len(genes))
    totals = np.array([counts[start:stop].sum() for start, stop in itertools.pairwise(offsets)])
    cells = CellBatch(np.arange(len(lengths)), offsets, genes, counts, totals)

    state_BS = kernels.new_state(lengths)
    first_B = state_BS[:, kernels.NEXT].copy()
    state_BS[:, kernels.NEXT] = state_BS[:, kernels.END]
    at = np.arange(len(genes)) if is_ascending else np.lexsort((random.random(len(genes)), cells.cell_of))
    pairs = (genes << 32 | counts)[at]
    rows = np.array([0, 1, 2, 3, 4, 6])
    n = lengths[rows].sum()
    made = [np.zeros(n, kind) for kind in (np.uint8, np.uint16, np.uint8, np.uint32)]
    ends = np.zeros((4, len(rows) + 1), np.int32)
    group_V = random.integers(-1, GROUPS, 65_536).astype(np.int8)
    key_V = gene_keys(group_V)
    prints, members = np.zeros((len(rows), GROUPS), np.uint64), np.zeros((len(rows), GROUPS), np.int32)
    room = np.zeros(65_536, np.int32)
    largest = kernels.pack(rows, first_B, state_BS, pairs, room, group_V, key_V, *made, ends, prints, members)

    kept = cells.take(rows)
    assert largest == 65_536
    for (name, expected), values, end in zip(encode_cells(kept).items(), made, ends, strict=True):
        data = values.tobytes()
        assert [data[start:stop] for start, stop in itertools.pairwise(end)] == expected.to_pylist(), name
    comparable = np.ones((len(rows), GROUPS), bool)
    assert np.array_equal(comparable_prints(prints, members, comparable), fingerprints(kept, group_V, comparable))
    assert (prints[2] > 0).all()


def test_a_plan_of_another_census_is_said(run, planned, tmp_path):
    plan = pq.read_table(planned / "plan.parquet")
    shifted = pa.array(plan["soma_joinid"].to_numpy() + 10**6)
    pq.write_table(plan.set_column(0, "soma_joinid", shifted), tmp_path / "plan.parquet")
    with pytest.raises(CellmillError, match="the plan names cells that this Census does not have"):
        run()


def test_extra_columns_that_the_census_lacks(run, tmp_path):
    with pytest.raises(CellmillError, match="census.extra_obs names 'librari', .*; did you mean 'library'"):
        run(extra_obs=("librari",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.parquet"]


@pytest.mark.parametrize("gone", ["census_data/homo_sapiens/ms/RNA/X/raw", "census_data/homo_sapiens/obs", "."])
def test_a_census_that_vanishes_in_mid_read(tampered, planned, monkeypatch, gone):
    folder, _ = tampered
    monkeypatch.setattr(curate, "TILE", 64)
    monkeypatch.setattr(curate, "NONZEROS_PER_READ", 1)
    monkeypatch.setattr(curate, "CELLS_PER_OBS_READ", 64)
    check, whole = curate._Cells.check, folder / "soma" / gone
    away = folder / "away"
    with monkeypatch.context() as once:
        once.setattr(curate._Cells, "check", lambda cells: away.exists() or whole.rename(away) and check(cells))
        with pytest.raises(CellmillError, match="soma could not be read to the end .* what is finished is kept"):
            corpus_runs.curate(folder / "soma", folder, 0, corpus(quality=LAX), planned / "vocabulary.parquet")
    assert not list(folder.glob("0.*"))
    away.rename(whole)
    corpus_runs.curate(folder / "soma", folder, 0, corpus(quality=LAX), planned / "vocabulary.parquet")
    assert len(cells_of(folder)[0]) == 3057


@pytest.fixture(scope="module")
def milled(demo_census, tmp_path_factory):
    """The corpus with a strict mitochondrial rule, from 2 blocks."""
    folder = tmp_path_factory.mktemp("two")
    corpus_runs.mill_corpus(demo_census.soma, folder, corpus(quality=MITO, blocks=2))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_number_of_blocks_and_reads_does_not_show(demo_census, milled, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "TILE", 16)
    monkeypatch.setattr(curate, "NONZEROS_PER_READ", 100_000)
    corpus_runs.mill_corpus(demo_census.soma, tmp_path, corpus(quality=MITO, blocks=5))
    assert files(tmp_path / "shards") == files(milled / "shards")
    assert len(files(tmp_path / "shards")) >= 6  # several files of train, one of validation, the manifest
    for table in ("qc.parquet", "qc_cells.parquet"):
        assert pq.read_table(tmp_path / table).to_pylist() == pq.read_table(milled / table).to_pylist()


def test_a_benchmark_keeps_the_order_of_joinids(demo_census, milled, tmp_path):
    selection = PANCREAS.model_copy(update={"quality": LAX.model_copy(update={"max_mito_fraction": 0.0})})
    corpus_runs.mill_benchmark(demo_census.soma, tmp_path, "pancreas", selection, milled / "vocabulary.parquet")
    obs = pd.concat([pd.read_parquet(path) for path in sorted((tmp_path / "shards").glob("all-*.parquet"))])
    assert obs["soma_joinid"].tolist() == list(range(1937))
    assert obs["library"].nunique() == 3
    assert (obs["organism"] == "homo_sapiens").all()


def test_no_cell_left_by_the_mitochondrial_rule(demo_census, tmp_path):
    selection = corpus(
        include={"dataset_id": ["celltypist_blood", "li_cell_lines"]}, quality=Quality(max_mito_fraction=0.0)
    )
    with pytest.raises(CellmillError, match=r"no cell of split '\w+' is left .*max_mito_fraction removed [\d,]+"):
        corpus_runs.mill_corpus(demo_census.soma, tmp_path, selection)
    assert not (tmp_path / "shards").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import corpus_runs
from cellmill.shards import curate

soma, folder, genes = (Path(word) for word in sys.argv[1:])
curate.TILE, curate.NONZEROS_PER_READ = 16, 50_000
check, calls = curate._Cells.check, []
def deadly(cells):
    calls.append(check(cells))
    if len(calls) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
curate._Cells.check = deadly
corpus_runs.curate(soma, folder, 0, corpus_runs.corpus(), genes)
"""


def test_a_killed_job_leaves_nothing_half_written(demo_census, milled, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(milled, folder)
    for suffix in SUFFIXES:
        (folder / f"0{suffix}").unlink()
    names, before = sorted(path.name for path in folder.iterdir()), files(folder / "shards")
    words = [demo_census.soma, folder, milled / "vocabulary.parquet"]
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], cwd=tests, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".tmp")) == names

    corpus_runs.curate(demo_census.soma, folder, 0, corpus(quality=MITO), milled / "vocabulary.parquet")
    corpus_runs.shuffle_and_join(folder, 2, milled / "vocabulary.parquet")
    assert files(folder / "shards") == before
    assert not list(folder.glob("*.tmp"))
