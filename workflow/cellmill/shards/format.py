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
PACKED = ("genes", "counts", "counts_overflow")
OVERFLOWN = 255


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
    overflown_O = np.flatnonzero(cells.counts >= OVERFLOWN)
    return {
        "genes": _binary(deltas_N.astype("<u2"), 2 * offsets_B1),
        "counts": _binary(np.minimum(cells.counts, OVERFLOWN).astype(np.uint8), offsets_B1),
        "counts_overflow": _binary(
            cells.counts[overflown_O].astype("<u4"), 4 * np.searchsorted(overflown_O, offsets_B1)
        ),
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
