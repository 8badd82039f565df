from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill import scores
from cellmill.collect import collect, with_scaled
from cellmill.errors import CellmillError

ROW = {
    "run": "demo",
    "task": "annotation",
    "dataset": "baron",
    "split": "mean",
    "model": "hvg_pca",
    "kind": "baseline",
    "regime": "zero_shot",
    "seed": 0,
    "metric": "accuracy",
    "value": 0.5,
    "higher_is_better": True,
    "n": 10,
    "seconds": 1.0,
    "reason": None,
    "seen": "no",
    "code_version": "c",
    "commit": "d",
    "config_hash": "e",
    "checkpoint": None,
}


def row(**changes):
    return scores.row(**(ROW | changes))


def test_columns_are_those_of_the_house():
    named = "run task dataset split model kind regime seed metric value higher_is_better n seconds reason seen"
    assert scores.SCHEMA.names == [*named.split(), "code_version", "commit", "config_hash", "checkpoint"]
    assert list(row()) == scores.SCHEMA.names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "net"}, "kind is 'net'; it must be one of model"),
        ({"regime": "few_shot"}, "regime is 'few_shot'"),
        ({"seen": "maybe"}, "seen is 'maybe'"),
        ({"value": None}, "not both or none"),
        ({"reason": "too few cells"}, "not both or none"),
        ({"value": float("nan")}, "value is nan"),
        ({"value": float("inf")}, "value is inf"),
    ],
)
def test_a_wrong_row_is_refused(changes, said):
    with pytest.raises(CellmillError, match=said):
        row(**changes)


def test_a_score_without_a_value_says_why(tmp_path):
    scores.write([row(value=None, reason="one batch only")], tmp_path / "a.parquet")
    read = scores.read(tmp_path / "a.parquet").to_pylist()
    assert (read[0]["value"], read[0]["reason"]) == (None, "one batch only")


def test_collect_sorts_and_is_the_same_whatever_the_order(tmp_path):
    parts = [tmp_path / f"{name}.parquet" for name in "abc"]
    scores.write([row(metric="macro_f1", value=0.1), row(seed=10)], parts[0])
    scores.write([row(seed=2), row(seed=2, metric="macro_f1")], parts[1])
    scores.write([], parts[2])
    files = []
    for i, order in enumerate((parts, parts[::-1])):
        parquet, csv = tmp_path / f"{i}.all.parquet", tmp_path / f"{i}.csv"
        collect(order, parquet, csv)
        files.append((parquet.read_bytes(), csv.read_bytes()))
    assert files[0] == files[1]
    table = pq.read_table(tmp_path / "0.all.parquet").to_pylist()
    assert [(r["seed"], r["metric"]) for r in table] == [
        (0, "macro_f1"),
        (2, "accuracy"),
        (2, "macro_f1"),
        (10, "accuracy"),
    ]
    lines = (tmp_path / "0.csv").read_text().splitlines()
    assert lines[0].replace('"', "").split(",") == scores.COLLECTED.names
    assert scores.read(tmp_path / "0.all.parquet").schema == scores.COLLECTED
    assert len(lines) == 5
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == []


