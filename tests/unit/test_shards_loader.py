import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.loader import WINDOW, Loader
from shard_cells import real_cells, same_cells, write_shards

N = 996


@pytest.fixture(scope="module")
def all_cells(data):
    return real_cells(data, "tenx_pbmc1k_v2")


@pytest.fixture(scope="module")
def shards(all_cells, tmp_path_factory):
    """996 cells in 34 row groups of at most 32 cells: 5 windows an epoch, the last one short."""
    cells, obs = all_cells
    first, none = np.arange(5), np.arange(0)
    splits = {
        "train": all_cells,
        "tiny": (cells.take(first), obs.take(first)),
        "empty": (cells.take(none), obs.take(none)),
    }
    folder = tmp_path_factory.mktemp("loader") / "shards"
    return Shards(write_shards(folder, splits, n_genes=33_538, cells_per_shard=300, row_group=32))


def take(loader, n):
    return [next(loader) for _ in range(n)]


def joinids(batches):
    return np.concatenate([batch.joinids for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 50, 64, 700, 2500])
def test_every_cell_once_per_epoch(shards, batch_size):
    with Loader(shards, "train", batch_size, seed=3) as loader:
        stream = joinids(take(loader, 3 * N // batch_size + 1))
    assert len(stream) >= 3 * N
    for epoch in range(3):
        assert sorted(stream[epoch * N : (epoch + 1) * N]) == list(range(N))
    assert (stream[:N] != stream[N : 2 * N]).mean() > 0.9


def test_cells_are_whole(shards, all_cells):
    with Loader(shards, "train", 64, seed=0) as loader:
        for batch in take(loader, 20):
            assert same_cells(batch, all_cells[0].take(batch.joinids))
            assert batch.genes.dtype == batch.counts.dtype == np.int32


def test_the_seed_alone_decides(shards):
    def stream(seed, pause=0.0):
        with Loader(shards, "train", 64, seed=seed) as loader:
            out = []
            for _ in range(20):
                out.append(next(loader))
                time.sleep(pause)
            return joinids(out)

    assert np.array_equal(stream(1), stream(1, pause=0.003))
    assert (stream(1) != stream(2)).mean() > 0.9


def test_shuffled_over_row_groups(shards):
    """Neighbours in the stream come from the row groups of a window, not from one."""
    with Loader(shards, "train", N, seed=0) as loader:
        stream = next(loader).joinids
    assert (np.abs(np.diff(stream)) > 32).mean() > 0.6


@pytest.mark.parametrize("batch_size", [48, 300])
def test_resume_anywhere(shards, batch_size):
    n = 2 * N // batch_size + 3
    with Loader(shards, "train", batch_size, seed=5) as loader:
        states, batches = [], []
        for _ in range(n):
            states.append(loader.state_dict())
            batches.append(next(loader))
    assert all(type(v) is int for state in states for v in state.values())
    for step in np.random.default_rng(0).choice(n - 1, 6, replace=False):
        with Loader(shards, "train", batch_size, seed=5) as resumed:
            if step % 2:  # also from a loader that has already served
                next(resumed)
            resumed.load_state_dict(states[step])
            for expected in batches[step : step + 4]:
                assert same_cells(next(resumed), expected)


def test_resume_reads_two_windows_at_most(shards, monkeypatch):
    read = []
    monkeypatch.setattr(shards, "read_packed", lambda *group: read.append(group) or Shards.read_packed(shards, *group))
    with Loader(shards, "train", 16, seed=0) as loader:
        loader.load_state_dict({"epoch": 4, "position": 600})
        next(loader)
    assert len(read) <= 2 * WINDOW


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_each_batch(shards, world):
    with Loader(shards, "train", 60, seed=2) as loader:
        whole = take(loader, 40)
    parts = []
    for rank in range(world):
        with Loader(shards, "train", 60, seed=2, rank=rank, world=world) as loader:
            parts.append(take(loader, 40))
    for t, expected in enumerate(whole):
        assert {len(part[t]) for part in parts} == {60 // world}
        assert same_cells(CellBatch.concatenate([part[t] for part in parts]), expected)


def test_a_split_smaller_than_a_batch(shards):
    with Loader(shards, "tiny", 12, seed=0) as loader:
        stream = joinids(take(loader, 5))
    for epoch in range(12):
        assert sorted(stream[epoch * 5 : epoch * 5 + 5]) == list(range(5))


def test_bad_arguments(shards):
    with pytest.raises(CellmillError, match="split 'empty' of .* has no cells"):
        Loader(shards, "empty", 4, seed=0)
    with pytest.raises(CellmillError, match="batch_size 10 is no multiple of 3"):
        Loader(shards, "train", 10, seed=0, world=3)
    with pytest.raises(CellmillError, match="rank 2 is not one of 2"):
        Loader(shards, "train", 10, seed=0, rank=2, world=2)
    with (
        Loader(shards, "tiny", 4, seed=0) as loader,
        pytest.raises(CellmillError, match="position 5 of epoch 0 does not exist in a split of 5 cells"),
    ):
        loader.load_state_dict({"epoch": 0, "position": 5})


def test_an_error_of_the_thread_reaches_the_caller_and_the_thread_ends(shards, monkeypatch):
    before = threading.active_count()
    served = []

    def read(*group):
        if len(served) >= WINDOW:
            raise CellmillError("shard is corrupt")
        served.append(group)
        return Shards.read_packed(shards, *group)

    monkeypatch.setattr(shards, "read_packed", read)
    with Loader(shards, "train", 16, seed=0) as loader:
        next(loader)
        with pytest.raises(CellmillError, match="shard is corrupt"):
            take(loader, 60)
    assert threading.active_count() == before


@pytest.mark.parametrize("fault", ["a flipped byte", "contradicting columns", "a missing file"])
def test_a_damaged_shard_is_named_to_the_caller(all_cells, tmp_path, fault):
    cells, obs = all_cells
    folder = write_shards(tmp_path / "s", {"train": all_cells}, n_genes=33_538, cells_per_shard=300, row_group=32)
    shards, path = Shards(folder), folder / "train-00001.parquet"
    if fault == "a flipped byte":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        said = r"train-00001\.parquet is corrupt"
    elif fault == "contradicting columns":
        table = pq.read_table(path)
        wrong = pa.array(np.asarray(table["n_genes"]) + (np.arange(len(table)) == 200), pa.int32())
        place = table.schema.names.index("n_genes")
        table = table.set_column(place, table.schema.field("n_genes"), wrong)
        pq.write_table(table, path, row_group_size=32)
        said = r"train-00001\.parquet is corrupt: the lengths of genes, counts and n_genes differ"
    else:
        path.unlink()
        said = r"train-00001\.parquet does not exist"
    before = threading.active_count()
    with Loader(shards, "train", 32, seed=0) as loader:
        for _ in range(2):  # asked again, it says so again and skips nothing
            with pytest.raises(CellmillError, match=said):
                take(loader, 2 * N // 32)
            state = loader.state_dict()
        assert loader.state_dict() == state
    assert threading.active_count() == before


def test_many_threads_read_the_same(shards):
    def stream(threads):
        with Loader(shards, "train", 64, seed=1, threads=threads) as loader:
            return joinids(take(loader, 40))

    assert np.array_equal(stream(1), stream(7))
    with pytest.raises(CellmillError, match="cannot read with 0 threads"):
        Loader(shards, "train", 64, seed=1, threads=0)


def test_batches_are_as_mixed_as_random_ones(data):
    """The shards' order is random, as a corpus's is; entropy of cell types in a batch, in bits."""
    cells, obs = real_cells(data, "baron_h1")
    types = np.unique(obs["cell_type"].to_pylist(), return_inverse=True)[1]
    assert types.max() > 3

    def entropy(rows):
        share = np.bincount(types[rows]) / len(rows)
        share = share[share > 0]
        return -(share * np.log2(share)).sum()

    order = np.random.default_rng(0).permutation(len(cells))
    with tempfile.TemporaryDirectory() as folder:
        splits = {"train": (cells.take(order), obs.take(order))}
        folder = write_shards(Path(folder) / "s", splits, n_genes=20_125, cells_per_shard=500, row_group=16)
        with Loader(Shards(folder), "train", 64, seed=0) as loader:
            served = [entropy(batch.joinids) for batch in take(loader, 4 * len(cells) // 64)]
    rng = np.random.default_rng(1)
    ideal = [entropy(rng.permutation(len(cells))[:64]) for _ in range(400)]
    assert np.mean(served) == pytest.approx(np.mean(ideal), rel=0.02)


def test_torch_takes_the_loader_as_a_data_set(shards):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(loader)

    with Loader(shards, "train", 64, seed=1) as loader:
        expected = take(loader, 3)
        loader.load_state_dict({"epoch": 0, "position": 0})
        served = iter(
            torch.utils.data.DataLoader(Stream(), batch_size=None, num_workers=0, collate_fn=lambda cells: cells)
        )
        assert all(same_cells(next(served), batch) for batch in expected)


def test_a_forgotten_loader_ends_its_thread(shards):
    before = threading.active_count()
    loader = Loader(shards, "train", 16, seed=0)
    next(loader)
    del loader
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.02)
    raise AssertionError("the reading thread still runs")


@pytest.fixture(scope="module")
def typed(data, tmp_path_factory):
    """Pancreas cells in many row groups, the dictionaries of two shards; three cells have no cell type."""
    cells, obs = real_cells(data, "baron_h1")
    types = obs["cell_type"].to_pylist()
    types[5] = types[250] = types[399] = None
    obs = obs.set_column(obs.schema.get_field_index("cell_type"), "cell_type", pa.array(types))
    cells, obs, types = cells.slice(0, 400), obs[:400], np.array(types[:400], dtype=object)
    folder = tmp_path_factory.mktemp("typed") / "shards"
    splits = {"train": (cells, obs)}
    return Shards(write_shards(folder, splits, n_genes=20_125, cells_per_shard=210, row_group=16)), types


def test_codes_of_categories(typed):
    shards, types = typed
    known = sorted(set(types) - {None, "beta"}, reverse=True)
    categories = {"cell_type": known, "dataset_id": ["other", "baron_h1"], "sex": []}

    def check(batch):
        assert set(batch.codes) == set(categories)
        assert {codes.dtype for codes in batch.codes.values()} == {np.dtype(np.int32)}
        expected = [known.index(t) if t in known else -1 for t in types[batch.joinids]]
        assert np.array_equal(batch.codes["cell_type"], expected)
        assert (batch.codes["dataset_id"] == 1).all()
        assert (batch.codes["sex"] == -1).all()
        return expected

    codes = sum([check(batch) for batch in shards.batches("train", 33, 7, categories)], [])
    assert len(codes) == 393
    assert set(codes) == {-1, *range(len(known))}
    with Loader(shards, "train", 48, seed=1, categories=categories) as loader:
        served = take(loader, 20)
        assert len({code for batch in served for code in check(batch)}) == len(known) + 1
    for rank in (0, 1):
        with Loader(shards, "train", 48, seed=1, rank=rank, world=2, categories=categories) as loader:
            check(next(loader))
    assert next(shards.batches("train", 8)).codes == {}


def test_wrong_categories_are_named(typed):
    shards, _ = typed
    with pytest.raises(CellmillError, match=r"train-00000\.parquet has no column colour; it has soma_joinid"):
        next(shards.batches("train", 8, categories={"colour": []}))
    with pytest.raises(CellmillError, match="column total_counts of shard .* holds no text"):
        next(shards.batches("train", 8, categories={"total_counts": []}))
