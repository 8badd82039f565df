"""Shard format v1: cells as rows of a parquet file, their genes and counts packed into bytes (``docs/shards.md``).

Packed binary cells, since parquet's own list encoding costs several times as much to read. All encoding and decoding is
vectorised over a row group.

Legend: B cells, N nonzeros of all cells together, E cells that are not empty, O overflown counts.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch

FORMAT, VERSION = "cellmill-shard", 1
MANIFEST = "manifest.json"
MAX_GENES = 65_536
"""Gene ids are 16 bits wide."""
MAX_COUNT = 2**31 - 1
"""Counts are int32 in memory."""
MAX_NONZEROS = 2**30
"""So that the bytes of their genes stay below 2 GiB, the limit of Arrow's 32-bit offsets."""
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

STRING = pa.dictionary(pa.int32(), pa.string())
FROM_CELLS = ("soma_joinid", "total_counts", "n_genes")
PACKED = ("genes", "genes_overflow", "counts", "counts_overflow")
OVERFLOWN = 255
"""The byte that says: the number is 255 or more and stands in the overflow."""


def shard_schema(extra: list[str]) -> pa.Schema:
    """The columns of a shard with further metadata columns `extra`, and the metadata that mark the file."""
    fields = [pa.field("soma_joinid", pa.int64(), nullable=False)]
    fields += [pa.field(name, STRING) for name in (*OBS_STRINGS, *extra)]
    fields += [
        pa.field("total_counts", pa.int64(), nullable=False),
        pa.field("n_measured_genes", pa.int32(), nullable=False),
        pa.field("n_genes", pa.int32(), nullable=False),
    ]
    fields += [pa.field(name, pa.binary(), nullable=False) for name in PACKED]
    return pa.schema(fields, metadata={"cellmill.format": FORMAT, "cellmill.version": str(VERSION)})


def encode_cells(cells: CellBatch) -> dict[str, pa.Array]:
    """Pack the nonzeros of `cells`, whose genes and counts may be integers of any width.

    Returns
    -------
    dict
        Binary arrays of B values: `genes` (differences of the ascending ids, the first one absolute) and `counts`, one
        byte each, `genes_overflow` (uint16) and `counts_overflow` (uint32) for every byte of 255, little-endian.

    Raises
    ------
    CellmillError
        If ids do not ascend or exceed 65,535, counts are below 1 or above 2,147,483,647, or there are 2^30 nonzeros
        or more at once.
    """
    offsets_B1, genes_N, counts_N = cells.offsets, cells.genes, cells.counts
    starts_E = offsets_B1[:-1][cells.lengths > 0]
    if len(genes_N):
        if genes_N.min() < 0 or genes_N.max() >= MAX_GENES:
            raise CellmillError(
                f"gene ids run from {genes_N.min()} to {genes_N.max()}, but shards hold ids from 0 to"
                f" {MAX_GENES - 1:,}; choose a vocabulary of at most {MAX_GENES:,} genes"
            )
        if counts_N.min() < 1 or counts_N.max() > MAX_COUNT:
            raise CellmillError(
                f"counts run from {counts_N.min()} to {counts_N.max()}, but shards hold nonzero raw counts"
                f" from 1 to {MAX_COUNT:,}; leave zeros out"
            )
        if len(genes_N) >= MAX_NONZEROS:
            raise CellmillError(f"{len(genes_N):,} counts cannot be packed at once; write fewer cells at a time")
    genes_N = genes_N.astype("<u2", copy=False)
    ascends_N = genes_N[1:] > genes_N[:-1]
    within_cells = len(ascends_N) - len(starts_E[1:])
    if np.count_nonzero(ascends_N) - np.count_nonzero(ascends_N[starts_E[1:] - 1]) != max(within_cells, 0):
        raise CellmillError("gene ids do not ascend within every cell; sort them and sum duplicates before writing")
    deltas_N = np.empty_like(genes_N)
    np.subtract(genes_N[1:], genes_N[:-1], out=deltas_N[1:])
    deltas_N[starts_E] = genes_N[starts_E]
    return {**_bytes_of("genes", deltas_N, "<u2", offsets_B1), **_bytes_of("counts", counts_N, "<u4", offsets_B1)}


def _bytes_of(name: str, values_N: np.ndarray, wide: str, offsets_B1: np.ndarray) -> dict[str, pa.Array]:
    """One byte for each value, and those that it cannot hold."""
    bytes_N = np.minimum(values_N, OVERFLOWN).astype(np.uint8)
    overflown_O = np.flatnonzero(bytes_N == OVERFLOWN)
    overflow_B1 = np.dtype(wide).itemsize * np.searchsorted(overflown_O, offsets_B1)
    return {
        name: _binary(bytes_N, offsets_B1),
        f"{name}_overflow": _binary(values_N[overflown_O].astype(wide), overflow_B1),
    }


def _binary(values: np.ndarray, offsets_B1: np.ndarray) -> pa.Array:
    """An Arrow binary array over the bytes of `values`, cut at `offsets_B1` (bytes)."""
    buffers = [None, pa.py_buffer(offsets_B1.astype(np.int32)), pa.py_buffer(values)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(offsets_B1) - 1, buffers)


def corrupt(path: str | Path, what: str) -> CellmillError:
    """The error for a damaged shard; one of a folder with a manifest is made again with the whole folder."""
    path = Path(path)
    remove = path.parent if (path.parent / MANIFEST).is_file() else path
    return CellmillError(f"shard {path} is corrupt: {what}; delete {remove} and run again")
