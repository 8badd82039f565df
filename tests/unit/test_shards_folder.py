import json

import numpy as np
import pytest
from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.manifest import read_manifest, verify_checksums, write_manifest
from shard_cells import HASH, real_cells, same_cells, write_shards


@pytest.fixture(scope="module")
def cells_obs(data):
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    return cells.take(np.arange(500)), obs.slice(0, 500)


@pytest.fixture
def folder(cells_obs, tmp_path):
    splits = {"train": cells_obs, "validation": (cells_obs[0].take(np.arange(40)), cells_obs[1].slice(0, 40))}
    return write_shards(tmp_path / "shards", splits, n_genes=33_538, cells_per_shard=200, row_group=64)


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_folder_says(folder, cells_obs):
    shards = Shards(folder)
    cells, obs = cells_obs
    assert shards.splits == ("train", "validation")
    assert (shards.n_cells("train"), shards.n_cells("validation"), shards.n_genes) == (500, 40, 33_538)
    assert shards.manifest["totals"]["cells"] == 540
    assert shards.obs("train")["soma_joinid"].to_pylist() == cells.joinids.tolist()
    assert shards.obs("train", ["library"]).column_names == ["library"]
    assert [group.cells for group in shards.row_groups("train")] == [64, 64, 64, 8] * 2 + [64, 36]
    verify_checksums(folder)
    shards.check_vocabulary(HASH)


@pytest.mark.parametrize(
    ("batch_size", "start"), [(1, 490), (50, 0), (64, 64), (300, 199), (1000, 0), (7, 201), (5, 500)]
)
def test_batches_in_order(folder, cells_obs, batch_size, start):
    batches = list(Shards(folder).batches("train", batch_size, start))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = cells_obs[0].take(np.arange(start, 500))
    assert sum(map(len, batches)) == len(expected)
    if batches:
        assert same_cells(CellBatch.concatenate(batches), expected)


def test_two_runs_give_the_same_bytes(folder, cells_obs, tmp_path):
    splits = {"train": cells_obs, "validation": (cells_obs[0].take(np.arange(40)), cells_obs[1].slice(0, 40))}
    again = write_shards(tmp_path / "again", splits, n_genes=33_538, cells_per_shard=200, row_group=64)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert str(tmp_path) not in (folder / "manifest.json").read_text()


def test_flipped_byte(folder):
    path = folder / "train-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    shards = Shards(folder)  # the size is right
    with pytest.raises(CellmillError, match=r"train-00001\.parquet is corrupt.*delete .* and run again"):
        list(shards.batches("train", 64))
    with pytest.raises(CellmillError, match=r"train-00001\.parquet is corrupt: its SHA-256"):
        verify_checksums(folder)


def test_truncated_missing_and_swapped_shards(folder):
    path = folder / "train-00000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CellmillError, match=f"has {len(content) - 1} bytes, the manifest says {len(content)}"):
        Shards(folder)
    path.unlink()
    with pytest.raises(CellmillError, match=r"train-00000\.parquet does not exist but the manifest names it"):
        Shards(folder)


def test_manifest_of_other_row_groups(folder):
    edit(folder, lambda m: m["splits"]["train"][0]["row_groups"].__setitem__(0, 65))
    with pytest.raises(CellmillError, match="row group 0 has 64 cells, the manifest says 65"):
        list(Shards(folder).batches("train", 64))


def test_vocabulary_smaller_than_the_ids(folder):
    edit(folder, lambda m: m["vocabulary"].__setitem__("n_genes", 1000))
    with pytest.raises(CellmillError, match="beyond the vocabulary of 1000 genes"):
        list(Shards(folder).batches("train", 64))


def test_wrong_vocabulary_and_split(folder):
    shards = Shards(folder)
    with pytest.raises(CellmillError, match=f"vocabulary {HASH}, but abc is expected"):
        shards.check_vocabulary("abc")
    with pytest.raises(CellmillError, match="no split 'test'; it has train, validation"):
        shards.n_cells("test")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(version=9), "format version 9, this cellmill reads 1"),
        (lambda m: m.update(format="other"), "no manifest of shards"),
        (lambda m: m.pop("vocabulary"), "lacks vocabulary"),
        (lambda m: m["splits"]["train"][0].pop("sha256"), "lacks sha256"),
    ],
)
def test_bad_manifests(folder, change, said):
    edit(folder, change)
    with pytest.raises(CellmillError, match=said):
        read_manifest(folder)


def test_no_manifest_and_no_json(folder, tmp_path):
    with pytest.raises(CellmillError, match=r"manifest\.json does not exist"):
        Shards(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CellmillError, match="is not JSON"):
        Shards(folder)


def test_too_many_genes(tmp_path):
    said = {"organism": "homo_sapiens", "census": {}, "selection": {}, "vocabulary_hash": HASH, "splits": {}}
    with pytest.raises(CellmillError, match="a vocabulary of 65,537 genes"):
        write_manifest(tmp_path, n_genes=65_537, **said)
    assert list(tmp_path.iterdir()) == []
