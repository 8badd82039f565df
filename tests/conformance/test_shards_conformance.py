"""The reader written from docs/shards.md alone against cellmill's own, on real cells."""

import ast
import importlib.util
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.format import encode_cells
from shard_cells import real_cells, write_shards

READER = Path(__file__).with_name("reader.py")
MEASURED = {"train": 20_125, "validation": 28_204}
"""Genes of the data set that the cells of a split come from."""
spec = importlib.util.spec_from_file_location("conformance_reader", READER)
reader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reader)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    cells, obs = real_cells(data, "baron_h1")
    other, other_obs = real_cells(data, "scmixology_sc_celseq2", first_joinid=5000)
    splits = {"train": (cells, obs), "validation": (other, other_obs)}
    return write_shards(tmp_path_factory.mktemp("shards"), splits, n_genes=28_204, cells_per_shard=700, row_group=256)


def test_reader_is_independent():
    tree = ast.parse(READER.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"hashlib", "json", "struct", "itertools", "pathlib", "pyarrow.parquet"}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_both_readers_agree(folder, split):
    shards = Shards(folder)
    cells = CellBatch.concatenate(list(shards.batches(split, 512)))
    obs = shards.obs(split).to_pylist()
    rows, genes, counts = zip(*reader.read_folder(folder, split), strict=True)
    assert list(rows) == obs
    assert [row["soma_joinid"] for row in rows] == cells.joinids.tolist()
    assert [row["total_counts"] for row in rows] == cells.totals.tolist()
    assert np.concatenate([np.array(g, np.int64) for g in genes]).tolist() == cells.genes.tolist()
    assert np.concatenate([np.array(c, np.int64) for c in counts]).tolist() == cells.counts.tolist()
    assert max(map(max, counts)) > 255
    assert {row["n_measured_genes"] for row in rows} == {MEASURED[split]}


def test_example_of_the_page():
    page = (READER.parents[2] / "docs" / "shards.md").read_text()
    block = page.split("`n_genes` = 3 and\n\n```\n")[1].split("```")[0]
    packed = {line.split()[0]: bytes.fromhex("".join(line.split()[1:])) for line in block.splitlines()}
    assert reader.unpack(**packed, n=3) == ([3, 4, 1000], [7, 255, 70_000])
    cells = CellBatch(
        np.array([0]), np.array([0, 3]), np.array([3, 4, 1000]), np.array([7, 255, 70_000]), np.array([70_262])
    )
    assert {name: array[0].as_py() for name, array in encode_cells(cells).items()} == packed


COLUMNS = ["cell_type", "library", "n_genes"]


def test_duckdb_reads_the_metadata(folder):
    asked = f"SELECT cell_type, count(*), sum(n_genes) FROM '{folder}/train-*.parquet' GROUP BY cell_type"
    obs = Shards(folder).obs("train").to_pandas()
    assert {row[0]: row[1:] for row in duckdb.sql(asked).fetchall()} == {
        name: (len(group), group["n_genes"].sum()) for name, group in obs.groupby("cell_type", observed=True)
    }


def test_polars_reads_the_metadata(folder):
    frame = polars.read_parquet(folder / "train-*.parquet", columns=COLUMNS)
    assert frame.rows() == [tuple(row.values()) for row in Shards(folder).obs("train", COLUMNS).to_pylist()]


def test_pandas_reads_the_metadata(folder, data):
    obs = pd.read_parquet(folder / "train-00000.parquet", columns=COLUMNS)
    cells, expected = real_cells(data, "baron_h1")
    assert obs["cell_type"].tolist() == expected["cell_type"].to_pylist()[:700]
    assert obs["n_genes"].tolist() == cells.lengths[:700].tolist()
