"""The plan of a selection of the demo Census, against plain pandas over its obs."""

import json
import shutil

import cellxgene_census
import corpus_runs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from cellmill.census.plan import _scan, _splits, _write_plan, value_filter
from cellmill.config import Corpus, Dataset, Quality, Splits
from cellmill.errors import CellmillError
from cellmill.qc import OBS_COLUMNS
from corpus_runs import PANCREAS, corpus

STRICT = Quality(min_counts=3000, max_counts=4_000_000, min_genes=1500)


@pytest.fixture(scope="module")
def obs(demo_census) -> pd.DataFrame:
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        return cellxgene_census.get_obs(census, "homo_sapiens")


def read(folder) -> pd.DataFrame:
    return pd.read_parquet(folder / "plan.parquet")


def test_rules_split_and_held_out_cells(demo_census, obs, tmp_path):
    summary = corpus_runs.plan(demo_census.soma, tmp_path, corpus(quality=STRICT))
    kept = obs[
        (obs["dataset_id"] != "baron_pancreas")
        & obs["is_primary_data"]
        & obs["raw_sum"].between(3000, 4_000_000)
        & (obs["nnz"] >= 1500)
    ]
    plan = read(tmp_path)
    assert plan["soma_joinid"].tolist() == kept["soma_joinid"].tolist()
    assert plan["dataset_id"].tolist() == kept["dataset_id"].tolist()
    assert plan["nnz"].tolist() == kept["nnz"].tolist()
    is_held_out = kept["donor_id"].isin(["H1437", "K562"]).to_numpy()
    assert ((plan["split"] == "validation").to_numpy() == is_held_out).all()

    assert summary == json.loads((tmp_path / "plan.json").read_text())
    assert summary["cells"] == len(kept)
    assert summary["nonzeros"] == kept["nnz"].sum()
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
    summary = corpus_runs.plan(demo_census.soma, tmp_path, corpus(quality=STRICT))
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


def test_blocks_are_ranges_of_about_equal_nonzeros(demo_census, tmp_path):
    summary = corpus_runs.plan(demo_census.soma, tmp_path, corpus(blocks=5))
    plan = read(tmp_path)
    assert (plan["block"].diff().dropna() >= 0).all()
    sums = plan.groupby("block")["nnz"].sum()
    assert len(sums) == 5
    assert sums.max() - sums.min() <= 2 * plan["nnz"].max()
    for block, (number, cells) in zip(summary["blocks"], plan.groupby("block"), strict=True):
        assert block["block"] == number
        assert block["cells"] == len(cells)
        assert block["joinids"] == [cells["soma_joinid"].min(), cells["soma_joinid"].max()]


def test_more_blocks_than_cells_leaves_blocks_empty(demo_census, tmp_path):
    selection = corpus(include={"donor_id": ["IMR90", "H1437"]}, splits=Splits(validation=["H1437"]), blocks=200)
    summary = corpus_runs.plan(demo_census.soma, tmp_path, selection)
    assert sum(block["cells"] for block in summary["blocks"]) == 70
    assert any(block["cells"] == 0 for block in summary["blocks"])


