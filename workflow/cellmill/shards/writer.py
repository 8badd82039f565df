"""Writing shards, and the blocks that become shards, under a temporary name until the file is whole."""

import contextlib
import itertools
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import sha256, sync, unwritable
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import (
    FROM_CELLS,
    MAX_ROW_GROUP,
    OBS_STRINGS,
    PACKED,
    ROW_GROUP,
    STRING,
    VERSION,
    encode_cells,
    shard_schema,
)
from cellmill.shards.order import Order

BLOCK_FORMAT = "cellmill-block"
BLOCK_SCHEMA = pa.schema(
    [("soma_joinid", pa.int64()), ("metadata", pa.int32()), ("total_counts", pa.int64())]
    + [(name, pa.binary()) for name in PACKED]
)
FLUSH = 2**25
"""Nonzeros that a block holds in memory, 2 bytes each, before it writes them."""
_EMPTY = pa.RecordBatch.from_pylist([], BLOCK_SCHEMA)


def check_obs(
    path: Path, joinids_B: np.ndarray, totals_B: np.ndarray, lengths_B: np.ndarray, obs: pa.Table
) -> list[str]:
    """The metadata columns of strings that will be stored, or a `CellmillError` that names the file of `path`."""
    if obs.num_rows != len(joinids_B):
        raise CellmillError(f"{path.name}: {len(joinids_B)} cells came with {obs.num_rows} rows of metadata")
    missing = [name for name in (*OBS_STRINGS, "n_measured_genes") if name not in obs.column_names]
    if missing:
        raise CellmillError(f"{path.name}: the cells' metadata lacks {', '.join(missing)}; add these columns")
    from_cells = {"soma_joinid": joinids_B, "total_counts": totals_B, "n_genes": lengths_B}
    for name, values_B in from_cells.items():
        if name in obs.column_names and not np.array_equal(obs[name].to_numpy(), values_B):
            raise CellmillError(f"{path.name}: column {name} of the metadata contradicts the cells; drop it")
    measured = obs["n_measured_genes"]
    if not pa.types.is_integer(measured.type) or measured.null_count:
        raise CellmillError(f"{path.name}: column n_measured_genes must hold integers and no nulls")
    if (lengths_B > measured.to_numpy()).any():
        raise _too_many(path, "genes")
    names = [*OBS_STRINGS, *(n for n in obs.column_names if n not in (*OBS_STRINGS, *FROM_CELLS, "n_measured_genes"))]
    for name in names:
        kind = obs.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        # A column without any value, or of no rows, has the type null.
        strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if name in PACKED or not strings:
            raise CellmillError(f"{path.name}: column {name} of the metadata must hold strings, not {kind}")
    return names


def check_totals(path: Path, cells: CellBatch) -> None:
    """Raise `CellmillError`, naming the file of `path`, where a cell has more counts than it may have."""
    filled = np.flatnonzero(cells.lengths)
    if len(filled):
        sums = np.add.reduceat(cells.counts, cells.offsets[filled], dtype=np.int64)
        if (sums > cells.totals[filled]).any():
            raise _too_many(path, "counts")


def _too_many(path: Path, what: str) -> CellmillError:
    return CellmillError(
        f"{path.name}: a cell has more {what} in the vocabulary than in all measured genes (total_counts,"
        " n_measured_genes); these two must be taken before genes are left out"
    )


