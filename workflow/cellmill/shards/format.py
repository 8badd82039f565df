"""Shard format v1: cells as rows of a parquet file, their genes and counts packed into bytes (``docs/shards.md``).

Packed binary cells, since parquet's own list encoding costs several times as much to read. All encoding and decoding is
vectorised over a row group.

Legend: B cells, N nonzeros of all cells together, E cells that are not empty, O overflown counts.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import sha256, sync, unwritable
from cellmill.shards.batch import CellBatch

FORMAT, VERSION = "cellmill-shard", 1
MANIFEST = "manifest.json"
MAX_GENES = 65_536
"""Gene ids are 16 bits wide."""
ROW_GROUP = 2048
MAX_ROW_GROUP = 8192
"""So that the bytes of a row group's genes stay below 2 GiB, the limit of Arrow's 32-bit offsets."""

OBS_STRINGS = (
    "dataset_id",
    "cell_type",
    "tissue",
    "tissue_general",
    "assay",
    "disease",
    "sex",
    "development_stage",
    "donor_id",
    "suspension_type",
    "organism",
)
"""Columns that every cell must have, beside `n_measured_genes`."""

_STRING = pa.dictionary(pa.int32(), pa.string())
_FROM_CELLS = ("soma_joinid", "total_counts", "n_genes")
_PACKED = ("genes", "counts", "counts_overflow")
_OVERFLOWN = 255
_DAMAGE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on a damaged file."""


def encode_cells(cells: CellBatch) -> dict[str, pa.Array]:
    """Pack the nonzeros of `cells`.

    Returns
    -------
    dict
        Binary arrays of B values: `genes` (uint16 differences of the ascending ids, the first one absolute), `counts`
        (one byte each) and `counts_overflow` (uint32 for every byte of 255), all little-endian.

    Raises
    ------
    CellmillError
        If ids do not ascend or exceed 65,535, or counts are below 1 or above 4,294,967,295.
    """
    offsets_B1 = cells.offsets
    deltas_N = np.diff(cells.genes, prepend=0)
    starts_E = offsets_B1[:-1][cells.lengths > 0]
    deltas_N[starts_E] = cells.genes[starts_E]
    if len(deltas_N):
        if cells.genes.min() < 0 or cells.genes.max() >= MAX_GENES:
            raise CellmillError(
                f"gene ids run from {cells.genes.min()} to {cells.genes.max()}, but shards hold ids from 0 to"
                f" {MAX_GENES - 1:,}; choose a vocabulary of at most {MAX_GENES:,} genes"
            )
        if np.count_nonzero(deltas_N < 1) != np.count_nonzero(deltas_N[starts_E] < 1):
            raise CellmillError("gene ids do not ascend within every cell; sort them and sum duplicates before writing")
        if cells.counts.min() < 1 or cells.counts.max() > 0xFFFFFFFF:
            raise CellmillError(
                f"counts run from {cells.counts.min()} to {cells.counts.max()}, but shards hold nonzero raw counts"
                " from 1 to 4,294,967,295; leave zeros out"
            )
    overflown_O = np.flatnonzero(cells.counts >= _OVERFLOWN)
    return {
        "genes": _binary(deltas_N.astype("<u2"), 2 * offsets_B1),
        "counts": _binary(np.minimum(cells.counts, _OVERFLOWN).astype(np.uint8), offsets_B1),
        "counts_overflow": _binary(
            cells.counts[overflown_O].astype("<u4"), 4 * np.searchsorted(overflown_O, offsets_B1)
        ),
    }


