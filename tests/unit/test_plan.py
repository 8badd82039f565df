"""The plan of a selection of the demo Census, against plain pandas over its obs."""

import errno
import json
import os
import shutil
from pathlib import Path

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiledbsoma as soma
from cellmill import qc
from cellmill.census import blocks as cutting
from cellmill.census.holdout import HoldOut
from cellmill.census.plan import plan_cells, show_plans
from cellmill.census.read import TILE, value_filter
from cellmill.census.scan import find_limits, limit_summary, scan_obs, settle
from cellmill.config import AssayQuality, Census, Corpus, Dataset, HeldOut, Quality, Splits
from cellmill.errors import CellmillError
from cellmill.shards.order import Order

PANCREAS = Dataset(include={"dataset_id": ["baron_pancreas"]}, batch="library")
STRICT = Quality(min_counts=3000, max_counts=4_000_000, min_genes=1500, max_mads=None)
LAX = Quality(min_counts=0, min_genes=0, max_mads=None)
LINES = "Fluidigm C1-based library preparation"


def corpus(**changes) -> Corpus:
    return Corpus(**{"splits": Splits(validation=["H1437", "K562"]), **changes})


def plan(census: Path, folder: Path, selection=None, name="corpus", *, benchmarks=None, blocks=2, **changes) -> dict:
    """Plan a selection into `folder`; a corpus holds out the pancreas, if nothing else is said."""
    if benchmarks is None:
        benchmarks = {"pancreas": PANCREAS} if name.startswith("corpus") else {}
    asked = {"organism": "homo_sapiens", "cells_per_shard": 200, "shuffle_seed": 7, **changes}
    return plan_cells(
        *(Census(source="local", path=str(census)), census, selection or corpus()),
        name=name,
        benchmarks=benchmarks,
        blocks=blocks,
        plan=folder / "plan.parquet",
        summary=folder / "plan.json",
        **asked,
    )


def removed(summary: dict) -> dict[tuple[str, str], int]:
    return {(row["dataset_id"], row["rule"]): row["removed"] for row in summary["qc"] if row["removed"]}


def read(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "plan.parquet")


@pytest.fixture(scope="module")
def obs(demo_census) -> pd.DataFrame:
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        return cellxgene_census.get_obs(census, "homo_sapiens")


@pytest.fixture
def census(demo_census, tmp_path) -> Path:
    """A copy of the demo Census to change."""
    return Path(shutil.copytree(demo_census.soma, tmp_path / "soma"))


def add_mice(census: Path, obs: pd.DataFrame) -> None:
    """Add the pancreas once more as an organism of its own: data set, donor and tissue by other names."""
    mice = obs[obs["dataset_id"] == "baron_pancreas"].astype({"dataset_id": str, "donor_id": str, "tissue": str})
    donors = [f"mouse{number % 2 + 1}" for number in range(len(mice))]
    mice = mice.assign(dataset_id="mice", donor_id=donors, tissue="islet", soma_joinid=range(len(mice)))
    table = pa.Table.from_pandas(mice, preserve_index=False)
    text = [pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]
    table = table.cast(pa.schema(text))
    with soma.open(str(census / "census_data"), "w") as organisms:
        experiment = organisms.add_new_collection("mus_musculus", soma.Experiment)
        frame = experiment.add_new_dataframe("obs", schema=table.schema, domain=[[0, len(mice) - 1]])
        frame.write(table)


def add_collections(census: Path, collections: dict[str, tuple[str, str, str]]) -> None:
    """Say of data sets which collection (id, name, DOI) they are of."""
    uri = str(census / "census_info" / "datasets")
    with soma.open(uri) as frame:
        datasets = frame.read().concat().to_pandas()
    for at, column in enumerate(("collection_id", "collection_name", "collection_doi")):
        datasets[column] = [collections.get(name, ("", "", ""))[at] for name in datasets["dataset_id"]]
    with soma.open(uri, "w") as frame:
        frame.write(pa.Table.from_pandas(datasets, frame.schema, preserve_index=False))


# --- rules ------------------------------------------------------------------------------------------------------------