class ShardWriter:
    """Writes one shard, row group by row group, under a temporary name until it is complete.

    The bytes depend on the cells alone, not on how they were cut into calls of `write`.

    Parameters
    ----------
    path
        The file, such as ``train-00000.parquet``; it appears when `close` returns.
    row_group
        Cells per row group, at most 8,192.

    Examples
    --------
    >>> with ShardWriter("train-00000.parquet") as writer:  # doctest: +SKIP
    ...     writer.write(cells, obs)
    >>> writer.close()["cells"]  # doctest: +SKIP
    1937
    """

    def __init__(self, path: str | Path, *, row_group: int = ROW_GROUP):
        if not 1 <= row_group <= MAX_ROW_GROUP:
            raise CellmillError(f"a row group of {row_group} cells is not possible; choose 1 to {MAX_ROW_GROUP:,}")
        self.path = Path(path)
        self.row_group = row_group
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._tables: list[pa.Table] = []
        self._waiting = 0
        self._nonzeros = 0
        self._row_groups: list[int] = []
        self._info: dict | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def write(self, cells: CellBatch, obs: pa.Table) -> None:
        """Append cells.

        Parameters
        ----------
        cells
            B cells.
        obs
            B rows: the columns of `OBS_STRINGS` and any further ones as strings (plain or dictionary-coded), and
            `n_measured_genes` (integers). `soma_joinid`, `total_counts` and `n_genes` are taken from `cells`; where
            `obs` has them, they must agree.

        Raises
        ------
        CellmillError
            If a column is missing, of another type or contradicts `cells`, or a value does not fit the format.
        """
        names = check_obs(self.path, cells.joinids, cells.totals, cells.lengths, obs)
        check_totals(self.path, cells)
        self.write_packed(
            pa.table(
                {
                    "soma_joinid": cells.joinids,
                    **{name: obs[name] for name in names},
                    "total_counts": cells.totals,
                    "n_measured_genes": obs["n_measured_genes"].cast(pa.int32()),
                    "n_genes": cells.lengths.astype(np.int32),
                    **encode_cells(cells),
                }
            )
        )

    def write_packed(self, table: pa.Table) -> None:
        """Append cells that are packed: the columns of a shard in its order, strings plain or dictionary-coded."""
        extra = table.column_names[1 + len(OBS_STRINGS) : -3 - len(PACKED)]
        if self._schema is None:
            self._schema = shard_schema(extra)
        if self._schema.names != table.column_names:
            raise CellmillError(f"{self.path.name}: columns of the metadata changed from one write to the next")
        self._tables.append(table)
        self._waiting += len(table)
        if self._waiting < self.row_group:
            return
        table = _joined(self._tables)
        whole = self._waiting // self.row_group * self.row_group
        for start in range(0, whole, self.row_group):
            self._write_row_group(table.slice(start, self.row_group))
        self._tables = [table.slice(whole)]
        self._waiting -= whole

    def close(self) -> dict:
        """Write the last cells and give the file its name.

        Returns
        -------
        dict
            `file` (name without folder), `cells`, `nonzeros`, `bytes`, `sha256`, `row_groups` (cells of each).
        """
        if self._info is not None:
            return self._info
        try:
            if self._waiting:
                self._write_row_group(_joined(self._tables))
            self._open().close()
            sync(self._temporary)
            self._info = {
                "file": self.path.name,
                "cells": sum(self._row_groups),
                "nonzeros": self._nonzeros,
                "bytes": self._temporary.stat().st_size,
                "sha256": sha256(self._temporary),
                "row_groups": self._row_groups,
            }
            os.replace(self._temporary, self.path)
        except OSError as error:
            self._abort()
            raise unwritable(self.path, error) from error
        except BaseException:
            self._abort()
            raise
        return self._info

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            schema = self._schema or shard_schema([])
            strings = [field.name for field in schema if field.type == STRING]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._temporary,
                schema,
                compression="zstd",
                use_dictionary=strings,
                write_statistics=[name for name in schema.names if name not in PACKED],
                write_page_checksum=True,
            )
        return self._writer

    def _write_row_group(self, table: pa.Table) -> None:
        # Dictionaries are made anew for each row group, so that their order depends on its cells alone.
        columns = [column.combine_chunks() for column in table.columns]
        columns = [column.dictionary_encode() if pa.types.is_string(column.type) else column for column in columns]
        try:
            self._open().write_table(pa.table(columns, schema=self._schema), row_group_size=self.row_group)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._row_groups.append(len(table))
        self._nonzeros += int(pc.sum(table["n_genes"]).as_py() or 0)

    def _abort(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk is still full; the file goes now
                self._writer.close()
        self._temporary.unlink(missing_ok=True)


def _joined(tables: list[pa.Table]) -> pa.Table:
    """One table of all, its strings no longer coded, so that dictionaries need not agree."""
    plain = [
        pa.table({name: _plain(column) for name, column in zip(table.column_names, table.columns, strict=True)})
        for table in tables
    ]
    return plain[0] if len(plain) == 1 else pa.concat_tables(plain)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    binary = pa.types.is_binary(column.type) or pa.types.is_integer(column.type)
    return column if binary else column.cast(pa.string())


class BlockWriter:
    """Writes the curated cells of one block, each straight to the shard that it belongs to (``docs/shards.md``).

    An Arrow IPC file, since it must be cheap to write, and cheap to read in pieces: one batch for every shard of the
    order, in turn, whenever enough cells have gathered. A cell's metadata are a row number of the table of distinct
    metadata, which comes last. Each batch carries the CRC-32 of its values.

    Parameters
    ----------
    path
        The file; it appears when `close` returns.
    order
        The order of the selection's cells.

    Examples
    --------
    >>> with BlockWriter("0.arrow", order) as writer:  # doctest: +SKIP
    ...     writer.write(cells, obs, "train")
    """

    def __init__(self, path: str | Path, order: Order):
        self.path, self.order = Path(path), order
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._shards = len(order.shards)
        self._cells = np.zeros(self._shards, np.int64)
        self._metadata = _DistinctRows(self.path)
        self._waiting: list[pa.Table] = []
        self._nonzeros = self._n_genes = 0
        self._file = self._writer = None

    def __enter__(self) -> "BlockWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(self._temporary), "wb")
            said = {"cellmill.format": BLOCK_FORMAT, "cellmill.version": str(VERSION)}
            schema = BLOCK_SCHEMA.with_metadata(said | {"cellmill.order": json.dumps(self.order.as_dict())})
            self._writer = pa.ipc.new_file(self._file, schema, options=pa.ipc.IpcWriteOptions(use_threads=False))
        except OSError as error:
            self._abort()
            raise unwritable(self.path, error) from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._close()
        except OSError as failure:
            raise unwritable(self.path, failure) from failure
        finally:
            self._abort()

    def write(self, cells: CellBatch, obs: pa.Table, split: str) -> None:
        """Append cells of one split; cells, obs and errors as in `ShardWriter.write`."""
        check_totals(self.path, cells)
        table = {"soma_joinid": cells.joinids, "total_counts": cells.totals, **encode_cells(cells)}
        self.write_packed(pa.table(table), obs, split, n_genes=int(cells.genes.max(initial=0)) + 1)

    def write_packed(self, cells: pa.Table, obs: pa.Table, split: str, *, n_genes: int) -> None:
        """Append cells of one split that are packed.

        Parameters
        ----------
        cells
            B rows: `soma_joinid`, `total_counts`, and the packed columns of a shard.
        obs
            B rows, as `ShardWriter.write` takes them.
        split
            Name of the split.
        n_genes
            One more than the largest gene id of the cells.

        Raises
        ------
        CellmillError
            As `ShardWriter.write`.
        """
        joinids_B, lengths_B = cells["soma_joinid"].to_numpy(), pc.binary_length(cells["counts"]).to_numpy()
        names = check_obs(self.path, joinids_B, cells["total_counts"].to_numpy(), lengths_B, obs)
        if not len(cells):
            return
        numbers = self._metadata.number(obs.select([*names, "n_measured_genes"]))
        shard_B = self.order.shard_of(split, self.order.keys(joinids_B))
        cells = cells.append_column("metadata", pa.array(numbers)).append_column("shard", pa.array(shard_B))
        self._waiting.append(cells)
        self._nonzeros += int(lengths_B.sum())
        self._n_genes = max(self._n_genes, n_genes)
        if self._nonzeros >= FLUSH:
            try:
                self._flush()
            except OSError as error:
                raise unwritable(self.path, error) from error

    def _flush(self) -> None:
        """Write what waits: for every shard one batch, which may be empty."""
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._nonzeros = [], 0
        joinids_B, shard_B = table["soma_joinid"].to_numpy(), table["shard"].to_numpy()
        order_B = np.lexsort((joinids_B, self.order.keys(joinids_B), shard_B))
        edges = np.searchsorted(shard_B[order_B], np.arange(self._shards + 1))
        self._cells += np.diff(edges)
        table = table.select(BLOCK_SCHEMA.names).cast(BLOCK_SCHEMA)
        for start, stop in itertools.pairwise(edges):
            self._write_batch(table.take(order_B[start:stop]))

    def _write_batch(self, table: pa.Table, **said: str | bytes) -> None:
        batch = table.combine_chunks().to_batches()[0] if len(table) else _EMPTY
        self._writer.write_batch(batch, custom_metadata={"crc32": str(checksum(batch)), **said})

    def _close(self) -> None:
        if self._waiting:
            self._flush()
        rows = self._metadata.serialized()
        self._write_batch(
            BLOCK_SCHEMA.empty_table(),
            metadata=rows,
            metadata_crc32=str(zlib.crc32(rows)),
            n_genes=str(self._n_genes),
            cells=json.dumps(self._cells.tolist()),
        )
        self._writer.close()
        self._file.close()
        sync(self._temporary)
        os.replace(self._temporary, self.path)

    def _abort(self) -> None:
        """Leave nothing behind but the whole file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk is still full; the file goes now
                self._file.close()
        self._temporary.unlink(missing_ok=True)


def checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 over the values of a batch of a block."""
    crc = zlib.crc32(len(batch).to_bytes(8, "little"))
    for column in batch.columns:
        if pa.types.is_binary(column.type):
            _, offsets, data = column.buffers()
            ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1] if offsets else []
            crc = zlib.crc32(np.diff(ends), crc)
            crc = zlib.crc32(data[ends[0] : ends[-1]], crc) if data and len(ends) else crc
        else:
            crc = zlib.crc32(column.to_numpy(), crc)
    return crc