def decode_cells(table: pa.Table, where: str, n_genes: int = MAX_GENES) -> CellBatch:
    """Unpack one row group; the inverse of `encode_cells`.

    Parameters
    ----------
    table
        Columns `soma_joinid`, `total_counts`, `n_genes` and the three packed ones, B rows.
    where
        Names the file in errors.
    n_genes
        Genes in the vocabulary, V.

    Raises
    ------
    CellmillError
        If the columns contradict each other or an id is not below `n_genes`.
    """
    genes_bytes, genes_offsets_B1 = _bytes(table["genes"])
    counts_N, offsets_B1 = _bytes(table["counts"])
    overflow_bytes, overflow_offsets_B1 = _bytes(table["counts_overflow"])
    lengths_B = np.diff(offsets_B1)
    if not np.array_equal(genes_offsets_B1, 2 * offsets_B1) or not np.array_equal(
        lengths_B, _numbers(table["n_genes"])
    ):
        raise corrupt(where, "the lengths of genes, counts and n_genes differ")

    deltas_N = genes_bytes.view("<u2")
    starts_E = offsets_B1[:-1][lengths_B > 0]
    if np.count_nonzero(deltas_N == 0) != np.count_nonzero(deltas_N[starts_E] == 0):
        raise corrupt(where, "gene ids do not ascend")
    genes_N = deltas_N.astype(np.int64)
    if len(starts_E):
        # One cumulative sum over all cells, which falls back to zero where a cell starts.
        last_E = np.add.reduceat(genes_N, starts_E)
        if last_E.max() >= n_genes:
            raise corrupt(where, f"gene id {last_E.max()} lies beyond the vocabulary of {n_genes} genes")
        genes_N[starts_E[1:]] -= last_E[:-1]
        np.cumsum(genes_N, out=genes_N)

    overflown_O = np.flatnonzero(counts_N == _OVERFLOWN)
    if not np.array_equal(overflow_offsets_B1, 4 * np.searchsorted(overflown_O, offsets_B1)):
        raise corrupt(where, "counts_overflow does not match the counts of 255")
    if not counts_N.all():
        raise corrupt(where, "a count is zero")
    counts_N = counts_N.astype(np.int64)
    counts_N[overflown_O] = overflow_bytes.view("<u4")
    return CellBatch(
        joinids=_numbers(table["soma_joinid"]),
        offsets=offsets_B1,
        genes=genes_N,
        counts=counts_N,
        totals=_numbers(table["total_counts"]),
    )


def _binary(values: np.ndarray, offsets_B1: np.ndarray) -> pa.Array:
    """An Arrow binary array over the bytes of `values`, cut at `offsets_B1` (bytes)."""
    buffers = [None, pa.py_buffer(offsets_B1.astype(np.int32)), pa.py_buffer(values)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(offsets_B1) - 1, buffers)


def _bytes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a binary column, one value after the other, and int64 [B + 1] where each value starts."""
    array = column.combine_chunks()
    _, offsets, data = array.buffers()
    offsets_B1 = np.zeros(1, np.int64)
    if len(array):
        offsets_B1 = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    values = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return values[offsets_B1[0] : offsets_B1[-1]], offsets_B1 - offsets_B1[0]


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of integers. Arrow's own `to_numpy` would import pandas where it is installed, which takes time."""
    return np.from_dlpack(column.combine_chunks())


