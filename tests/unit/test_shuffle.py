"""Blocks and the shards that they become, on real cells of two data sets."""

import contextlib
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
from cellmill.shards import writer
from cellmill.shards.batch import CellBatch
from cellmill.shards.order import Order, hash_edges
from cellmill.shards.reader import read_shard
from cellmill.shards.shuffle import Block, read_block, shuffle_part
from cellmill.shards.writer import BlockWriter, ShardWriter
from shard_cells import real_cells, same_cells, split_of, write_blocks

ORDER = Order("hash", 0, {"train": hash_edges(5), "validation": hash_edges(2)})
N_GENES = 33_538


@pytest.fixture(scope="module")
def all_cells(data):
    """Cells of two data sets, whose genes here are the same numbers, and their metadata."""
    pbmc, pbmc_obs = real_cells(data, "tenx_pbmc1k_v2")
    baron, baron_obs = real_cells(data, "baron_h1", first_joinid=5_000)
    baron, baron_obs = baron.slice(0, 400), baron_obs.slice(0, 400)
    return CellBatch.concatenate([pbmc, baron]), pa.concat_tables([pbmc_obs, baron_obs])


def plan(folder: Path, order: Order = ORDER) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    path.write_text(json.dumps({"selection": "corpus", "order": order.as_dict()}))
    return path


def make(folder: Path, blocks: list[Path], parts: int = 1, order: Order = ORDER, **changes) -> dict[str, bytes]:
    """Shuffle all parts; the bytes of every shard."""
    given = {"summary": plan(folder, order), "blocks": blocks, "removed": [], "n_genes": N_GENES, **changes}
    files = {}
    for part in range(parts):
        out = folder / f"part{part}"
        said = shuffle_part(part=part, parts=parts, out=out, **given)
        assert json.loads((out / "part.json").read_text()) == said
        names = [shard["file"] for shard in said["shards"]]
        assert sorted(path.name for path in out.iterdir()) == sorted([*names, "part.json"])
        assert not set(names) & set(files)
        files |= {name: (out / name).read_bytes() for name in names}
    assert not list(folder.glob("*.tmp"))
    return files


@pytest.fixture(scope="module")
def blocks(all_cells, tmp_path_factory):
    return write_blocks(tmp_path_factory.mktemp("blocks"), *all_cells, ORDER, n=3, at_a_time=100)


@pytest.fixture(scope="module")
def expected(blocks, tmp_path_factory):
    return make(tmp_path_factory.mktemp("expected"), blocks)


def test_each_cell_once_in_the_order_of_its_key(all_cells, expected, tmp_path):
    cells, obs = all_cells
    assert len(expected) == 7
    row_of = {joinid: row for row, joinid in enumerate(cells.joinids.tolist())}
    seen = []
    for index, (split, number) in enumerate(ORDER.shards):
        path = tmp_path / f"{split}-{number:05d}.parquet"
        path.write_bytes(expected[path.name])
        got, got_obs = read_shard(path, n_genes=N_GENES)
        rows = np.array([row_of[joinid] for joinid in got.joinids.tolist()])
        assert same_cells(got, cells.take(rows))
        names = [name for name in obs.column_names if name != "n_measured_genes"]
        assert got_obs.select([*names, "n_measured_genes"]).to_pylist() == obs.take(rows).to_pylist()
        assert {split_of(joinid, ORDER) for joinid in got.joinids} == {split}
        keys = ORDER.keys(got.joinids)
        assert (np.diff(keys.astype(object)) > 0).all()
        assert (ORDER.shard_of(split, keys) == index).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(cells)))


@pytest.mark.parametrize(
    ("n", "at_a_time", "flush", "parts"), [(1, 10_000, 2**25, 1), (4, 33, 1, 3), (2, 500, 200_000, 9)]
)
def test_bytes_depend_on_the_cells_alone(all_cells, expected, tmp_path, monkeypatch, n, at_a_time, flush, parts):
    monkeypatch.setattr(writer, "FLUSH", flush)
    assert make(tmp_path, write_blocks(tmp_path, *all_cells, ORDER, n, at_a_time), parts) == expected


def test_bytes_are_those_of_a_shard_written_from_cells(all_cells, expected, tmp_path):
    """The shuffle decodes nothing, and yet writes what `ShardWriter` makes of the same cells."""
    cells, obs = all_cells
    rows = np.flatnonzero([split_of(joinid, ORDER) == "train" for joinid in cells.joinids])
    keys = ORDER.keys(cells.joinids[rows])
    rows = rows[np.argsort(keys)][ORDER.shard_of("train", np.sort(keys)) == 2]
    with ShardWriter(tmp_path / "x.parquet") as one:
        one.write(cells.take(rows), obs.take(rows))
    assert (tmp_path / "x.parquet").read_bytes() == expected["train-00002.parquet"]


