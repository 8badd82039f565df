"""From finished parts to a selection's folder, on real cells."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.errors import CellmillError
from cellmill.qc import OBS_RULES, RULES, table_rows
from cellmill.shards import assemble as module
from cellmill.shards.assemble import assemble
from cellmill.shards.dataset import Shards
from cellmill.shards.manifest import verify_checksums
from cellmill.shards.order import Order, hash_edges
from cellmill.shards.shuffle import shuffle_part
from cellmill.vocabulary import SCHEMA, Vocabulary
from shard_cells import real_cells, write_blocks

ORDER = Order("hash", 0, {"train": hash_edges(3), "validation": [0]})
N_GENES = 33_538
DATASET = "tenx_pbmc1k_v2"
LEAKS, DUPLICATES = [4, 11], [11, 30, 31]


@pytest.fixture(scope="module")
def all_cells(data):
    """Joinids, cells and metadata; every fourth cell belongs to a second data set."""
    cells, obs = real_cells(data, DATASET)
    datasets = np.where(np.arange(len(cells)) % 4 == 0, "other", DATASET)
    donors = np.where(np.arange(len(cells)) % 7 == 0, "held", "seen")  # as write_blocks splits them
    for name, values in (("dataset_id", datasets), ("donor_id", donors)):
        obs = obs.set_column(obs.column_names.index(name), name, pa.array(values))
    return cells, obs


def write_plan(folder: Path, obs: pa.Table, validation=("held",)) -> None:
    passed = {name: np.array([0] * len(OBS_RULES) + [n]) for name, n in counts(obs["dataset_id"].to_pylist()).items()}
    passed[DATASET][OBS_RULES.index("min_counts")] = 17
    plan = {
        "selection": "corpus",
        "organism": "homo_sapiens",
        "census": {"path": "tests"},
        "filter": {},
        "quality": {"primary_only": True},
        "held_out": {},
        "splits": {"train": 0, "validation": 0},
        "validation": {"unit": "donor", "validation": list(validation), "validation_fraction": 0.05},
        "order": ORDER.as_dict(),
        "qc": table_rows(passed),
    }
    (folder / "plan.json").write_text(json.dumps(plan))


def counts(values: list) -> dict:
    return {value: values.count(value) for value in sorted(set(values))}


def write_run(folder: Path, all_cells, n: int = 2, leaks=LEAKS, duplicates=DUPLICATES) -> None:
    """Everything that `assemble` reads. Blocks kept all cells but the first ten, which a mitochondrial rule removed."""
    cells, obs = all_cells
    folder.mkdir(exist_ok=True)
    write_plan(folder, obs)
    genes = {field.name: pa.nulls(N_GENES, field.type) for field in SCHEMA}
    genes |= {"feature_id": pa.array([f"gene{number:06}" for number in range(N_GENES)])}
    pq.write_table(pa.table(genes, schema=SCHEMA), folder / "vocabulary.parquet")
    for name, joinids in (("leaks", leaks), ("duplicates", duplicates)):
        pq.write_table(
            pa.table({"soma_joinid": joinids, "dataset_id": ["x"] * len(joinids)}), folder / f"{name}.parquet"
        )
    blocks = write_blocks(folder, cells.slice(10, len(cells)), obs.slice(10), ORDER, n, at_a_time=300)
    for block, rows in enumerate(np.array_split(np.arange(len(cells)), n)):
        columns = {
            "soma_joinid": cells.joinids[rows],
            "dataset_id": obs["dataset_id"].take(rows).combine_chunks().dictionary_encode(),
            "mito_fraction": pa.array(np.where(rows < 10, 0.9, np.nan), from_pandas=True),
            "removed_by": pa.array(["max_mito_fraction" if row < 10 else None for row in rows], pa.string()),
        }
        pq.write_table(pa.table(columns), folder / f"{block}.qc.parquet")
    for part in range(n):
        shuffle_part(
            summary=folder / "plan.json",
            blocks=blocks,
            removed=[folder / "leaks.parquet", folder / "duplicates.parquet"],
            part=part,
            parts=n,
            n_genes=N_GENES,
            out=folder / "parts" / str(part),
        )


def join(folder: Path, n: int = 2, **changes) -> dict:
    given = {
        "summary": folder / "plan.json",
        "parts": [folder / "parts" / str(part) for part in range(n)],
        "block_qcs": [folder / f"{block}.qc.parquet" for block in range(n)],
        "vocabulary": folder / "vocabulary.parquet",
        "duplicates": folder / "duplicates.parquet",
        "leaks": folder / "leaks.parquet",
        "out": folder / "shards",
        "qc": folder / "qc.parquet",
        "qc_cells": folder / "qc_cells.parquet",
    }
    return assemble(**given | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def run(all_cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder, all_cells)
    join(folder)
    return folder


def test_folder_manifest_and_links(all_cells, run):
    shards = Shards(run / "shards")
    verify_checksums(run / "shards")
    joinids = np.concatenate([shards.obs(split)["soma_joinid"].to_numpy() for split in shards.splits])
    assert sorted(joinids) == sorted(set(range(10, len(all_cells[0]))) - set(LEAKS) - set(DUPLICATES))
    assert shards.splits == ("train", "validation")
    assert set(shards.obs("validation")["donor_id"].to_pylist()) == {"held"}
    assert shards.vocabulary_hash == Vocabulary.read(run / "vocabulary.parquet").hash
    assert shards.manifest["selection"]["removed"] == {
        **dict.fromkeys(RULES, 0),
        "min_counts": 17,
        "max_mito_fraction": 10,
        "leaks": 1,
        "duplicates": 2,
    }
    assert str(run) not in (run / "shards" / "manifest.json").read_text()
    for path in run.glob("parts/*/*.parquet"):
        assert os.stat(path).st_ino == os.stat(run / "shards" / path.name).st_ino


def test_tables_of_quality_control(all_cells, run):
    """A cell that was removed before is not counted again (4), one that breaks two late rules under the first (11)."""
    datasets = all_cells[1]["dataset_id"].to_pylist()
    expected = dict.fromkeys(range(10), "max_mito_fraction") | {11: "leaks", 30: "duplicates", 31: "duplicates"}
    rows = pq.read_table(run / "qc_cells.parquet").to_pylist()
    assert [row["soma_joinid"] for row in rows] == list(range(len(datasets)))
    assert [row["dataset_id"] for row in rows] == datasets
    assert {row["soma_joinid"]: row["removed_by"] for row in rows if row["removed_by"]} == expected
    assert [row["mito_fraction"] for row in rows] == [0.9] * 10 + [None] * (len(datasets) - 10)

    table = pq.read_table(run / "qc.parquet").to_pylist()
    assert [row["rule"] for row in table] == 2 * ["selected", *RULES]
    for dataset_id in (DATASET, "other"):
        mine = {row["rule"]: row["removed"] for row in table if row["dataset_id"] == dataset_id}
        for rule in ("max_mito_fraction", "leaks", "duplicates"):
            assert mine[rule] == sum(datasets[row] == dataset_id for row, broken in expected.items() if broken == rule)
        kept = sum(datasets[row] == dataset_id for row in range(len(datasets)) if row not in expected)
        assert [row["remaining"] for row in table if row["dataset_id"] == dataset_id][-1] == kept


def test_the_number_of_blocks_and_rows_at_a_time_do_not_show(all_cells, run, tmp_path, monkeypatch):
    write_run(tmp_path, all_cells, n=5)
    join(tmp_path, n=5)
    assert contents(tmp_path / "shards") == contents(run / "shards")
    for name in ("qc.parquet", "qc_cells.parquet"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()
    monkeypatch.setattr(module, "ROWS", 64)
    join(tmp_path, n=5)
    assert pq.ParquetFile(tmp_path / "qc_cells.parquet").num_row_groups == -(-len(all_cells[0]) // 64)
    assert (
        pq.read_table(tmp_path / "qc_cells.parquet").to_pylist() == pq.read_table(run / "qc_cells.parquet").to_pylist()
    )


def test_copies_where_links_are_impossible(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    join(run, out=tmp_path / "shards", qc=tmp_path / "qc.parquet", qc_cells=tmp_path / "qc_cells.parquet")
    assert contents(tmp_path / "shards") == contents(run / "shards")


def test_a_shard_without_cells_is_left_out(all_cells, tmp_path):
    cells, _ = all_cells
    joinids = cells.joinids[cells.joinids % 7 > 0]
    second = joinids[ORDER.shard_of("train", ORDER.keys(joinids)) == 1]
    write_run(tmp_path, all_cells, leaks=second)
    manifest = join(tmp_path)
    assert [shard["file"] for shard in manifest["splits"]["train"]] == ["train-00000.parquet", "train-00002.parquet"]
    assert Shards(tmp_path / "shards").n_cells("train") == manifest["totals"]["cells"] - 141


def test_no_cell_is_left(all_cells, tmp_path):
    cells, obs = all_cells
    write_run(tmp_path, all_cells, leaks=cells.joinids[::7])
    with pytest.raises(CellmillError, match=r"corpus: no cell of split 'validation' is left .* leaks removed 14\d"):
        join(tmp_path)
    write_run(tmp_path, all_cells)
    write_plan(tmp_path, obs, validation=["held", "seen"])
    with pytest.raises(CellmillError, match="the donor 'seen', which has no cell left after quality control"):
        join(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("shards", "qc"))]


def test_parts_that_are_missing_unfinished_or_of_other_cells(all_cells, tmp_path):
    write_run(tmp_path, all_cells)
    with pytest.raises(CellmillError, match=r"kept 98\d cells, but the shards in .*parts hold \d+; delete"):
        join(tmp_path, duplicates=None)
    (tmp_path / "parts" / "1" / "part.json").write_text("{")
    with pytest.raises(CellmillError, match=r"parts/1 is no finished part of shards; delete it and run again"):
        join(tmp_path)


def test_a_failed_assembly_keeps_the_old_shards(all_cells, tmp_path, monkeypatch):
    write_run(tmp_path, all_cells)
    join(tmp_path)
    before = contents(tmp_path / "shards")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", fail)
    with pytest.raises(CellmillError, match=r"shards could not be written \(No space left on device\)"):
        join(tmp_path)
    assert contents(tmp_path / "shards") == before
    assert not list(tmp_path.glob("*.tmp"))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cellmill.shards import assemble
import test_assemble

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
assemble.write_manifest = die
test_assemble.join(Path(sys.argv[1]))
"""


def test_a_killed_assembly_leaves_nothing_half_written(all_cells, run, tmp_path):
    write_run(tmp_path, all_cells)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(here)]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "shards").exists()
    join(tmp_path)
    assert contents(tmp_path / "shards") == contents(run / "shards")
    assert not list(tmp_path.glob("*.tmp"))