def corrupt(path: str | Path, what: str) -> CellmillError:
    """The error for a damaged shard; one of a folder with a manifest is made again with the whole folder."""
    path = Path(path)
    remove = path.parent if (path.parent / MANIFEST).is_file() else path
    return CellmillError(f"shard {path} is corrupt: {what}; delete {remove} and run again")


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
        self._cells: list[CellBatch] = []
        self._obs: list[pa.Table] = []
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
        obs = self._check(cells, obs)
        self._cells.append(cells)
        self._obs.append(obs)
        self._waiting += len(cells)
        if self._waiting < self.row_group:
            return
        cells, obs = CellBatch.concatenate(self._cells), pa.concat_tables(self._obs)
        whole = self._waiting // self.row_group * self.row_group
        for start in range(0, whole, self.row_group):
            self._write_row_group(cells.slice(start, start + self.row_group), obs.slice(start, self.row_group))
        self._cells, self._obs = [cells.slice(whole, len(cells))], [obs.slice(whole)]
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
                self._write_row_group(CellBatch.concatenate(self._cells), pa.concat_tables(self._obs))
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

    def _check(self, cells: CellBatch, obs: pa.Table) -> pa.Table:
        """The columns of `obs` as they are stored, or a `CellmillError`."""
        if obs.num_rows != len(cells):
            raise CellmillError(f"{self.path.name}: {len(cells)} cells came with {obs.num_rows} rows of metadata")
        missing = [name for name in (*OBS_STRINGS, "n_measured_genes") if name not in obs.column_names]
        if missing:
            raise CellmillError(f"{self.path.name}: the cells' metadata lacks {', '.join(missing)}; add these columns")
        from_cells = {"soma_joinid": cells.joinids, "total_counts": cells.totals, "n_genes": cells.lengths}
        for name, values_B in from_cells.items():
            if name in obs.column_names and not np.array_equal(obs[name].to_numpy(), values_B):
                raise CellmillError(f"{self.path.name}: column {name} of the metadata contradicts the cells; drop it")
        measured = obs["n_measured_genes"]
        if not pa.types.is_integer(measured.type) or measured.null_count:
            raise CellmillError(f"{self.path.name}: column n_measured_genes must hold integers and no nulls")
        sums_B = np.diff(np.concatenate([[0], np.cumsum(cells.counts)])[cells.offsets])
        if (sums_B > cells.totals).any() or (cells.lengths > measured.to_numpy()).any():
            raise CellmillError(
                f"{self.path.name}: a cell has more counts or genes in the vocabulary than in all measured genes"
                " (total_counts, n_measured_genes); these two must be taken before genes are left out"
            )
        names = [*OBS_STRINGS, *(n for n in obs.column_names if n not in (*OBS_STRINGS, *_FROM_CELLS))]
        columns = {}
        for name in names:
            if name == "n_measured_genes":
                continue
            kind = obs.schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            # A column without any value, or of no rows, has the type null.
            strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            if name in _PACKED or not strings:
                raise CellmillError(f"{self.path.name}: column {name} of the metadata must hold strings, not {kind}")
            columns[name] = obs[name].cast(pa.string())
        columns["n_measured_genes"] = measured.cast(pa.int32())
        checked = pa.table(columns)
        if self._schema is None:
            self._schema = _schema([n for n in columns if n not in (*OBS_STRINGS, "n_measured_genes")])
        elif not set(checked.column_names) <= set(self._schema.names) or len(columns) + 6 != len(self._schema):
            raise CellmillError(f"{self.path.name}: columns of the metadata changed from one write to the next")
        return checked

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            schema = self._schema or _schema([])
            strings = [field.name for field in schema if field.type == _STRING]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._temporary,
                schema,
                compression="zstd",
                use_dictionary=strings,
                write_statistics=[name for name in schema.names if name not in _PACKED],
                write_page_checksum=True,
            )
        return self._writer

    def _write_row_group(self, cells: CellBatch, obs: pa.Table) -> None:
        columns = {
            "soma_joinid": pa.array(cells.joinids, pa.int64()),
            "total_counts": pa.array(cells.totals, pa.int64()),
            "n_genes": pa.array(cells.lengths.astype(np.int32)),
            **encode_cells(cells),
        }
        for name in obs.column_names:
            # Dictionaries are made anew for each row group, so that their order depends on its cells alone.
            values = obs[name].combine_chunks()
            columns[name] = values.dictionary_encode() if pa.types.is_string(values.type) else values
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        try:
            self._open().write_table(table, row_group_size=self.row_group)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._row_groups.append(len(cells))
        self._nonzeros += len(cells.genes)

    def _abort(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk is still full; the file goes now
                self._writer.close()
        self._temporary.unlink(missing_ok=True)


def _schema(extra: list[str]) -> pa.Schema:
    fields = [pa.field("soma_joinid", pa.int64(), nullable=False)]
    fields += [pa.field(name, _STRING) for name in (*OBS_STRINGS, *extra)]
    fields += [
        pa.field("total_counts", pa.int64(), nullable=False),
        pa.field("n_measured_genes", pa.int32(), nullable=False),
        pa.field("n_genes", pa.int32(), nullable=False),
    ]
    fields += [pa.field(name, pa.binary(), nullable=False) for name in _PACKED]
    return pa.schema(fields, metadata={"cellmill.format": FORMAT, "cellmill.version": str(VERSION)})


def _open_shard(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise CellmillError(f"shard {path} does not exist; run the rule that makes it again")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except _DAMAGE as error:
        raise corrupt(path, " ".join(str(error).split())) from error
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(b"cellmill.format") != FORMAT.encode():
        raise CellmillError(f"{path} is a parquet file but no shard of cellmill; name a file that cellmill wrote")
    if metadata.get(b"cellmill.version") != str(VERSION).encode():
        version = metadata.get(b"cellmill.version", b"?").decode()
        raise CellmillError(
            f"shard {path} has format version {version}, this cellmill reads {VERSION}; update cellmill"
        )
    missing = [name for name in _schema([]).names if name not in file.schema_arrow.names]
    if missing:
        raise corrupt(path, f"it has no column {', '.join(missing)}")
    return file


def _obs_names(file: pq.ParquetFile, columns: list[str] | None, path: Path) -> list[str]:
    """The metadata columns asked for, in the order of the file."""
    names = [name for name in file.schema_arrow.names if name not in _PACKED]
    unknown = [name for name in columns or [] if name not in names]
    if unknown:
        raise CellmillError(f"shard {path} has no column {', '.join(unknown)}; it has {', '.join(names)}")
    return names if columns is None else [name for name in names if name in columns]


def read_obs(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """The metadata columns of a shard (all but the packed ones, or those named), one row per cell."""
    path = Path(path)
    with _open_shard(path) as file:
        names = _obs_names(file, columns, path)
        try:
            return file.read(columns=names, use_threads=False).unify_dictionaries()
        except _DAMAGE as error:
            raise corrupt(path, " ".join(str(error).split())) from error


def read_row_groups(
    path: str | Path, groups: list[int], columns: list[str] | None = None, *, n_genes: int = MAX_GENES
) -> tuple[CellBatch, pa.Table]:
    """Cells of some row groups, in the order of `groups`.

    Parameters
    ----------
    path
        A shard.
    groups
        Indices of row groups.
    columns
        Metadata columns to return; None for all, an empty list for none.
    n_genes
        Genes in the vocabulary; ids beyond it are an error.

    Returns
    -------
    cells : CellBatch
    obs : pyarrow.Table
        The metadata columns of the same cells; strings are dictionary-coded.

    Raises
    ------
    CellmillError
        If the file is missing, corrupt or of an unknown version.
    """
    path = Path(path)
    batches, tables = [], []
    with _open_shard(path) as file:
        names = _obs_names(file, columns, path)
        wanted = list(dict.fromkeys([*names, *_FROM_CELLS, *_PACKED]))
        for group in groups:
            try:
                table = file.read_row_group(group, columns=wanted, use_threads=False)
            except _DAMAGE as error:
                raise corrupt(path, " ".join(str(error).split())) from error
            batches.append(decode_cells(table, str(path), n_genes))
            tables.append(table.select(names))
        if not groups:
            return _no_cells(), file.schema_arrow.empty_table().select(names)
    cells = batches[0] if len(batches) == 1 else CellBatch.concatenate(batches)
    return cells, pa.concat_tables(tables).unify_dictionaries()


def read_shard(path: str | Path, *, n_genes: int = MAX_GENES) -> tuple[CellBatch, pa.Table]:
    """All cells of a shard; see `read_row_groups`."""
    with _open_shard(Path(path)) as file:
        groups = list(range(file.num_row_groups))
    return read_row_groups(path, groups, n_genes=n_genes)


def _no_cells() -> CellBatch:
    none = np.zeros(0, np.int64)
    return CellBatch(none, np.zeros(1, np.int64), none, none, none)
