import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill import scores
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
        scores.collect(order, parquet, csv)
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
    assert lines[0].split(",")[:3] == ['"run"', '"task"', '"dataset"']
    assert len(lines) == 5
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == []


def test_the_same_score_twice_is_refused(tmp_path):
    with pytest.raises(CellmillError, match="hvg_pca.* is there 2 times"):
        scores.write([row(), row(value=0.6)], tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
    for name in "ab":
        scores.write([row()], tmp_path / f"{name}.parquet")
    with pytest.raises(CellmillError, match="is there 2 times; keep one"):
        scores.collect([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "all.parquet", tmp_path / "all.csv")
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
            scores.collect([tmp_path / f"{name}.parquet"], tmp_path / "all.parquet", tmp_path / "all.csv")
    with pytest.raises(CellmillError, match="no scores to collect"):
        scores.collect([], tmp_path / "all.parquet", tmp_path / "all.csv")
