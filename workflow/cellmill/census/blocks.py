"""How a planned selection is cut into blocks and shards, and what its jobs will cost.

Legend: B cells of one table, U units (pairs of dataset_id and donor_id), P tiles of X with planned cells.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.census.scan import passed_cells, work
from cellmill.files import atomic

PLAN_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("block", pa.int32()),
        ("nnz", pa.int64()),
    ]
)
NEAR = 0.25
"""A cut goes to the nearest edge of a tile, if that is at most this share of a block away."""
NONZEROS_PER_SHARD = 2**27
"""Shards hold no more, about: a shard is sorted in memory."""

# Measured on a 2-core machine (docs/log.md); `make bench` measures them anew.
BYTES_PER_NONZERO = 1.0
"""Of finished shards, for each nonzero of all genes."""
CURATE_NS = 50
"""CPU time of reading, checking and packing one nonzero, on a machine that does nothing else."""
SHUFFLE_NS = 14
"""CPU time of putting one nonzero in its place in its shard."""
JOB_SECONDS = 2
"""CPU time of starting one job."""
JOB_MB = 450
"""Memory of a job with nothing read."""
READ_MB = 400
"""Memory of a read of some million nonzeros, beside its buffers."""
BUFFERS = 5
"""Read buffers of `census.buffer_mb` that a curating job fills, about, with what it makes of them."""
SHUFFLE_BYTES_PER_NONZERO = 8
"""Memory of the shard that is being sorted."""


def cut(edges_P: np.ndarray, total: int, n_blocks: int) -> np.ndarray:
    """Where blocks begin, but for the first: int64 [n_blocks - 1], the work before each.

    Blocks shall hold equal work, and no two of them decompress the same tile of X. So each cut goes to the edge of a
    tile, where one is near; only where blocks are hardly larger than tiles it goes through one.

    Parameters
    ----------
    edges_P
        Ascending: the work before the first planned cell of each tile.
    total
        All work.
    n_blocks
        Number of blocks.
    """
    wanted = np.array([number * total // n_blocks for number in range(1, n_blocks)], np.int64)
    if not len(edges_P):
        return wanted
    right = np.minimum(np.searchsorted(edges_P, wanted), len(edges_P) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(wanted - edges_P[left] < edges_P[right] - wanted, edges_P[left], edges_P[right])
    return np.where(abs(nearest - wanted) <= NEAR * total / n_blocks, nearest, wanted)


def write_plan(
    passed: Path,
    limits_GM2: np.ndarray | None,
    plan: Path,
    *,
    units: list[tuple[str, str]],
    splits_U: list[str],
    cuts: np.ndarray,
    cells_per_shard: int,
) -> tuple[list[dict], list[int]]:
    """Write ``plan.parquet`` from the cells that passed.

    Parameters
    ----------
    passed, limits_GM2
        As `cellmill.census.scan.passed_cells` takes them.
    plan
        Parquet with the columns of `PLAN_SCHEMA`, in the order of the joinids.
    units, splits_U
        The pairs of dataset_id and donor_id, and the split of each.
    cuts
        From `cut`.
    cells_per_shard
        Cells of a shard that holds a range of joinids.

    Returns
    -------
    blocks : list of dict
        Number, cells, nonzeros, first and last joinid, and number of data sets of each block.
    edges : list of int
        Joinid of every `cells_per_shard`-th cell; the first is 0.
    """
    dataset_names = sorted({dataset_id for dataset_id, _ in units})
    split_names = sorted(set(splits_U))
    dataset_of_U = np.searchsorted(dataset_names, [dataset_id for dataset_id, _ in units]).astype(np.int32)
    split_of_U = np.searchsorted(split_names, splits_U).astype(np.int32)
    blocks = [
        {"block": number, "cells": 0, "nonzeros": 0, "joinids": None, "datasets": set()}
        for number in range(len(cuts) + 1)
    ]
    edges, cells_before, work_before = [], 0, 0
    with atomic(plan) as temporary, pq.ParquetWriter(temporary, PLAN_SCHEMA, compression="zstd") as writer:
        for cells, is_outlier_B in passed_cells(passed, limits_GM2):
            joinid_B, unit_B, nnz_B = (cells[name][~is_outlier_B] for name in ("soma_joinid", "unit", "nnz"))
            work_B = work(nnz_B)
            block_B = np.searchsorted(cuts, work_before + np.cumsum(work_B) - work_B, side="right").astype(np.int32)
            for number in np.unique(block_B):
                block, mask_B = blocks[number], block_B == number
                joinids = joinid_B[mask_B]
                block["cells"] += len(joinids)
                block["nonzeros"] += int(nnz_B[mask_B].sum())
                block["joinids"] = [block["joinids"][0] if block["joinids"] else int(joinids[0]), int(joinids[-1])]
                block["datasets"].update(np.unique(dataset_of_U[unit_B[mask_B]]).tolist())
            edges += joinid_B[-cells_before % cells_per_shard :: cells_per_shard].tolist()
            cells_before, work_before = cells_before + len(joinid_B), work_before + int(work_B.sum())
            columns = [
                joinid_B,
                pa.DictionaryArray.from_arrays(dataset_of_U[unit_B], pa.array(dataset_names)),
                pa.DictionaryArray.from_arrays(split_of_U[unit_B], pa.array(split_names)),
                block_B,
                nnz_B,
            ]
            writer.write_table(pa.table(columns, schema=PLAN_SCHEMA))
    return [block | {"datasets": len(block["datasets"])} for block in blocks], [0, *edges[1:]]


def n_shards(cells: int, nonzeros: int, cells_per_shard: int) -> int:
    """Number of shards of a split: none holds many more than `cells_per_shard` cells, or `NONZEROS_PER_SHARD`."""
    return max(-(-cells // cells_per_shard), -(-nonzeros // NONZEROS_PER_SHARD))


def predict_block(nonzeros: int, buffer_mb: int) -> dict:
    """CPU seconds and memory of the job that curates a block."""
    read_mb = min(READ_MB + BUFFERS * buffer_mb, nonzeros * 40 / 1e6)
    return {"seconds": round(JOB_SECONDS + nonzeros * CURATE_NS / 1e9, 1), "memory_mb": round(JOB_MB + read_mb)}


def predict(blocks: list[dict], largest_shard: int) -> dict:
    """Bytes of the shards, CPU seconds of all jobs together, and memory of the largest.

    Parameters
    ----------
    blocks
        With what `predict_block` says of each.
    largest_shard
        Its nonzeros, about.
    """
    nonzeros = sum(block["nonzeros"] for block in blocks)
    shuffle = JOB_SECONDS * len(blocks) + nonzeros * SHUFFLE_NS / 1e9
    shuffle_mb = JOB_MB + largest_shard * SHUFFLE_BYTES_PER_NONZERO / 1e6
    return {
        "bytes": round(nonzeros * BYTES_PER_NONZERO),
        "seconds": round(sum(block["seconds"] for block in blocks) + shuffle, 1),
        "memory_mb": round(max(shuffle_mb, *(block["memory_mb"] for block in blocks))),
    }
