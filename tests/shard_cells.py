"""Real cells as the shards room takes them; gene id = column number of the h5ad."""

from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import OBS_STRINGS, ROW_GROUP
from cellmill.shards.manifest import write_manifest
from cellmill.shards.order import Order
from cellmill.shards.writer import BlockWriter, ShardWriter
from scipy.sparse import csr_matrix

HASH = "0" * 64


def real_cells(data: Path, name: str, first_joinid: int = 0) -> tuple[CellBatch, pa.Table]:
    """All cells of ``cells/NAME.h5ad`` and their metadata; what the file does not say is 'unknown'."""
    adata = anndata.read_h5ad(data / "cells" / f"{name}.h5ad")
    x = csr_matrix(adata.X)
    x.eliminate_zeros()
    x.sort_indices()
    cells = CellBatch(
        joinids=np.arange(first_joinid, first_joinid + x.shape[0]),
        offsets=x.indptr.astype(np.int64),
        genes=x.indices.astype(np.int64),
        counts=x.data.astype(np.int64),
        totals=np.asarray(x.sum(axis=1)).ravel().astype(np.int64),
    )
    known = {"cell_type": "cell_type", "library": "batch"}
    obs = {name: ["unknown"] * len(cells) for name in (*OBS_STRINGS, "library")}
    obs |= {name: adata.obs[source].astype(str).tolist() for name, source in known.items() if source in adata.obs}
    obs["dataset_id"] = [name] * len(cells)
    obs["n_measured_genes"] = np.full(len(cells), adata.n_vars, np.int32)
    return cells, pa.table(obs)


def write_shards(folder: Path, splits: dict, *, n_genes: int, cells_per_shard: int, row_group: int = ROW_GROUP) -> Path:
    """A folder of shards from ``{split: (cells, obs)}``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, (cells, obs) in splits.items():
        written[split] = []
        for number, start in enumerate(range(0, len(cells), cells_per_shard)):
            stop = min(start + cells_per_shard, len(cells))
            with ShardWriter(folder / f"{split}-{number:05d}.parquet", row_group=row_group) as writer:
                writer.write(cells.slice(start, stop), obs.slice(start, stop - start))
            written[split].append(writer.close())
    write_manifest(
        folder,
        organism="homo_sapiens",
        census={"path": "tests"},
        selection={"quality": {"primary_only": True}},
        vocabulary_hash=HASH,
        n_genes=n_genes,
        splits=written,
    )
    return folder


def write_blocks(folder: Path, cells: CellBatch, obs: pa.Table, order: Order, n: int, at_a_time: int) -> list[Path]:
    """`n` blocks of neighbouring cells; every seventh joinid is of the split validation, if there is one."""
    paths = []
    for block, rows in enumerate(np.array_split(np.arange(len(cells)), n)):
        paths.append(folder / f"{block}.blk")
        with BlockWriter(paths[-1], order) as writer:
            for start in range(0, len(rows), at_a_time):
                some = rows[start : start + at_a_time]
                for split in order.edges:
                    mine = some[[split_of(joinid, order) == split for joinid in cells.joinids[some]]]
                    writer.write(cells.take(mine), obs.take(mine), split)
    return paths


def split_of(joinid: int, order: Order) -> str:
    """The split that `write_blocks` puts a cell in."""
    split = "train" if joinid % 7 else "validation"
    return split if split in order.edges else next(iter(order.edges))


def same_cells(a: CellBatch, b: CellBatch) -> bool:
    """Whether two batches hold the same cells in the same order."""
    fields = ("joinids", "offsets", "genes", "counts", "totals")
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in fields)
