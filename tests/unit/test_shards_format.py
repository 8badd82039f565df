import contextlib
import hashlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import OBS_STRINGS
from cellmill.shards.reader import read_obs, read_row_groups, read_shard
from cellmill.shards.writer import ShardWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_cells import real_cells, same_cells


def obs_of(cells: CellBatch, **more) -> pa.Table:
    columns = {name: ["unknown"] * len(cells) for name in OBS_STRINGS}
    return pa.table({**columns, "n_measured_genes": cells.lengths, **more})


def batch_of(*cells: dict[int, int]) -> CellBatch:
    """Cells as {gene: count}."""
    return CellBatch(
        joinids=np.arange(len(cells)),
        offsets=np.cumsum([0, *map(len, cells)]),
        genes=np.array([gene for cell in cells for gene in sorted(cell)], np.int64),
        counts=np.array([cell[gene] for cell in cells for gene in sorted(cell)], np.int64),
        totals=np.array([sum(cell.values()) + 5 for cell in cells], np.int64),
    )


def write(path, cells, obs=None, **options) -> dict:
    with ShardWriter(path, **options) as writer:
        writer.write(cells, obs_of(cells) if obs is None else obs)
    return writer.close()


@pytest.mark.parametrize("name", ["baron_h1", "tenx_pbmc1k_v2"])
def test_round_trip_of_real_cells(data, tmp_path, name):
    cells, obs = real_cells(data, name)
    path = tmp_path / "all-00000.parquet"
    info = write(path, cells, obs, row_group=400)
    got, got_obs = read_shard(path)
    assert same_cells(got, cells)
    assert got.genes.dtype == got.counts.dtype == np.int32
    assert got.totals.dtype == got.offsets.dtype == np.int64
    assert cells.counts.max() > 255
    for column in obs.column_names:
        assert got_obs[column].to_pylist() == obs[column].to_pylist()
    assert pa.types.is_dictionary(got_obs.schema.field("cell_type").type)
    assert got_obs["n_genes"].to_pylist() == cells.lengths.tolist()
    content = path.read_bytes()
    assert info == {
        "file": "all-00000.parquet",
        "cells": len(cells),
        "nonzeros": len(cells.genes),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "row_groups": [400] * (len(cells) // 400) + [len(cells) % 400],
    }
    assert [p.name for p in tmp_path.iterdir()] == ["all-00000.parquet"]


def test_edges_of_the_packing(tmp_path):
    cells = batch_of(
        {}, {0: 1}, {65_535: 255}, {0: 254, 1: 255, 2: 256, 65_535: 65_536}, {}, {7: 2**31 - 1, 300: 70_000}, {0: 3}, {}
    )
    write(tmp_path / "x.parquet", cells, row_group=3)
    assert same_cells(read_shard(tmp_path / "x.parquet")[0], cells)


cell = st.dictionaries(st.integers(0, 65_535), st.one_of(st.integers(1, 600), st.integers(1, 2**31 - 1)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(cell, max_size=9), st.integers(1, 5), st.data())
def test_any_cells_round_trip_however_they_are_cut(tmp_path_factory, cells, row_group, draw):
    folder = tmp_path_factory.mktemp("property")
    cells = batch_of(*cells)
    once, cut = folder / "once.parquet", folder / "cut.parquet"
    write(once, cells, row_group=row_group)
    middle = draw.draw(st.integers(0, len(cells)))
    with ShardWriter(cut, row_group=row_group) as writer:
        for rows in (np.arange(middle), np.arange(middle, len(cells))):
            writer.write(cells.take(rows), obs_of(cells.take(rows)))
    assert same_cells(read_shard(once)[0], cells)
    assert once.read_bytes() == cut.read_bytes()


def test_bytes_do_not_depend_on_calls_or_on_dictionaries(data, tmp_path):
    cells, obs = real_cells(data, "baron_h1")
    write(tmp_path / "a.parquet", cells, obs, row_group=500)
    coded = obs.set_column(obs.column_names.index("cell_type"), "cell_type", obs["cell_type"].dictionary_encode())
    with ShardWriter(tmp_path / "b.parquet", row_group=500) as writer:
        for start in range(0, len(cells), 333):
            rows = np.arange(start, min(start + 333, len(cells)))
            writer.write(cells.take(rows), coded.slice(start, len(rows)))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_shard_is_written_again_from_what_was_read(data, tmp_path):
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    write(tmp_path / "a.parquet", cells, obs)
    write(tmp_path / "b.parquet", *read_shard(tmp_path / "a.parquet"))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_row_groups_and_columns(data, tmp_path):
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    path = tmp_path / "x.parquet"
    write(path, cells, obs, row_group=100)
    got, got_obs = read_row_groups(path, [3, 1], ["library", "soma_joinid"])
    rows = np.r_[300:400, 100:200]
    assert same_cells(got, cells.take(rows))
    assert got_obs.column_names == ["soma_joinid", "library"]
    assert got_obs["soma_joinid"].to_pylist() == rows.tolist()
    assert read_row_groups(path, [0], [])[1].num_columns == 0
    assert len(read_row_groups(path, [])[0]) == 0
    assert read_obs(path, ["n_genes"])["n_genes"].to_pylist() == cells.lengths.tolist()
    with pytest.raises(CellmillError, match="has no column colour"):
        read_obs(path, ["colour"])


def test_no_cells_and_nulls(tmp_path):
    assert write(tmp_path / "none.parquet", batch_of())["row_groups"] == []
    assert len(read_shard(tmp_path / "none.parquet")[0]) == 0
    with ShardWriter(tmp_path / "never.parquet"):
        pass
    assert read_obs(tmp_path / "never.parquet").num_rows == 0
    cells = batch_of({1: 1}, {2: 2})
    write(tmp_path / "null.parquet", cells, obs_of(cells, library=pa.array([None, "a"])))
    assert read_obs(tmp_path / "null.parquet")["library"].to_pylist() == [None, "a"]


good = batch_of({1: 2, 5: 300}, {2: 1})


@pytest.mark.parametrize(
    ("cells", "obs", "said"),
    [
        (batch_of({65_536: 1}), None, "at most 65,536 genes"),
        (batch_of({-1: 1}), None, "gene ids run from -1"),
        (batch_of({1: 0}), None, "leave zeros out"),
        (batch_of({1: -3}), None, "counts run from -3"),
        (batch_of({1: 2**32}), None, "counts run from"),
        (CellBatch(good.joinids, good.offsets, good.genes[[1, 0, 2]], good.counts, good.totals), None, "do not ascend"),
        (CellBatch(good.joinids, good.offsets, good.genes * 0, good.counts, good.totals), None, "do not ascend"),
        (CellBatch(good.joinids, good.offsets, good.genes, good.counts, good.totals * 0), None, "all measured genes"),
        (good, obs_of(good).drop_columns("tissue"), "lacks tissue"),
        (good, obs_of(good).slice(1), "2 cells came with 1 rows"),
        (good, obs_of(good, soma_joinid=[7, 8]), "soma_joinid of the metadata contradicts"),
        (good, obs_of(good, library=[1, 2]), "library of the metadata must hold strings, not int64"),
        (good, obs_of(good).set_column(11, "n_measured_genes", [[0.5, 1.5]]), "must hold integers"),
    ],
)
def test_bad_cells(tmp_path, cells, obs, said):
    with pytest.raises(CellmillError, match=said):
        write(tmp_path / "x.parquet", cells, obs)
    assert list(tmp_path.iterdir()) == []


def test_columns_that_change(tmp_path):
    writer = ShardWriter(tmp_path / "x.parquet")
    writer.write(good, obs_of(good))
    with pytest.raises(CellmillError, match="changed from one write to the next"):
        writer.write(good, obs_of(good, library=["a", "b"]))


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "x.parquet", row_group=1) as writer:
            writer.write(good, obs_of(good))
            assert [p.name for p in tmp_path.iterdir()] == ["x.parquet.tmp"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from cellmill.shards.reader import read_shard
from cellmill.shards.writer import ShardWriter

cells, obs = read_shard(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
with ShardWriter(sys.argv[2], row_group=100) as writer:
    writer.write(cells, obs)
"""


@pytest.mark.parametrize("room", [0, 5_000, 200_000, 900_000])
def test_no_room_on_the_disk(data, tmp_path, room):
    """The operating system refuses to let the file grow: at the first byte, within a row group, in the last one."""
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    size = write(tmp_path / "a.parquet", cells, obs, row_group=100)["bytes"]
    assert size > room
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cellmill.errors.CellmillError: ")
    assert "b.parquet could not be written (File too large)" in last
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_missing_folder_is_made(tmp_path):
    write(tmp_path / "new" / "x.parquet", good)
    assert same_cells(read_shard(tmp_path / "new" / "x.parquet")[0], good)


def test_flipped_bytes_never_pass_unseen(data, tmp_path):
    """A changed byte of any page is an error; the footer has no checksum in parquet (the manifest's covers it)."""
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    path = tmp_path / "x.parquet"
    write(path, cells.take(np.arange(300)), obs.slice(0, 300), row_group=100)
    content = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    chunks = [metadata.row_group(g).column(c) for g in range(3) for c in range(metadata.num_columns)]
    rng = np.random.default_rng(0)
    for chunk in rng.choice(np.array(chunks, object), 40, replace=False):
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        at = start + chunk.total_compressed_size - 1 - int(rng.integers(min(8, chunk.total_compressed_size // 4)))
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(CellmillError, match=r"x\.parquet is corrupt.*delete .*x\.parquet and run again"):
            read_shard(path)


def test_flipped_bits_anywhere(data, tmp_path):
    """The same cells or a clear error, never another exception; in the footer, which parquet does not protect, too."""
    cells, obs = real_cells(data, "tenx_pbmc1k_v2")
    cells, path = cells.slice(0, 40), tmp_path / "x.parquet"
    write(path, cells, obs.slice(0, 40), row_group=20)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rng = np.random.default_rng(0)
    read = 0
    for at in [*rng.integers(0, footer, 150), *rng.integers(footer, len(content) - 8, 150)]:
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with contextlib.suppress(CellmillError):
            got, _ = read_shard(path)
            read += 1
            assert at >= footer or same_cells(got, cells)
    assert read < 150


def test_truncated_missing_and_foreign_files(data, tmp_path):
    path = tmp_path / "x.parquet"
    write(path, good)
    content = path.read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CellmillError, match=r"x\.parquet is corrupt"):
            read_shard(path)
    with pytest.raises(CellmillError, match="does not exist"):
        read_shard(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(CellmillError, match="no shard of cellmill"):
        read_shard(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_genes": [2, 2]}, "lengths of genes, counts and n_genes differ"),
        ({"genes": [b"\x01", b"\x02"]}, "lengths of genes, counts and n_genes differ"),
        ({"genes": [b"\x01\x00", b"\x02"]}, "do not ascend"),
        ({"genes": [b"\xff\x01", b"\x02"]}, "genes_overflow does not match the genes of 255"),
        (
            {"genes": [b"\xff\x01", b"\x02"], "genes_overflow": [b"\xff\xff", b""]},
            "gene id 65536 lies beyond the vocabulary of 65536",
        ),
        ({"genes": [b"\x01\xff", b"\x02"], "genes_overflow": [b"\x00\x00", b""]}, "genes_overflow holds 0"),
        ({"counts": [b"\x02\x01", b"\x01"]}, "counts_overflow does not match"),
        ({"counts": [b"\x02\xff", b"\x00"]}, "a count is zero"),
        ({"counts_overflow": [b"", b"\x2c\x01\x00\x00"]}, "counts_overflow does not match"),
        ({"counts_overflow": [b"\x2c\x01\x00\x80", b""]}, "counts_overflow holds 2,147,483,948"),
    ],
)
def test_contradicting_columns(tmp_path, change, said):
    path = tmp_path / "x.parquet"
    write(path, good)
    table = pq.read_table(path)
    for column, values in change.items():
        field = table.schema.field(column)
        table = table.set_column(table.schema.names.index(column), field, pa.array(values, field.type))
    pq.write_table(table, path)
    with pytest.raises(CellmillError, match=said):
        read_shard(path)


def test_id_beyond_the_vocabulary_and_unknown_version(tmp_path):
    path = tmp_path / "x.parquet"
    write(path, good)
    with pytest.raises(CellmillError, match="gene id 5 lies beyond the vocabulary of 5 genes"):
        read_shard(path, n_genes=5)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"cellmill.format": "cellmill-shard", "cellmill.version": "2"}), path)
    with pytest.raises(CellmillError, match="format version 2, this cellmill reads 1"):
        read_shard(path)
