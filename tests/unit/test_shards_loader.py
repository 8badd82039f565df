import threading
import time

import numpy as np
import pytest
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
    monkeypatch.setattr(shards, "read_packed", lambda group: read.append(group) or Shards.read_packed(shards, group))
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

    def read(group):
        if len(served) >= WINDOW:
            raise CellmillError("shard is corrupt")
        served.append(group)
        return Shards.read_packed(shards, group)

    monkeypatch.setattr(shards, "read_packed", read)
    with Loader(shards, "train", 16, seed=0) as loader:
        next(loader)
        with pytest.raises(CellmillError, match="shard is corrupt"):
            take(loader, 60)
    assert threading.active_count() == before


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
