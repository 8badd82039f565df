"""From blocks to shards: the second half of a shuffle outside memory.

`BlockWriter` has put every cell with those of its shard; here the cells of one shard after the other are brought
together from all blocks. Genes and counts stay packed, and one shard is held at a time.

Legend: B cells of a shard, S shards of the selection.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import atomic, sha256, unwritable
from cellmill.progress import Progress
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import OBS_STRINGS, PACKED, ROW_GROUP, VERSION
from cellmill.shards.order import Order
from cellmill.shards.writer import BLOCK_FORMAT, BLOCK_SCHEMA, ShardWriter, checksum

PART = "part.json"
_LARGE = pa.schema([field.with_type(pa.large_binary()) if field.name in PACKED else field for field in BLOCK_SCHEMA])
"""The schema of a block whose values may take more than 2 GiB together."""
_PACKED_AS = {name: pa.binary() for name in PACKED}


def shuffle_part(
    *,
    summary: Path,
    blocks: list[Path],
    removed: list[Path],
    part: int,
    parts: int,
    n_genes: int,
    out: Path,
    code: str = "",
) -> dict:
    """Write one part of a selection's shards: a range of them, which no other part writes.

    The bytes of a shard depend on its cells alone. Shards are finished one by one in ``{out}.tmp``, so that a part
    that was killed goes on after the last finished one, where its inputs are the same.

    Parameters
    ----------
    summary
        ``plan.json`` of the selection.
    blocks
        What `BlockWriter` wrote of all cells.
    removed
        Parquet files whose `soma_joinid` are left out; a cell may stand in several.
    part, parts
        Number of this part, from 0, and of all; a part may have no shard.
    n_genes
        Genes in the vocabulary.
    out
        Folder with the shards ``{split}-{number}.parquet`` and ``part.json``. A shard whose cells were all removed is
        left out; the others keep their numbers.
    code
        Version of the code: what a killed run of another one finished is made again.

    Returns
    -------
    dict
        The content of ``part.json``: `selection`, `part`, and `shards`, each with its `split` and what a manifest says.

    Raises
    ------
    CellmillError
        A block is missing, damaged or of another plan or vocabulary, or two blocks hold one cell.
    """
    content = json.loads(Path(summary).read_text())
    order, out = Order(**content["order"]), Path(out)
    opened = [Block(path, order) for path in blocks]
    if wrong := [block.path for block in opened if block.n_genes > n_genes]:
        raise CellmillError(f"block {wrong[0]} holds genes beyond the vocabulary of {n_genes:,}; {_AGAIN}")
    metadata, first_of = _all_metadata(opened)
    removed_R = joinids_of(removed)
    inputs = _inputs(summary, blocks, removed, n_genes, code)

    unfinished = out.with_name(out.name + ".tmp")
    first, stop = (len(order.shards) * number // parts for number in (part, part + 1))
    cells_S = sum((block.n_cells for block in opened), np.zeros(len(order.shards), np.int64))
    shards = []
    with Progress(f"part {part}", int(cells_S[first:stop].sum())) as progress:
        for index in range(first, stop):
            split, number = order.shards[index]
            path = unfinished / f"{split}-{number:05d}.parquet"
            info = _finished(path, inputs)
            if info is None:
                info = _make_shard(path, opened, first_of, index, order, removed_R, metadata)
                with atomic(_note(path)) as temporary:
                    temporary.write_text(json.dumps({"inputs": inputs, "shard": info}))
            if info["cells"]:
                shards.append({"split": split, **info})
            progress.update(int(cells_S[first : index + 1].sum()))
    said = {"selection": content["selection"], "part": part, "shards": shards}
    with atomic(unfinished / PART) as temporary:
        temporary.write_text(json.dumps(said, indent=1) + "\n")
    _finish(unfinished, {PART, *(shard["file"] for shard in shards)}, out)
    return said


def _finish(unfinished: Path, files: set[str], out: Path) -> None:
    """Give the folder its name, with these files alone."""
    try:
        for path in unfinished.iterdir():
            if path.name not in files:
                path.unlink()
        shutil.rmtree(out, ignore_errors=True)
        os.replace(unfinished, out)
    except OSError as error:
        raise unwritable(out, error) from error


_AGAIN = "delete it and run again"


class Block:
    """Reads what `BlockWriter` wrote: the cells of one shard at a time.

    Parameters
    ----------
    path
        The block.
    order
        The order that it must have been written for.

    Attributes
    ----------
    metadata
        The distinct rows of metadata that the cells' column `metadata` counts: strings, and `n_measured_genes`.
    n_genes
        One more than the largest gene id.
    n_cells
        int64 [S], cells of each shard.

    Raises
    ------
    CellmillError
        The block is missing, damaged or of another order.
    """

    def __init__(self, path: str | Path, order: Order):
        self.path, self._shards = Path(path), len(order.shards)
        if not self.path.is_file():
            raise CellmillError(f"block {path} does not exist; run the rule that makes it again")
        with self._reading() as file:
            said = {key.decode(): value.decode() for key, value in (file.schema.metadata or {}).items()}
            batches = file.num_record_batches
            if (said.get("cellmill.format"), said.get("cellmill.version")) != (BLOCK_FORMAT, str(VERSION)):
                raise CellmillError(f"{path} is no block of this cellmill; {_AGAIN}")
            if Order(**json.loads(said["cellmill.order"])) != order:
                raise CellmillError(f"block {path} was made for another plan; {_AGAIN}")
            if batches % self._shards != 1 % self._shards:
                raise ValueError(f"it has {batches} batches")
            rows, said = self._batch(file, batches - 1)
            if len(rows) or zlib.crc32(said[b"metadata"]) != int(said[b"metadata_crc32"]):
                raise ValueError("its table of metadata has another checksum")
            self.metadata = pa.ipc.open_stream(said[b"metadata"]).read_all()
            self.n_genes = int(said[b"n_genes"])
            self.n_cells = np.array(json.loads(said[b"cells"]), np.int64)
            if len(self.n_cells) != self._shards:
                raise ValueError("it does not say how many cells it has")
        self._rounds = (batches - 1) // self._shards

    def cells(self, shard: int) -> list[pa.RecordBatch]:
        """The cells of one shard (its index in the order) as they lie in the block, with columns of `BLOCK_SCHEMA`."""
        if not self.n_cells[shard]:
            return []
        with self._reading() as file:
            batches = [self._batch(file, turn * self._shards + shard)[0] for turn in range(self._rounds)]
            if sum(map(len, batches)) != self.n_cells[shard]:
                raise ValueError(f"shard {shard} has {sum(map(len, batches))} cells, not {self.n_cells[shard]}")
        return [batch for batch in batches if len(batch)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[pa.ipc.RecordBatchFileReader]:
        try:
            with pa.OSFile(str(self.path)) as source:
                yield pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise CellmillError(f"block {self.path} is damaged: {' '.join(str(error).split())}; {_AGAIN}") from error

    @staticmethod
    def _batch(file: pa.ipc.RecordBatchFileReader, number: int) -> tuple[pa.RecordBatch, dict]:
        batch, said = file.get_batch_with_custom_metadata(number)
        batch.validate(full=True)
        if checksum(batch) != int(said[b"crc32"]):
            raise ValueError(f"batch {number} has another checksum")
        return batch, said


def read_block(path: str | Path, order: Order) -> tuple[CellBatch, pa.Table]:
    """All cells of a block in the order of the shards, unpacked, and their metadata."""
    from cellmill.shards.reader import decode_cells  # it imports torch, which the shuffle does without

    block = Block(path, order)
    batches = [batch for shard in range(len(order.shards)) for batch in block.cells(shard)]
    table = _packed_table(pa.Table.from_batches(batches, BLOCK_SCHEMA), block.metadata)
    return decode_cells(table, str(path)), table.drop_columns(PACKED)


def _make_shard(
    path: Path, blocks: list[Block], first_of: list[int], index: int, order: Order, removed_R, metadata: pa.Table
) -> dict:
    """Write the shard of this index in the order; returns what the manifest says of it."""
    cells = _cells_of_shard(blocks, first_of, index)
    joinid_B = cells["soma_joinid"].to_numpy()
    order_B = np.lexsort((joinid_B, order.keys(joinid_B)))
    twice = np.flatnonzero(np.diff(joinid_B[order_B]) == 0)
    if len(twice):
        raise CellmillError(
            f"the cell {joinid_B[order_B[twice[0]]]} (soma_joinid) stands twice in the blocks of "
            f"{blocks[0].path.parent}; delete it and run again"
        )
    order_B = order_B[~among(joinid_B[order_B], removed_R)]
    with ShardWriter(path) as writer:
        for start in range(0, len(order_B), ROW_GROUP):
            rows = order_B[start : start + ROW_GROUP]
            writer.write_packed(_packed_table(cells.take(rows), metadata))
    return writer.close()


def _cells_of_shard(blocks: list[Block], first_of: list[int], index: int) -> pa.Table:
    """The cells of a shard from all blocks, `metadata` counting the rows of all."""
    pieces = []
    for block, first in zip(blocks, first_of, strict=True):
        for batch in block.cells(index):
            numbers = pc.add(batch["metadata"], pa.scalar(first, pa.int32()))
            pieces.append(pa.Table.from_batches([batch.set_column(1, "metadata", numbers)]).cast(_LARGE))
    return pa.concat_tables(pieces).combine_chunks() if pieces else _LARGE.empty_table()


def _packed_table(cells: pa.Table, metadata: pa.Table) -> pa.Table:
    """Cells of a block with the columns of a shard."""
    rows = metadata.take(cells["metadata"])
    strings = [name for name in rows.column_names if name not in OBS_STRINGS and name != "n_measured_genes"]
    columns = {
        "soma_joinid": cells["soma_joinid"],
        **{name: rows[name] for name in (*OBS_STRINGS, *strings)},
        "total_counts": cells["total_counts"],
        "n_measured_genes": rows["n_measured_genes"],
        "n_genes": pc.binary_length(cells["counts"]).cast(pa.int32()),
        **{name: cells[name].cast(kind) for name, kind in _PACKED_AS.items()},
    }
    return pa.table(columns)


def _all_metadata(blocks: list[Block]) -> tuple[pa.Table, list[int]]:
    """The metadata rows of all blocks, dictionary-coded, and the first row of each block."""
    first_of, tables, n = [], [], 0
    for block in blocks:
        first_of.append(n)
        n += len(block.metadata)
        table, block.metadata = block.metadata, None
        if not len(table):  # a block without cells knows nothing of further columns
            continue
        if tables and tables[0].column_names != table.column_names:
            raise CellmillError(
                f"block {block.path} has the columns {', '.join(table.column_names)}, others have"
                f" {', '.join(tables[0].column_names)}; {_AGAIN}"
            )
        codes = [column.dictionary_encode() if pa.types.is_string(column.type) else column for column in table.columns]
        tables.append(pa.table(codes, names=table.column_names))
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in OBS_STRINGS}), first_of
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks(), first_of


def joinids_of(tables: list[Path]) -> np.ndarray:
    """int64, ascending, each once: the `soma_joinid` of some parquet files."""
    columns = [pq.read_table(path, columns=["soma_joinid"])["soma_joinid"].to_numpy() for path in tables]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *columns]))


def among(joinid_B: np.ndarray, joinid_R: np.ndarray) -> np.ndarray:
    """Bool [B], which of `joinid_B` are in `joinid_R` [R], which ascends."""
    place_B = np.searchsorted(joinid_R, joinid_B)
    return np.append(joinid_R, -1)[place_B] == joinid_B


def _inputs(summary: Path, blocks: list[Path], removed: list[Path], n_genes: int, code: str) -> str:
    """What the shards of this part are made from, as a hash."""
    # what another version of the code or of pyarrow writes may have other bytes
    said = [n_genes, code, pa.__version__, *(sha256(path) for path in (summary, *removed))]
    said += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path, blocks)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _finished(path: Path, inputs: str) -> dict | None:
    """What a killed run said of a shard that it finished from the same inputs, if the file is as it left it."""
    if not _note(path).is_file():
        return None
    said = json.loads(_note(path).read_text())
    whole = said["inputs"] == inputs and path.is_file() and sha256(path) == said["shard"]["sha256"]
    return said["shard"] if whole else None