def test_rules_split_and_held_out_cells(demo_census, obs, tmp_path):
    summary = plan(demo_census.soma, tmp_path, corpus(quality=STRICT))
    kept = obs[
        (obs["dataset_id"] != "baron_pancreas")
        & obs["is_primary_data"]
        & obs["raw_sum"].between(3000, 4_000_000)
        & (obs["nnz"] >= 1500)
    ]
    planned = read(tmp_path)
    assert planned["soma_joinid"].tolist() == kept["soma_joinid"].tolist()
    assert planned["dataset_id"].tolist() == kept["dataset_id"].tolist()
    assert planned["nnz"].tolist() == kept["nnz"].tolist()
    is_held_out = kept["donor_id"].isin(["H1437", "K562"]).to_numpy()
    assert ((planned["split"] == "validation").to_numpy() == is_held_out).all()

    assert summary == json.loads((tmp_path / "plan.json").read_text())
    assert summary["cells"] == len(kept)
    assert summary["nonzeros"] == kept["nnz"].sum()
    assert summary["mads"] == {}
    assert summary["held_out"] == {"pancreas": {"baron_pancreas": 1937}}
    assert summary["splits"]["validation"]["cells"] == is_held_out.sum()
    assert summary["splits"]["validation"]["donors"] == 2
    rows = pd.DataFrame(summary["qc"]).set_index(["dataset_id", "rule"])
    assert rows.loc[("baron_pancreas", "held_out"), "removed"] == 1937
    assert rows.loc[("li_cell_lines", "max_counts"), "removed"] == (obs["raw_sum"] > 4_000_000).sum() > 0
    blood = obs[obs["dataset_id"] == "celltypist_blood"]
    assert rows.loc[("celltypist_blood", "min_counts"), "removed"] == (blood["raw_sum"] < 3000).sum() > 0
    few_genes = (blood["raw_sum"] >= 3000) & (blood["nnz"] < 1500)
    assert rows.loc[("celltypist_blood", "min_genes"), "removed"] == few_genes.sum() > 0
    last = rows.groupby("dataset_id")["remaining"].last()
    assert last.to_dict() == {"baron_pancreas": 0} | kept["dataset_id"].astype(str).value_counts().to_dict()


def test_histograms_hold_kept_and_removed_cells(demo_census, obs, tmp_path):
    summary = plan(demo_census.soma, tmp_path, corpus(quality=STRICT))
    edges = np.array(summary["histograms"]["edges"])
    blood = obs[obs["dataset_id"] == "celltypist_blood"]
    too_few = blood["raw_sum"] < STRICT.min_counts
    kept = ~too_few & (blood["nnz"] >= STRICT.min_genes)
    for name, outcomes in summary["histograms"]["datasets"]["celltypist_blood"].items():
        for outcome, mask in (("kept", kept), ("min_counts", too_few), ("min_genes", ~too_few & ~kept)):
            expected = np.histogram(blood.loc[mask, name], edges)[0]
            assert outcomes[outcome] == {str(place): n for place, n in enumerate(expected) if n}
    pancreas = summary["histograms"]["datasets"]["baron_pancreas"]["nnz"]
    assert list(pancreas) == ["held_out"]
    assert sum(pancreas["held_out"].values()) == 1937


def outliers(obs: pd.DataFrame, max_mads: float) -> tuple[set[int], dict]:
    """Joinids that are far from their group's median, and the limits of each group, by numpy."""
    far, limits = set(), {}
    for group, cells in obs.groupby(["dataset_id", "assay"], observed=True):
        counts, genes = np.log1p(cells["raw_sum"].to_numpy()), np.log1p(cells["nnz"].to_numpy())
        for name, exact in zip(qc.MAD_QUANTITIES, (counts, genes, genes / counts), strict=True):
            values = np.round(exact, 4)
            median = np.median(values)
            mad = np.median(np.abs(values - median))
            far |= set(cells["soma_joinid"][np.abs(values - median) > max_mads * mad + 1e-9])
            limits[(*group, name)] = [median - max_mads * mad, median + max_mads * mad]
    return far, limits


