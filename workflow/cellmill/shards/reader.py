"""Reading shards: row groups, decoded and checked.

Legend: B cells, N nonzeros of all cells together, E cells that are not empty, O overflown counts.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import (
    FORMAT,
    FROM_CELLS,
    MAX_COUNT,
    MAX_GENES,
    OVERFLOWN,
    PACKED,
    VERSION,
    corrupt,
    shard_schema,
)

_DAMAGE = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises on a damaged file."""
_COLUMNS = tuple(shard_schema([]).names)


def decode_cells(table: pa.Table, where: str, n_genes: int = MAX_GENES, coded: tuple[str, ...] = ()) -> CellBatch:
    """Unpack one row group, or any rows of some; the inverse of `encode_cells`.

    Parameters
    ----------
    table
        Columns `soma_joinid`, `total_counts`, `n_genes` and the packed ones, B rows.
    where
        Names the file in errors.
    n_genes
        Genes in the vocabulary, V.
    coded
        Further columns of `table`, of integers, for the batch's `codes`.

    Raises
    ------
    CellmillError
        If the columns contradict each other, an id is not below `n_genes` or an overflow holds a wrong number.
    """
    columns = {name: numbers(table[name]) for name in (*FROM_CELLS, *coded)}
    return unpack(columns, {name: _one_chunk(table[name]) for name in PACKED}, where, n_genes)


def unpack(columns: dict[str, np.ndarray], packed: dict[str, pa.Array], where: str, n_genes: int) -> CellBatch:
    """`decode_cells`, where the numbers are numpy arrays; all but those of `FROM_CELLS` become `codes`.

    A few passes over all nonzeros, each quickest where they fit the processor's cache: some hundred thousand.
    """
    gene_bytes_N, gene_offsets_B1 = packed_bytes(packed["genes"])
    count_bytes_N, offsets_B1 = packed_bytes(packed["counts"])
    lengths_B = offsets_B1[1:] - offsets_B1[:-1]
    if not np.array_equal(gene_offsets_B1, offsets_B1) or not np.array_equal(lengths_B, columns["n_genes"]):
        raise corrupt(where, "the lengths of genes, counts and n_genes differ")
    filled_B = lengths_B > 0
    starts_E = offsets_B1[:-1][filled_B]
    if len(gene_bytes_N) - np.count_nonzero(gene_bytes_N) != np.count_nonzero(gene_bytes_N[starts_E] == 0):
        raise corrupt(where, "gene ids do not ascend")
    if count_bytes_N.min(initial=1) == 0:
        raise corrupt(where, "a count is zero")
    genes_N, excess_B = _widened(gene_bytes_N, offsets_B1, packed["genes_overflow"], "<u2", where, "genes")
    counts_N, _ = _widened(count_bytes_N, offsets_B1, packed["counts_overflow"], "<u4", where, "counts")
    if len(starts_E):
        last_E = np.add.reduceat(gene_bytes_N, starts_E, dtype=np.int64) + excess_B[filled_B]
        if last_E.max() >= n_genes:
            raise corrupt(where, f"gene id {last_E.max()} lies beyond the vocabulary of {n_genes} genes")
        genes_N[starts_E[1:]] -= last_E[:-1].astype(np.int32)  # so that the sums begin anew with each cell
        torch.from_numpy(genes_N).cumsum_(0)  # several times as fast as numpy's
    return CellBatch(
        joinids=columns["soma_joinid"],
        offsets=offsets_B1,
        genes=genes_N,
        counts=counts_N,
        totals=columns["total_counts"],
        codes={name: codes_B for name, codes_B in columns.items() if name not in FROM_CELLS},
    )