def test_widths_of_integers_and_coding_of_strings_do_not_show(all_cells, blocks, tmp_path):
    cells, obs = all_cells
    narrow = CellBatch(
        cells.joinids, cells.offsets, cells.genes.astype(np.uint16), cells.counts.astype(np.uint32), cells.totals
    )
    coded = {name: obs[name].combine_chunks() for name in obs.column_names}
    coded = {name: a.dictionary_encode() if pa.types.is_string(a.type) else a for name, a in coded.items()}
    again = write_blocks(tmp_path, narrow, pa.table(coded), ORDER, n=3, at_a_time=100)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in blocks]


def test_a_benchmark_in_the_order_of_joinids(all_cells, tmp_path):
    order = Order("joinid", 0, {"all": [0, 500, 5_100]})
    make(tmp_path, write_blocks(tmp_path, *all_cells, order, n=2, at_a_time=300), order=order)
    got = [read_shard(tmp_path / "part0" / f"all-0000{number}.parquet")[0] for number in range(3)]
    assert [len(cells) for cells in got] == [500, 596, 300]
    assert same_cells(CellBatch.concatenate(got), all_cells[0])


def test_removed_cells_are_left_out_and_shards_keep_their_numbers(all_cells, blocks, expected, tmp_path):
    joinids = all_cells[0].joinids
    train = np.array([split_of(joinid, ORDER) == "train" for joinid in joinids])
    third = joinids[train & (ORDER.shard_of("train", ORDER.keys(joinids)) == 2)]
    pq.write_table(pa.table({"soma_joinid": third}), tmp_path / "leaks.parquet")
    pq.write_table(pa.table({"soma_joinid": joinids[[0, 3, 3]], "kept": [1, 2, 2]}), tmp_path / "duplicates.parquet")
    removed = [tmp_path / "leaks.parquet", tmp_path / "duplicates.parquet"]
    made = make(tmp_path / "run", blocks, 2, removed=removed)
    assert set(expected) - set(made) == {"train-00002.parquet"}
    kept = [read_shard(path)[0].joinids for path in (tmp_path / "run").glob("part*/*.parquet")]
    assert sorted(np.concatenate(kept)) == sorted(set(joinids) - set(third) - set(joinids[[0, 3]]))


def test_blocks_without_cells_and_no_cells_at_all(all_cells, blocks, expected, tmp_path):
    with BlockWriter(tmp_path / "none.blk", ORDER):
        pass
    assert make(tmp_path, [tmp_path / "none.blk", *blocks]) == expected
    assert make(tmp_path / "nothing", [tmp_path / "none.blk"], 2) == {}
    assert len(read_block(tmp_path / "none.blk", ORDER)[0]) == 0