def test_outliers_are_those_of_numpy(demo_census, obs, tmp_path):
    quality = Quality(min_counts=1000, min_genes=0, max_mads=3)
    summary = plan(demo_census.soma, tmp_path, corpus(quality=quality, splits=Splits()), benchmarks={})
    passed = obs[obs["raw_sum"] >= 1000]
    far, limits = outliers(passed, 3)
    assert read(tmp_path)["soma_joinid"].tolist() == [n for n in passed["soma_joinid"] if n not in far]
    said = {
        (dataset_id, assay, name): pair
        for dataset_id, by_assay in summary["mads"].items()
        for assay, by_name in by_assay.items()
        for name, pair in by_name.items()
    }
    assert said.keys() == limits.keys()
    for group, pair in limits.items():
        assert said[group] == pytest.approx(pair, abs=1e-6)
    by_data_set = passed[passed["soma_joinid"].isin(far)]["dataset_id"].astype(str).value_counts().to_dict()
    assert {key[0]: n for key, n in removed(summary).items() if key[1] == "max_mads"} == by_data_set
    assert len(by_data_set) == 3
    in_histograms = summary["histograms"]["datasets"]["li_cell_lines"]["nnz"]["max_mads"]
    assert sum(in_histograms.values()) == by_data_set["li_cell_lines"]


def test_thresholds_per_assay_and_tissue_types(demo_census, obs, tmp_path):
    own = {LINES: AssayQuality(min_counts=2_000_000)}
    quality = LAX.model_copy(update={"per_assay": own})
    found = plan(demo_census.soma, tmp_path, corpus(quality=quality, splits=Splits()), benchmarks={})
    low = (obs["assay"] == LINES) & (obs["raw_sum"] < 2_000_000)
    assert removed(found) == {("li_cell_lines", "min_counts"): low.sum()}

    quality = LAX.model_copy(update={"tissue_types": ["tissue"]})
    found = plan(demo_census.soma, tmp_path, corpus(quality=quality, splits=Splits()), benchmarks={})
    assert removed(found) == {("li_cell_lines", "tissue_types"): 561}


# --- how obs is streamed, and how work is cut -------------------------------------------------------------------------


class SlicedObs:
    """Cells as a stream of small tables, as a large Census gives them."""

    def __init__(self, obs: pd.DataFrame, rows: int):
        self.table = pa.Table.from_pandas(obs, preserve_index=False)
        self.rows = rows
        self.count = len(obs)

    def read(self, *, column_names, value_filter, result_order):
        assert value_filter is None
        assert result_order == "row-major"
        table = self.table.select(column_names)
        return (table.slice(start, self.rows) for start in range(0, len(table), self.rows))


def streamed(obs: pd.DataFrame, rows: int, folder: Path, max_mads: float, blocks: int):
    """The plan of `obs` in tables of `rows` cells: its bytes, blocks, limits and counts."""
    folder.mkdir(exist_ok=True)
    passed = folder / "passed"
    quality = LAX.model_copy(update={"max_mads": max_mads})
    hold_out = HoldOut(datasets=frozenset(["baron_pancreas"]))
    scan = scan_obs(SlicedObs(obs, rows), None, quality, [hold_out], passed)
    limits = find_limits(passed, len(scan.groups), max_mads)
    cells_U, nonzeros_U, edges = settle(passed, limits, scan)
    cuts = cutting.cut(edges, int(cells_U.sum() + nonzeros_U.sum()), blocks)
    planned, joinids = cutting.write_plan(
        *(passed, limits, folder / "plan.parquet"),
        units=scan.units,
        splits_U=["all"] * len(scan.units),
        cuts=cuts,
        cells_per_shard=100,
    )
    counts = {name: cells_QRE.tolist() for name, cells_QRE in scan.histograms.items()}
    return read(folder), planned, joinids, limit_summary(limits, scan.groups), counts


@pytest.mark.parametrize("mixed", [False, True])
def test_the_plan_does_not_depend_on_how_obs_is_streamed(obs, tmp_path, mixed):
    if mixed:  # cells of a data set that are no neighbours
        obs = obs.sample(frac=1, random_state=0).assign(soma_joinid=np.arange(len(obs)))
    whole = streamed(obs, len(obs), tmp_path / "whole", 4, 5)
    pieces = streamed(obs, 97, tmp_path / "pieces", 4, 5)
    pd.testing.assert_frame_equal(whole[0], pieces[0])
    assert whole[1:] == pieces[1:]
    assert len(whole[3]) == 2
    kept = obs[obs["dataset_id"] != "baron_pancreas"]
    far, _ = outliers(kept, 4)
    assert whole[0]["soma_joinid"].tolist() == [n for n in kept["soma_joinid"] if n not in far]
    assert whole[2] == [0, *whole[0]["soma_joinid"][100::100]]