class _DistinctRows:
    """Numbers the distinct rows of metadata, of which there are few: cells share data set, donor, cell type, ..."""

    def __init__(self, path: Path):
        self._path = path
        self._names: list[str] | None = None
        self._numbers: dict[tuple, int] = {}

    def number(self, obs: pa.Table) -> np.ndarray:
        """int32 [B], the number of each row; equal rows have one number."""
        if self._names is None:
            self._names = obs.column_names
        elif set(self._names) != set(obs.column_names):
            raise CellmillError(f"{self._path.name}: columns of the metadata changed from one write to the next")
        kind_B = np.zeros(len(obs), np.int64)
        for name in self._names:
            column = obs[name].combine_chunks()
            if not pa.types.is_integer(column.type):
                column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
                column = column.indices.fill_null(-1)
            values_B = column.to_numpy().astype(np.int64)
            span = values_B.max() - values_B.min() + 1
            _, kind_B = np.unique(kind_B * span + values_B - values_B.min(), return_inverse=True)
        _, first, kind_B = np.unique(kind_B, return_index=True, return_inverse=True)
        appeared = np.argsort(first)  # numbers are given in this order, which no coding of the strings changes
        rows = zip(*(obs[name].take(first[appeared]).to_pylist() for name in self._names), strict=True)
        numbers = np.empty(len(first), np.int32)
        numbers[appeared] = [self._numbers.setdefault(row, len(self._numbers)) for row in rows]
        return numbers[kind_B]

    def serialized(self) -> bytes:
        """The distinct rows in the order of their numbers, as an Arrow IPC stream."""
        names = self._names or [*OBS_STRINGS, "n_measured_genes"]
        columns = list(zip(*self._numbers, strict=True)) or [()] * len(names)
        kinds = [pa.int32() if name == "n_measured_genes" else pa.string() for name in names]
        arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
        table = pa.table(dict(zip(names, arrays, strict=True)))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return sink.getvalue().to_pybytes()
