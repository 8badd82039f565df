import numpy as np
import pyarrow as pa
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import CATEGORIES, MEDIAN_ERROR, compute_statistics, load_statistics, save_statistics
from shard_cells import HASH, real_cells, write_shards


@pytest.fixture(scope="module")
def cells_obs(data):
    return real_cells(data, "baron_h1")


@pytest.fixture(scope="module")
def statistics(cells_obs, tmp_path_factory):
    cells, obs = cells_obs
    held_out = obs[:9].set_column(
        obs.schema.get_field_index("cell_type"), "cell_type", pa.array(["of no training cell"] * 9)
    )
    splits = {
        "train": cells_obs,
        "validation": (cells.take(np.arange(9)), held_out),
        "empty": (cells.take([]), obs[:0]),
    }
    folder = tmp_path_factory.mktemp("statistics") / "shards"
    shards = Shards(write_shards(folder, splits, n_genes=20_125, cells_per_shard=800, row_group=300))
    with pytest.raises(CellmillError, match="split 'empty' of .* has no cells"):
        compute_statistics(shards, "empty")
    return compute_statistics(shards)


def test_against_the_dense_matrix(statistics, cells_obs):
    cells, _ = cells_obs
    cp10k = np.zeros((len(cells), 20_125))
    cp10k[cells.cell_of, cells.genes] = cells.counts / cells.totals[cells.cell_of] * 1e4
    seen = (cp10k > 0).any(axis=0)
    assert 0 < seen.sum() < 20_125
    assert np.array_equal(statistics.nonzero_cells.numpy(), (cp10k > 0).sum(axis=0))
    for name, exact in {
        "mean_log1p_cp10k": np.log1p(cp10k).mean(axis=0),
        "std_log1p_cp10k": np.log1p(cp10k).std(axis=0),
    }.items():
        got = getattr(statistics, name).numpy()
        np.testing.assert_allclose(got[seen], exact[seen], rtol=1e-5)
        assert np.isnan(got[~seen]).all()
    cp10k[cp10k == 0] = np.nan
    exact = np.nanmedian(cp10k[:, seen], axis=0)
    got = statistics.median_nonzero_cp10k.numpy()
    assert np.isnan(got[~seen]).all()
    error = np.abs(got[seen] / exact - 1)
    assert error.max() <= MEDIAN_ERROR + 1e-6
    assert error.max() > 1e-4  # the bound is of the right order, so that the test can fail
    rare = statistics.nonzero_cells.numpy()[seen] == 2  # the median of two values far apart is their mean
    assert rare.sum() > 100


def test_of_the_training_cells(statistics, cells_obs):
    cells, obs = cells_obs
    assert statistics.median_genes.dtype == torch.float32
    assert statistics.median_genes == np.median(cells.lengths)
    types = sorted(set(obs["cell_type"].to_pylist()))
    assert len(types) > 3
    assert statistics.categories == {column: types if column == "cell_type" else [] for column in CATEGORIES}


def test_save_and_load(statistics, tmp_path):
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, statistics, HASH)
    save_statistics(tmp_path / "again", statistics, HASH)
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    loaded = load_statistics(path, HASH)
    for name, value in vars(statistics).items():
        if name == "categories":
            assert loaded.categories == value
        else:
            torch.testing.assert_close(getattr(loaded, name), value, rtol=0, atol=0, equal_nan=True)
    load_statistics(path)
    with pytest.raises(CellmillError, match=f"of the vocabulary {HASH}, but abc is expected"):
        load_statistics(path, "abc")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CellmillError, match="is corrupt"):
        load_statistics(path)
    with pytest.raises(CellmillError, match="does not exist"):
        load_statistics(tmp_path / "absent")