def test_blocks_of_a_large_corpus_share_no_tile(obs, tmp_path):
    many = pd.concat([obs] * 100, ignore_index=True)
    many["soma_joinid"] = np.arange(len(many))
    planned, blocks, *_ = streamed(many, 50_000, tmp_path, None, 7)
    tiles = [set(cells // TILE) for _, cells in planned.groupby("block")["soma_joinid"]]
    assert sum(map(len, tiles)) == len(set().union(*tiles))
    sums = planned.groupby("block")["nnz"].sum()
    # each end of a block is at most half a tile from where it should be
    assert abs(sums - sums.mean()).max() <= planned.groupby(planned["soma_joinid"] // TILE)["nnz"].sum().max()
    assert [block["datasets"] for block in blocks] == [2] * 7


def test_small_blocks_cut_through_tiles(demo_census, tmp_path):
    summary = plan(demo_census.soma, tmp_path, corpus(), blocks=5)
    planned = read(tmp_path)
    assert (planned["block"].diff().dropna() >= 0).all()
    sums = planned.groupby("block")["nnz"].sum()
    assert len(sums) == 5
    assert sums.max() - sums.min() <= 2 * planned["nnz"].max()
    for block, (number, cells) in zip(summary["blocks"], planned.groupby("block"), strict=True):
        assert block["block"] == number
        assert block["cells"] == len(cells)
        assert block["nonzeros"] == cells["nnz"].sum()
        assert block["joinids"] == [cells["soma_joinid"].min(), cells["soma_joinid"].max()]
        assert block["datasets"] == cells["dataset_id"].nunique()


def test_cuts_by_hand():
    # tiles of 100 begin at these amounts of work; blocks of 250 may give way by 62
    edges = np.arange(0, 1000, 100)
    assert cutting.cut(edges, 1000, 4).tolist() == [300, 500, 800]
    assert cutting.cut(edges, 1000, 1).tolist() == []
    # blocks of 50 give way by 12, so that every second cut goes through a tile
    assert cutting.cut(edges, 1000, 20).tolist() == list(range(50, 1000, 50))
    assert cutting.cut(np.array([0, 110, 890]), 1000, 2).tolist() == [500]
    assert cutting.cut(np.array([0, 490, 890]), 1000, 2).tolist() == [490]


def test_more_blocks_than_cells_leaves_blocks_empty(demo_census, tmp_path):
    selection = corpus(include={"donor_id": ["IMR90", "H1437"]}, splits=Splits(validation=["H1437"]), quality=LAX)
    summary = plan(demo_census.soma, tmp_path, selection, blocks=200)
    assert sum(block["cells"] for block in summary["blocks"]) == 70
    empty = [block for block in summary["blocks"] if not block["cells"]]
    assert empty
    assert all(block["joinids"] is None and block["datasets"] == 0 for block in empty)


def test_the_order_of_shards(demo_census, tmp_path):
    summary = plan(demo_census.soma, tmp_path, corpus(quality=LAX))
    order = Order(**summary["order"])
    assert (order.by, order.seed) == ("hash", 7)
    cells = {split: row["cells"] for split, row in summary["splits"].items()}
    assert {split: len(edges) for split, edges in order.edges.items()} == {
        split: -(-n // 200) for split, n in cells.items()
    }
    train = read(tmp_path).query("split == 'train'")["soma_joinid"].to_numpy()
    per_shard = np.bincount(order.shard_of("train", order.keys(train)))
    assert len(per_shard) == len(order.edges["train"])
    assert abs(per_shard - per_shard.mean()).max() < 5 * np.sqrt(per_shard.mean())

    summary = plan(demo_census.soma, tmp_path, PANCREAS, "pancreas")
    order = Order(**summary["order"])
    joinids = read(tmp_path)["soma_joinid"].to_numpy()
    assert order.edges == {"all": [0, *joinids[200::200]]}
    assert np.bincount(order.shard_of("all", order.keys(joinids))).tolist() == [200] * 9 + [137]


def test_dense_shards_hold_fewer_cells_of_a_benchmark(demo_census, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "NONZEROS_PER_SHARD", 500_000)
    summary = plan(demo_census.soma, tmp_path, PANCREAS, "pancreas", cells_per_shard=10**6)
    assert len(summary["order"]["edges"]["all"]) == -(-summary["nonzeros"] // 500_000) == 8


def test_dense_shards_hold_fewer_cells():
    assert cutting.n_shards(65_537, 10**6, 65_536) == 2
    assert cutting.n_shards(65_536, 2**29 + 1, 65_536) == 5


def test_predictions_add_up(demo_census, tmp_path):
    one, five = (plan(demo_census.soma, tmp_path, corpus(), blocks=n) for n in (1, 5))
    assert one["nonzeros"] == five["nonzeros"]
    assert one["predicted"]["bytes"] == five["predicted"]["bytes"] == one["nonzeros"]
    assert five["predicted"]["memory_mb"] <= one["predicted"]["memory_mb"]
    for summary in (one, five):
        assert summary["predicted"]["seconds"] > sum(block["seconds"] for block in summary["blocks"])
        assert summary["predicted"]["memory_mb"] >= max(block["memory_mb"] for block in summary["blocks"])
    # memory of a block is bounded by the buffers, whatever it holds
    seconds = cutting.JOB_SECONDS + 1000 * cutting.CURATE_NS
    assert cutting.predict_block(10**12, 128) == {"seconds": seconds, "memory_mb": 450 + 400 + 5 * 128}


# --- what is read, and where the plan lies ----------------------------------------------------------------------------


def test_planning_reads_no_counts(census, tmp_path):
    shutil.rmtree(census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X")
    assert plan(census, tmp_path)["cells"] > 0


def test_a_full_disk_ends_in_one_sentence(demo_census, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(CellmillError, match="could not be written .No space left on device.; free space"):
        plan(demo_census.soma, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_same_plan_same_bytes(demo_census, tmp_path):
    for name in ("a", "b"):
        plan(demo_census.soma, tmp_path / name, corpus(), blocks=3)
    for file in ("plan.parquet", "plan.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["plan.json", "plan.parquet"]


def test_a_benchmark_is_one_split(demo_census, tmp_path):
    summary = plan(demo_census.soma, tmp_path, PANCREAS, "pancreas", blocks=1)
    assert summary["splits"] == {"all": {"cells": 1937, "nonzeros": summary["nonzeros"], "donors": 1}}
    assert len(summary["blocks"]) == 1
    assert summary["filter"] == "dataset_id in ['baron_pancreas']"
    assert summary["validation"] is None


def test_exclude_drops_terms(demo_census, obs, tmp_path):
    summary = plan(demo_census.soma, tmp_path, corpus(exclude={"donor_id": ["K562", "H1"]}, splits=Splits()))
    assert not obs.set_index("soma_joinid").loc[read(tmp_path)["soma_joinid"], "donor_id"].isin(["K562", "H1"]).any()
    assert summary["filter"] == value_filter({}, {"donor_id": ["H1", "K562"]})


# --- what never enters ------------------------------------------------------------------------------------------------


def test_a_data_set_is_held_out_as_a_whole(demo_census, tmp_path):
    acinar = {"acinar": Dataset(include={"cell_type": ["pancreatic acinar cell"]})}
    summary = plan(demo_census.soma, tmp_path, benchmarks=acinar)
    assert removed(summary)["baron_pancreas", "held_out"] == 1937
    assert summary["held_out"] == {"acinar": {"baron_pancreas": 1937}}
    assert "baron_pancreas" not in summary["datasets"]


def test_only_the_donors_of_a_benchmark(demo_census, obs, tmp_path):
    lines = {"lines": Dataset(include={"donor_id": ["A549", "H1"]}, hold_out="donor")}
    summary = plan(demo_census.soma, tmp_path, corpus(quality=LAX), benchmarks=lines)
    n = obs["donor_id"].isin(["A549", "H1"]).sum()
    assert summary["held_out"] == {"lines": {"li_cell_lines": n}}
    assert removed(summary) == {("li_cell_lines", "held_out"): n}
    planned = obs.set_index("soma_joinid").loc[read(tmp_path)["soma_joinid"]]
    assert set(planned["donor_id"]) == set(obs["donor_id"]) - {"A549", "H1"}


def test_a_donor_is_held_out_in_the_data_sets_of_the_benchmark_only():
    hold_out = HoldOut(pairs=frozenset([("a", "donor 1")]))
    assert hold_out.covers("a", "donor 1")
    assert not hold_out.covers("b", "donor 1")
    assert HoldOut(donors=frozenset(["donor 1"])).covers("b", "donor 1")


def test_a_collection_is_held_out_with_a_benchmark(census, tmp_path):
    pancreas = {"pancreas": PANCREAS.model_copy(update={"hold_out": "collection"})}
    # without collections, as in a private Census, the data set alone
    assert plan(census, tmp_path, benchmarks=pancreas)["held_out"] == {"pancreas": {"baron_pancreas": 1937}}
    atlas = ("c1", "An atlas", "10.1000/atlas.1")
    add_collections(census, {"baron_pancreas": atlas, "celltypist_blood": atlas})
    summary = plan(census, tmp_path, benchmarks=pancreas)
    assert summary["held_out"] == {"pancreas": {"baron_pancreas": 1937, "celltypist_blood": 559}}
    assert list(summary["datasets"]) == ["li_cell_lines"]


@pytest.mark.parametrize("name", ["c1", "An atlas", "10.1000/atlas.1", "https://doi.org/10.1000/ATLAS.1"])
def test_collections_held_out_by_name(census, tmp_path, name):
    add_collections(census, {"celltypist_blood": ("c1", "An atlas", "10.1000/atlas.1")})
    summary = plan(census, tmp_path, corpus(held_out=HeldOut(collections=[name])))
    assert summary["held_out"]["corpus.held_out"] == {"celltypist_blood": 559}
    assert removed(summary)["celltypist_blood", "held_out"] == 559


def test_data_sets_and_donors_held_out_by_name(demo_census, obs, tmp_path):
    held_out = HeldOut(datasets=["baron_pancreas"], donors=["A549"])
    summary = plan(demo_census.soma, tmp_path, corpus(held_out=held_out), benchmarks={})
    n = (obs["donor_id"] == "A549").sum()
    assert summary["held_out"] == {"corpus.held_out": {"baron_pancreas": 1937, "li_cell_lines": n}}


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ({"datasets": ["baron"]}, "corpus.held_out.datasets names 'baron', .* no such dataset; did you mean 'baron_p"),
        ({"donors": ["K526"]}, "corpus.held_out.donors names 'K526', .* no such donor; did you mean 'K562'"),
        ({"collections": ["An atlas"]}, "collections names 'An atlas', but the Census has no such collection; it has"),
    ],
)
def test_unknown_names_that_are_held_out(demo_census, tmp_path, held_out, said):
    with pytest.raises(CellmillError, match=said):
        plan(demo_census.soma, tmp_path, corpus(held_out=HeldOut(**held_out)))


# --- organisms --------------------------------------------------------------------------------------------------------


MICE = {"name": "corpus-mus_musculus", "benchmarks": {}, "organism": "mus_musculus"}


def test_one_config_for_two_organisms(census, obs, tmp_path):
    add_mice(census, obs)
    selection = corpus(
        organisms=["homo_sapiens", "mus_musculus"],
        include={"tissue": ["NCI-H1437", "K-562", "islet"]},
        splits=Splits(validation=["H1437", "mouse2"]),
    )
    human = plan(census, tmp_path / "human", selection)
    planned = obs.set_index("soma_joinid").loc[read(tmp_path / "human")["soma_joinid"]]
    assert set(planned["tissue"]) == {"NCI-H1437", "K-562"}
    assert human["validation"]["validation"] == ["H1437"]
    mice = plan(census, tmp_path / "mice", selection, **MICE)
    assert (mice["selection"], mice["organism"]) == ("corpus-mus_musculus", "mus_musculus")
    assert mice["validation"]["validation"] == ["mouse2"]
    is_odd = read(tmp_path / "mice")["soma_joinid"] % 2 == 1
    assert ((read(tmp_path / "mice")["split"] == "validation") == is_odd).all()


def test_an_organism_without_names_goes_by_the_fraction(census, obs, tmp_path):
    add_mice(census, obs)
    selection = corpus(organisms=["homo_sapiens", "mus_musculus"], splits=Splits(validation=["H1437", "K562"]))
    mice = plan(census, tmp_path, selection, **MICE)
    assert mice["validation"]["validation"] == []
    assert {split: row["donors"] for split, row in mice["splits"].items()} == {"train": 1, "validation": 1}
    wrong = selection.model_copy(update={"splits": Splits(validation=["H1437", "K526"])})
    for organism in (MICE, {}):
        with pytest.raises(CellmillError, match="the donor 'K526', which no selected cell has"):
            plan(census, tmp_path, wrong, **organism)


def test_terms_of_no_organism_and_of_the_other_one(census, obs, tmp_path):
    add_mice(census, obs)
    human = corpus(organisms=["homo_sapiens", "mus_musculus"], include={"tissue": ["K-562"]})
    with pytest.raises(CellmillError, match="corpus-mus_musculus: no cell of mus_musculus passes the filter"):
        plan(census, tmp_path, human, **MICE)
    wrong = human.model_copy(update={"include": {"tissue": ["isle"]}})
    with pytest.raises(CellmillError, match=r"corpus.include: no cell of the Census has tissue 'isle'.*'islet'"):
        plan(census, tmp_path, wrong)


def test_an_organism_that_the_census_lacks(demo_census, tmp_path):
    with pytest.raises(CellmillError, match="no organism 'mus_musculus'; corpus.organisms may be homo_sapiens"):
        plan(demo_census.soma, tmp_path, organism="mus_musculus")


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "column"), [("label", "celltype"), ("batch", "librari")])
def test_a_benchmark_names_columns_that_exist(demo_census, tmp_path, key, column):
    selection = PANCREAS.model_copy(update={key: column})
    with pytest.raises(CellmillError, match=rf"datasets.pancreas.{key}: .*no obs column '{column}'; did you mean"):
        plan(demo_census.soma, tmp_path, selection, "pancreas")


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (corpus(include={"tissue": ["pancras"]}), r"corpus.include: .*'pancras'; did you mean 'pancreas'"),
        (corpus(exclude={"tissu": ["pancreas"]}), r"corpus.exclude: .*'tissu'; did you mean 'tissue'"),
        (corpus(quality=Quality(assays=["inDrops"])), r"corpus.quality.assays: .*'inDrops'; did you mean 'inDrop'"),
        (
            corpus(quality=Quality(tissue_types=["organoid"])),
            r"corpus.quality.tissue_types: .*'organoid'; it knows cell line, tissue",
        ),
        (
            corpus(quality=Quality(per_assay={"inDrops": AssayQuality(min_counts=1)})),
            r"corpus.quality.per_assay: .*'inDrops'; did you mean 'inDrop'",
        ),
        (corpus(include={"tissue": ["pancreas"], "donor_id": ["K562"]}), r"no cell .* passes the filter tissue in"),
        (corpus(quality=Quality(min_counts=10**9)), r"no cell is left.*of 3,057 .*held_out removed 1,937, min_counts"),
        (corpus(splits=Splits(validation=["K526"])), r"the donor 'K526', which no selected cell has.*'K562'"),
        (corpus(splits=Splits(validation=["human1"])), r"the donor 'human1', which no selected cell has"),
        (
            corpus(quality=Quality(min_counts=4_000_000)),
            r"the donor '(H1437|K562)', which has no cell left after quality control",
        ),
        (
            corpus(include={"donor_id": ["K562"]}, splits=Splits(validation=["K562"])),
            "no cell is left to train on: all 1 donors are held out",
        ),
    ],
)
def test_bad_selections_end_in_one_sentence(demo_census, tmp_path, selection: Corpus, said):
    with pytest.raises(CellmillError, match=said) as error:
        plan(demo_census.soma, tmp_path, selection)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_plans_are_shown_as_one_table(demo_census, tmp_path):
    first = plan(demo_census.soma, tmp_path / "corpus", corpus(quality=STRICT), blocks=3)
    second = plan(demo_census.soma, tmp_path / "pancreas", PANCREAS, "pancreas", blocks=1)
    text = show_plans([tmp_path / name / "plan.json" for name in ("corpus", "pancreas")], tmp_path / "plan.txt")
    assert (tmp_path / "plan.txt").read_text() == text
    assert text.isascii()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0][:5] == ["selection", "organism", "data sets", "cells", "removed"]
    by_name = {line[0]: line for line in lines if line[0]}
    most = max(qc.removed_by_rule(first["qc"]).items(), key=lambda item: item[1])
    assert by_name["corpus"][1:6] == [
        *("homo_sapiens", "2", f"{first['cells']:,}", f"{most[0]} {most[1]:,}", f"{first['nonzeros']:,}")
    ]
    assert by_name["pancreas"][2:4] == ["1", "1,937"]
    assert by_name["all"][3] == f"{first['cells'] + second['cells']:,}"
    assert by_name["all"][7] == "4"
    assert [line[4] for line in lines if line[4].startswith("min_counts")]