def test_planning_reads_no_counts(demo_census, tmp_path):
    soma = tmp_path / "soma"
    shutil.copytree(demo_census.soma, soma)
    shutil.rmtree(soma / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X")
    assert corpus_runs.plan(soma, tmp_path, corpus())["cells"] > 0


def test_same_plan_same_bytes(demo_census, tmp_path):
    for name in ("a", "b"):
        corpus_runs.plan(demo_census.soma, tmp_path / name, corpus(blocks=3))
    for file in ("plan.parquet", "plan.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["plan.json", "plan.parquet"]


class SlicedObs:
    """The demo's obs as a stream of small tables, as a large Census gives it."""

    def __init__(self, obs: pd.DataFrame, rows: int):
        self.table = pa.Table.from_pandas(obs, preserve_index=False)
        self.rows = rows

    def read(self, *, column_names, value_filter, result_order):
        assert value_filter is None
        assert result_order == "row-major"
        table = self.table.select(column_names)
        return (table.slice(start, self.rows) for start in range(0, len(table), self.rows))


def test_the_plan_does_not_depend_on_how_obs_is_streamed(obs, tmp_path):
    plans = []
    for rows in (len(obs), 97):
        passed = tmp_path / f"{rows}.passed"
        units, histograms = _scan(SlicedObs(obs, rows), None, STRICT, frozenset(["baron_pancreas"]), passed)
        assert histograms["celltypist_blood"].sum(axis=(1, 2)).tolist() == [559, 559]
        cells_U, nonzeros = np.array([cells for cells, _ in units.values()]), sum(n for _, n in units.values())
        splits_U = _splits(list(units), cells_U, corpus(), frozenset(["baron_pancreas"]))
        _write_plan(passed, tmp_path / f"{rows}.parquet", list(units), splits_U, 4, nonzeros)
        plans.append((tmp_path / f"{rows}.parquet").read_bytes())
    assert set(OBS_COLUMNS) < set(obs.columns)
    assert plans[0] == plans[1]


def test_a_benchmark_is_one_split_and_one_block(demo_census, tmp_path):
    summary = corpus_runs.plan(demo_census.soma, tmp_path, PANCREAS, "pancreas")
    assert summary["splits"] == {"all": {"cells": 1937, "nonzeros": summary["nonzeros"], "donors": 1}}
    assert len(summary["blocks"]) == 1
    assert summary["filter"] == "dataset_id in ['baron_pancreas']"


@pytest.mark.parametrize(("key", "column"), [("label", "celltype"), ("batch", "librari")])
def test_a_benchmark_names_columns_that_exist(demo_census, tmp_path, key, column):
    selection = PANCREAS.model_copy(update={key: column})
    with pytest.raises(CellmillError, match=rf"datasets.pancreas.{key}: .*no obs column '{column}'; did you mean"):
        corpus_runs.plan(demo_census.soma, tmp_path, selection, "pancreas")


def test_an_organism_that_the_census_lacks(demo_census, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_runs, "ORGANISM", "mus_musculus")
    with pytest.raises(CellmillError, match="no organism 'mus_musculus'; corpus.organism may be homo_sapiens"):
        corpus_runs.plan(demo_census.soma, tmp_path, corpus())


def test_a_data_set_is_held_out_as_a_whole(demo_census, tmp_path):
    acinar = {"acinar": Dataset(include={"cell_type": ["pancreatic acinar cell"]})}
    summary = corpus_runs.plan(demo_census.soma, tmp_path, corpus(), benchmarks=acinar)
    rows = {(row["dataset_id"], row["rule"]): row["removed"] for row in summary["qc"]}
    assert rows["baron_pancreas", "held_out"] == 1937 > summary["held_out"]["acinar"]["baron_pancreas"]
    assert "baron_pancreas" not in summary["datasets"]


def test_exclude_drops_terms(demo_census, obs, tmp_path):
    summary = corpus_runs.plan(
        demo_census.soma, tmp_path, corpus(exclude={"donor_id": ["K562", "H1"]}, splits=Splits())
    )
    assert not obs.set_index("soma_joinid").loc[read(tmp_path)["soma_joinid"], "donor_id"].isin(["K562", "H1"]).any()
    assert summary["filter"] == value_filter({}, {"donor_id": ["H1", "K562"]})


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (corpus(include={"tissue": ["pancras"]}), r"corpus.include: .*'pancras'; did you mean 'pancreas'"),
        (corpus(exclude={"tissu": ["pancreas"]}), r"corpus.exclude: .*'tissu'; did you mean 'tissue'"),
        (corpus(quality=Quality(assays=["inDrops"])), r"corpus.quality.assays: .*'inDrops'; did you mean 'inDrop'"),
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
        corpus_runs.plan(demo_census.soma, tmp_path, selection)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