def _widened(
    bytes_N: np.ndarray, offsets_B1: np.ndarray, overflow: pa.Array, wide: str, where: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """The values whose bytes are `bytes_N`; those of 255 and more stand in `overflow`.

    Returns
    -------
    int32 [N]; int64 [B], by how much the sum of each cell's values exceeds that of its bytes.
    """
    overflow_bytes, overflow_offsets_B1 = packed_bytes(overflow)
    overflown_O = np.flatnonzero(bytes_N == OVERFLOWN)
    first_B1 = overflown_O.searchsorted(offsets_B1)
    if not np.array_equal(overflow_offsets_B1, np.dtype(wide).itemsize * first_B1):
        raise corrupt(where, f"{name}_overflow does not match the {name} of 255")
    overflow_O = overflow_bytes.view(wide).astype(np.int64)
    outside = (overflow_O < OVERFLOWN) | (overflow_O > MAX_COUNT)
    if outside.any():
        raise corrupt(where, f"{name}_overflow holds {overflow_O[outside][0]:,}")
    values_N = bytes_N.astype(np.int32)
    values_N[overflown_O] = overflow_O
    excess_O1 = np.zeros(len(overflow_O) + 1, np.int64)
    np.cumsum(overflow_O - OVERFLOWN, out=excess_O1[1:])
    excess_B1 = excess_O1[first_B1]
    return values_N, excess_B1[1:] - excess_B1[:-1]


def packed_bytes(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a (large) binary column, one value after the other, and int64 [B + 1] where each value starts."""
    _, offsets, data = array.buffers()
    offsets_B1 = np.zeros(1, np.int64)
    if len(array):
        width = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets_B1 = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    values = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return values[offsets_B1[0] : offsets_B1[-1]], offsets_B1 - offsets_B1[0]


def numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of integers. Arrow's own `to_numpy` would import pandas where it is installed, which takes time."""
    return np.from_dlpack(_one_chunk(column))


def as_column(values_B: np.ndarray) -> pa.Array:
    """Integers for Arrow, whose own way to take them would import pandas."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values_B))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values_B.dtype), len(values_B), buffers)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _open_shard(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise CellmillError(f"shard {path} does not exist; run the rule that makes it again")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except _DAMAGE as error:
        raise corrupt(path, " ".join(str(error).split())) from error
    schema = file.schema_arrow  # made anew at each call
    metadata = schema.metadata or {}
    if metadata.get(b"cellmill.format") != FORMAT.encode():
        raise CellmillError(f"{path} is a parquet file but no shard of cellmill; name a file that cellmill wrote")
    if metadata.get(b"cellmill.version") != str(VERSION).encode():
        version = metadata.get(b"cellmill.version", b"?").decode()
        raise CellmillError(
            f"shard {path} has format version {version}, this cellmill reads {VERSION}; update cellmill"
        )
    missing = [name for name in _COLUMNS if name not in schema.names]
    if missing:
        raise corrupt(path, f"it has no column {', '.join(missing)}")
    return file


def _obs_names(file: pq.ParquetFile, columns: list[str] | None, path: Path) -> list[str]:
    """The metadata columns asked for, in the order of the file."""
    names = [name for name in file.schema_arrow.names if name not in PACKED]
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


def read_packed(path: str | Path, group: int, categories: dict[str, list[str]] | None = None) -> pa.Table:
    """One row group as it is stored, for `decode_cells`: the packed columns and the numbers that belong to them.

    Parameters
    ----------
    path
        A shard.
    group
        Index of the row group.
    categories
        Metadata columns that are read, too, each as int32: a value's place in the list given here, -1 if it has none.

    Raises
    ------
    CellmillError
        If the file is missing, corrupt or of an unknown version, or a column of `categories` is none of text.
    """
    path, categories = Path(path), categories or {}
    with _open_shard(path) as file:
        if categories:
            _obs_names(file, list(categories), path)
        table = _read_group(file, group, [*FROM_CELLS, *PACKED, *categories], path)
    for column, values in categories.items():
        if not pa.types.is_dictionary(table.schema.field(column).type):
            raise CellmillError(f"column {column} of shard {path} holds no text; categories can be of text alone")
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, _codes(table[column], values))
    return table


def _codes(column: pa.ChunkedArray, values: list[str]) -> pa.Array:
    """int32 [B], the place in `values` of each entry of a dictionary-coded column; -1 for null and all others."""
    array = _one_chunk(column.unify_dictionaries())
    places = {value: place for place, value in enumerate(values)}
    # one entry more, for nulls: their index is -1
    place_of = np.array([places.get(value, -1) for value in array.dictionary.to_pylist()] + [-1], np.int32)
    indices = pc.coalesce(array.indices, as_column(np.full(len(array), -1, np.int32)))
    return as_column(place_of[np.from_dlpack(indices)])


def _read_group(file: pq.ParquetFile, group: int, columns: list[str], path: Path) -> pa.Table:
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
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
        wanted = list(dict.fromkeys([*names, *FROM_CELLS, *PACKED]))
        for group in groups:
            table = _read_group(file, group, wanted, path)
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
    none, narrow = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return CellBatch(none, np.zeros(1, np.int64), narrow, narrow, none)