def test_reading_a_block_alone(all_cells, tmp_path):
    cells, obs = all_cells
    nulls = obs.set_column(obs.column_names.index("library"), "library", pa.array([None, "b"] * (len(cells) // 2)))
    (path,) = write_blocks(tmp_path, cells, nulls, ORDER, n=1, at_a_time=700)
    got, got_obs = read_block(path, ORDER)
    rows = np.searchsorted(cells.joinids, got.joinids)
    assert same_cells(got, cells.take(rows))
    assert got_obs["library"].to_pylist() == nulls["library"].take(rows).to_pylist()
    some = obs.slice(0, 20).set_column(obs.column_names.index("library"), "library", pa.nulls(20))
    with BlockWriter(tmp_path / "nulls.blk", ORDER) as nothing_known:
        nothing_known.write(cells.slice(0, 20), some, "train")
    assert read_block(tmp_path / "nulls.blk", ORDER)[1]["library"].null_count == 20
    block = Block(path, ORDER)
    assert block.n_cells.sum() == len(cells)
    assert block.n_genes == cells.genes.max() + 1
    assert len(block.metadata) < 100


def killed(tmp_path: Path, blocks: list[Path], after: int) -> None:
    """A part that is killed once so many shards are finished."""
    program = f"""
import os, signal, sys
from pathlib import Path
from cellmill.shards import shuffle

write = shuffle._make_shard
def then_die(path, *rest):
    if len(list(path.parent.glob("*.json"))) == {after}:
        Path(path.with_name(path.name + ".tmp")).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, *rest)
shuffle._make_shard = then_die
shuffle.shuffle_part(summary=Path(sys.argv[1]), blocks=[Path(p) for p in sys.argv[3:]], removed=[], part=0, parts=1,
                     n_genes={N_GENES}, out=Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", program, str(plan(tmp_path)), str(tmp_path / "part0"), *map(str, blocks)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_part_goes_on(blocks, expected, tmp_path):
    killed(tmp_path, blocks, after=3)
    assert not (tmp_path / "part0").exists()
    finished = {path.name: os.stat(path).st_ino for path in (tmp_path / "part0.tmp").glob("*.parquet")}
    assert len(finished) == 3
    damaged = tmp_path / "part0.tmp" / sorted(finished)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    os.utime(damaged, (1, 1))
    old = {name: os.stat(tmp_path / "part0.tmp" / name).st_mtime_ns for name in finished}
    assert make(tmp_path, blocks) == expected
    new = {name: os.stat(tmp_path / "part0" / name).st_mtime_ns for name in finished}
    assert [name for name in finished if old[name] != new[name]] == [damaged.name]


def test_finished_shards_of_other_inputs_are_made_again(all_cells, blocks, expected, tmp_path):
    killed(tmp_path, blocks, after=3)
    pq.write_table(pa.table({"soma_joinid": all_cells[0].joinids[:200]}), tmp_path / "leaks.parquet")
    made = make(tmp_path, blocks, removed=[tmp_path / "leaks.parquet"])
    assert all(made[name] != content for name, content in expected.items())


def test_another_order_and_a_smaller_vocabulary(blocks, tmp_path):
    other = Order("hash", 1, ORDER.edges)
    with pytest.raises(CellmillError, match=r"block .*0\.blk was made for another plan; delete it and run again"):
        make(tmp_path, blocks, order=other)
    with pytest.raises(CellmillError, match="0.blk holds genes beyond the vocabulary of 1,000; delete it and run"):
        make(tmp_path, blocks, n_genes=1_000)
    assert not (tmp_path / "part0").exists()


def test_a_cell_in_two_blocks_and_other_columns(all_cells, blocks, tmp_path):
    with pytest.raises(CellmillError, match=r"the cell \d+ \(soma_joinid\) stands twice in the blocks of"):
        make(tmp_path, [blocks[0], blocks[1], blocks[0]])
    cells, obs = all_cells
    bare = write_blocks(tmp_path, cells, obs.drop_columns("library"), ORDER, n=1, at_a_time=5_000)
    with pytest.raises(CellmillError, match=r"has the columns dataset_id, .* others have .*library"):
        make(tmp_path, [blocks[1], *bare])


def test_missing_truncated_and_foreign_blocks(blocks, tmp_path):
    path = tmp_path / "0.blk"
    with pytest.raises(CellmillError, match="does not exist; run the rule that makes it again"):
        make(tmp_path, [path])
    content = blocks[0].read_bytes()
    for size in (0, 5, 1_000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CellmillError, match=r"0\.blk is damaged: .*; delete it and run again"):
            make(tmp_path, [path, *blocks[1:]])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(CellmillError, match="is no block of this cellmill"):
        make(tmp_path, [path])


def test_flipped_bits_never_pass_unseen(all_cells, tmp_path):
    """The same cells or a clear error, wherever the bit is."""
    cells, obs = all_cells
    (path,) = write_blocks(tmp_path, cells.slice(0, 60), obs.slice(0, 60), ORDER, n=1, at_a_time=60)
    content, expected = path.read_bytes(), read_block(path, ORDER)
    rng = np.random.default_rng(0)
    read = 0
    for at in rng.integers(0, len(content), 300):
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with contextlib.suppress(CellmillError):
            got = read_block(path, ORDER)
            read += 1
            assert same_cells(got[0], expected[0])
            assert got[1].to_pylist() == expected[1].to_pylist()
    assert read < 50


def test_bad_cells_and_errors_leave_nothing(all_cells, tmp_path):
    cells, obs = (part.slice(0, 10) for part in all_cells)

    def write(cells, obs, *more):
        with BlockWriter(tmp_path / "0.blk", ORDER) as block:
            block.write(cells, obs, "train")
            for other in more:
                block.write(cells, other, "train")

    doubled = CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, cells.totals // 2)
    for bad, said in (
        ((cells, obs.drop_columns("tissue")), "lacks tissue"),
        ((cells, obs.slice(1)), "10 cells came with 9 rows"),
        ((doubled, obs), "all measured genes"),
        ((cells, obs, obs.drop_columns("library")), "changed from one write to the next"),
    ):
        with pytest.raises(CellmillError, match=rf"0\.blk: .*{said}"):
            write(*bad)
        assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from cellmill.shards import writer
from cellmill.shards.order import Order
from cellmill.shards.reader import read_shard

cells, obs = read_shard(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
writer.FLUSH = 100_000
with writer.BlockWriter(sys.argv[2], Order("joinid", 0, {"all": [0]})) as block:
    for start in range(0, len(cells), 50):
        block.write(cells.slice(start, start + 50), obs.slice(start, 50), "all")
"""


@pytest.mark.parametrize("room", [0, 60_000, 300_000])
def test_no_room_on_the_disk(expected, tmp_path, room):
    (tmp_path / "a.parquet").write_bytes(expected["train-00000.parquet"])
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "a.parquet"), str(tmp_path / "b.blk"), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cellmill.errors.CellmillError: ")
    assert "b.blk could not be written (File too large)" in last
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    assert done.returncode == 1


def test_one_shard_is_in_memory_at_a_time(blocks, tmp_path, monkeypatch):
    """A shard, here a sixth of all cells, and one copy of it; the row group that is written is a whole shard here."""
    in_memory = []
    write_packed = ShardWriter.write_packed

    def watched(self, table):
        in_memory.append(pa.total_allocated_bytes())
        write_packed(self, table)

    monkeypatch.setattr(ShardWriter, "write_packed", watched)
    before = pa.total_allocated_bytes()
    make(tmp_path, blocks)
    assert max(in_memory) - before < sum(path.stat().st_size for path in blocks) / 2
    assert len(in_memory) == 7