def test_the_same_score_twice_is_refused(tmp_path):
    with pytest.raises(CellmillError, match="hvg_pca.* is there 2 times"):
        scores.write([row(), row(value=0.6)], tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
    for name in "ab":
        scores.write([row()], tmp_path / f"{name}.parquet")
    with pytest.raises(CellmillError, match="is there 2 times; keep one"):
        collect([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "all.parquet", tmp_path / "all.csv")
    assert not (tmp_path / "all.parquet").exists()


def test_a_foreign_a_damaged_or_a_missing_file_is_refused(tmp_path):
    pq.write_table(pa.table({"value": [1.0]}), tmp_path / "foreign.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    for name, said in (
        ("foreign", "not a table of scores"),
        ("damaged", "cannot be read"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(CellmillError, match=said):
            collect([tmp_path / f"{name}.parquet"], tmp_path / "all.parquet", tmp_path / "all.csv")
    with pytest.raises(CellmillError, match="no scores to collect"):
        collect([], tmp_path / "all.parquet", tmp_path / "all.csv")


DEMO = Path(__file__).parents[2] / "results/demo/scores.parquet"


def scaled(*rows) -> dict:
    """(model, seed, metric, dataset): scaled value."""
    table = with_scaled(scores.sort(pa.Table.from_pylist(list(rows), schema=scores.SCHEMA), "here"))
    assert table.schema == scores.COLLECTED
    return {(r["model"], r["seed"], r["metric"], r["dataset"]): r["scaled"] for r in table.to_pylist()}


def controls(best: list[float], worst: list[float], **changes) -> list[dict]:
    return [
        row(model=name, kind="control", seed=seed, value=value, reason=None if value is not None else "NaN", **changes)
        for name, values in (("labels", best), ("shuffled", worst))
        for seed, value in enumerate(values)
    ]


def test_scaled_is_the_place_between_the_controls_means():
    rows = controls([0.9, 1.0], [0.1, 0.2])
    rows += [row(value=0.35), row(model="worse", value=-0.05), row(model="better", value=1.35)]
    found = scaled(*rows)
    place = {name: found[name, 0, "accuracy", "baron"] for name in ("hvg_pca", "worse", "better")}
    assert place == pytest.approx({"hvg_pca": 0.25, "worse": -0.25, "better": 1.5}), "means 0.95 and 0.15; not clipped"
    for name, mean in (("labels", 1), ("shuffled", 0)):
        of_seeds = [found[name, seed, "accuracy", "baron"] for seed in (0, 1)]
        assert sum(of_seeds) / 2 == pytest.approx(mean, abs=1e-12)


def test_scaled_turns_round_where_lower_is_better():
    up = controls([0.0], [4.0], metric="mse", higher_is_better=False)
    found = scaled(*up, row(metric="mse", value=3.0, higher_is_better=False))
    assert [found[name, 0, "mse", "baron"] for name in ("labels", "shuffled", "hvg_pca")] == [1.0, 0.0, 0.25]


def test_each_metric_and_data_set_has_a_scale_of_its_own_and_any_number_of_controls():
    rows = controls([1.0], [0.5]) + controls([10.0], [0.0], dataset="other")
    rows += controls([0.6], [0.8], metric="ilisi")  # here the control that knows nothing is the best
    rows += [row(model="batches", kind="control", metric="ilisi", value=0.0)]
    found = scaled(*rows, row(value=0.75), row(dataset="other", value=7.5), row(metric="ilisi", value=0.4))
    own = {key[2:]: value for key, value in found.items() if key[0] == "hvg_pca"}
    assert own == pytest.approx({("accuracy", "baron"): 0.5, ("accuracy", "other"): 0.75, ("ilisi", "baron"): 0.5})


@pytest.mark.parametrize(
    "rows",
    [
        [],
        controls([1.0], []),
        controls([0.7, 0.7], [0.7, 0.7]),
        controls([0.1 + 0.2], [0.3]),  # the same but for rounding
        controls([None], [0.1]),
        controls([1.0], [0.1], regime="linear_probe"),
    ],
    ids=["none", "one", "equal", "rounding", "no value", "other regime"],
)
def test_without_two_controls_that_differ_nothing_is_scaled(rows):
    assert scaled(*rows, row(value=0.5))["hvg_pca", 0, "accuracy", "baron"] is None


def test_a_missing_value_stays_missing():
    found = scaled(*controls([1.0], [0.0]), row(value=None, reason="NaN"), row(model="net", value=0.5))
    assert (found["hvg_pca", 0, "accuracy", "baron"], found["net", 0, "accuracy", "baron"]) == (None, 0.5)


def test_collecting_a_collected_table_changes_nothing(tmp_path):
    scores.write([*controls([1.0], [0.0]), row()], tmp_path / "a.parquet")
    collect([tmp_path / "a.parquet"], tmp_path / "b.parquet", tmp_path / "b.csv")
    collect([tmp_path / "b.parquet"], tmp_path / "c.parquet", tmp_path / "c.csv")
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "c.parquet").read_bytes()


@pytest.mark.skipif(not DEMO.is_file(), reason="no finished demo run here (make demo)")
def test_the_demos_controls_are_at_one_and_zero_on_every_metric():
    table = with_scaled(scores.read(DEMO).select(scores.SCHEMA.names)).to_pandas()
    assert table[table["task"].isin(["pretraining", "yardstick"])]["scaled"].isna().all()
    found = table[(table["kind"] == "control") & table["value"].notna()]
    means = found.groupby(["task", "dataset", "split", "regime", "metric", "model"])["scaled"].mean().unstack()
    assert len(means) >= 50
    assert means.max(axis=1).to_numpy() == pytest.approx(1)
    assert means.min(axis=1).to_numpy() == pytest.approx(0, abs=1e-9)
    annotation = means.xs("annotation", level="task")
    assert annotation["labels"].to_numpy() == pytest.approx(1)
