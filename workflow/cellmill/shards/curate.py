"""One block of planned cells: read their counts from the Census, check them, apply the last QC rule, write a shard.

Legend: B cells of one read, N nonzeros of one read, V_all genes of the Census, V genes in the vocabulary.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from cellmill.census.read import open_census, suggest
from cellmill.config import Census, Quality
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.progress import Progress
from cellmill.qc import MITO_RULE
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import OBS_STRINGS
from cellmill.shards.writer import ShardWriter
from cellmill.vocabulary import Vocabulary, is_mitochondrial

TILE = 2048
"""Rows of a tile of X in the Census: reads that end at tile edges decompress no tile twice."""
CELLS_PER_READ = 2048
STALE_PLAN = "the plan names cells that this Census does not have; plan the selection anew"
QC_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.dictionary(pa.int32(), pa.string())),
        ("raw_sum", pa.int64()),
        ("nnz", pa.int64()),
        ("mito_fraction", pa.float64()),
        ("removed_by", pa.string()),
    ]
)


def curate_block(
    census: Census,
    path: Path | None,
    *,
    plan: Path,
    block: int,
    vocabulary: Path,
    organism: str,
    quality: Quality,
    extra_obs: list[str],
    out: Path,
    qc: Path,
) -> None:
    """Write the cells of one block in shard format, and the per-cell QC of all that were planned.

    Cells keep the order of their joinids. Counts are read `CELLS_PER_READ` cells at a time, whole tiles together, so
    memory does not grow with the block. A cell's mitochondrial share is taken over all genes of the Census, those
    outside the vocabulary too; it is null, and removes nothing, where the cell's data set measured none of those.

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    plan
        ``plan.parquet`` of the selection.
    block
        Number of the block; it may hold no cell.
    vocabulary
        ``vocabulary.parquet``.
    organism
        Organism of the Census.
    quality
        Its `max_mito_fraction` is applied here; the other rules were applied by the plan.
    extra_obs
        Further columns of obs to keep.
    out
        Shard with the cells that are kept.
    qc
        Parquet with the columns of `QC_SCHEMA`; `removed_by` is null for the cells that are kept.

    Raises
    ------
    CellmillError
        A count is not a non-negative integer, obs and X disagree, a joinid of the plan is not in the Census, or the
        Census has no column of `extra_obs`.
    """
    genes = Vocabulary.read(vocabulary)
    joinids = pq.read_table(plan, columns=["soma_joinid"], filters=[("block", "=", block)])["soma_joinid"].to_numpy()
    with (
        open_census(census, path) as collection,
        atomic(qc) as qc_temporary,
        pq.ParquetWriter(qc_temporary, QC_SCHEMA, compression="zstd") as qc_writer,
        ShardWriter(out) as writer,
        Progress(f"block {block}", len(joinids)) as progress,
    ):
        reader = _Reader(collection, organism, genes, extra_obs)
        for start, stop in _reads(joinids):
            cells, obs, mito_B = reader.read(joinids[start:stop])
            removed_B = mito_B > quality.max_mito_fraction  # False where the share is NaN
            qc_writer.write_table(_qc_table(cells, obs, mito_B, removed_B))
            kept = np.flatnonzero(~removed_B)
            writer.write(cells.take(kept), obs.drop_columns(["raw_sum", "nnz"]).take(kept))
            progress.update(stop)


class _Reader:
    """Reads planned cells with their metadata, and checks one against the other."""

    def __init__(self, collection, organism: str, vocabulary: Vocabulary, extra_obs: list[str]):
        experiment = collection["census_data"][organism]
        rna = experiment.ms["RNA"]
        var = rna.var.read(column_names=["soma_joinid", "feature_id", "feature_name"]).concat()
        joinid_V = var["soma_joinid"].to_numpy()
        n_var = int(joinid_V.max()) + 1
        self.obs, self.X = experiment.obs, rna.X["raw"]
        self.organism, self.n_genes = organism, len(vocabulary)
        # gene id of each var joinid, -1 outside the vocabulary
        id_of = {feature_id: number for number, feature_id in enumerate(vocabulary.feature_ids)}
        self.gene_of = np.full(n_var, -1)
        self.gene_of[joinid_V] = [id_of.get(feature_id, -1) for feature_id in var["feature_id"].to_pylist()]
        if np.count_nonzero(self.gene_of >= 0) != len(vocabulary):
            raise CellmillError("the vocabulary names genes that this Census does not have; build it from this Census")
        self.is_mito = np.zeros(n_var, bool)
        self.is_mito[joinid_V] = is_mitochondrial(var["feature_name"])
        self.measured_mito = self._measured_mito(collection, rna)
        strings = [name for name in OBS_STRINGS if name != "organism"]
        for name in extra_obs:
            if name not in self.obs.schema.names:
                close = suggest(name, self.obs.schema.names)
                raise CellmillError(f"census.extra_obs names '{name}', a column that the Census's obs lacks{close}")
        self.strings = strings + [name for name in extra_obs if name not in strings]

    def _measured_mito(self, collection, rna) -> set[str]:
        """Data sets that measured at least one mitochondrial gene (presence matrix)."""
        datasets = collection["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat()
        name_of = dict(zip(datasets["soma_joinid"].to_pylist(), datasets["dataset_id"].to_pylist(), strict=True))
        measured = set()
        presence = rna["feature_dataset_presence_matrix"]
        for part in presence.read((slice(None), pa.array(np.flatnonzero(self.is_mito)))).tables():
            present = part["soma_data"].to_numpy().astype(bool)
            measured.update(name_of[row] for row in np.unique(part["soma_dim_0"].to_numpy()[present]))
        return measured

    def read(self, joinids_B: np.ndarray) -> tuple[CellBatch, pa.Table, np.ndarray]:
        """Cells in the vocabulary, their metadata (with obs's raw_sum and nnz), float64 [B] mitochondrial share."""
        # One slice is far quicker than a list of points, unless few cells of its range are wanted.
        span = joinids_B[-1] - joinids_B[0] + 1
        coords = slice(int(joinids_B[0]), int(joinids_B[-1])) if span <= 2 * len(joinids_B) else pa.array(joinids_B)
        obs = self._read_obs(coords, joinids_B)
        row_N, var_N, count_N = self._read_X(coords, joinids_B)
        dataset_B = obs["dataset_id"].to_pylist()
        faulty = np.flatnonzero((count_N < 0) | (count_N != np.floor(count_N)) | ~np.isfinite(count_N))
        if len(faulty):
            row = row_N[faulty[0]]
            raise CellmillError(
                f"data set {dataset_B[row]}, cell {joinids_B[row]} (soma_joinid) has a count of {count_N[faulty[0]]:g} "
                "in X['raw']; counts must be raw: non-negative integers"
            )
        count_N = count_N.astype(np.int64)
        total_B = np.bincount(row_N, weights=count_N, minlength=len(joinids_B)).astype(np.int64)
        nnz_B = np.bincount(row_N[count_N > 0], minlength=len(joinids_B))
        raw_sum_B = obs["raw_sum"].to_numpy()
        wrong = np.flatnonzero((total_B != raw_sum_B) | (nnz_B != obs["nnz"].to_numpy()))
        if len(wrong):
            row = wrong[0]
            raise CellmillError(
                f"data set {dataset_B[row]}, cell {joinids_B[row]} (soma_joinid): obs says {raw_sum_B[row]:.0f} counts "
                f"in {obs['nnz'][row]} genes, X['raw'] holds {total_B[row]} in {nnz_B[row]}; build the Census anew"
            )
        mito_B = np.bincount(row_N, weights=count_N * self.is_mito[var_N], minlength=len(joinids_B))
        mito_B /= np.maximum(total_B, 1)
        mito_B[[dataset_id not in self.measured_mito for dataset_id in dataset_B]] = np.nan

        gene_N = self.gene_of[var_N]
        keep = (gene_N >= 0) & (count_N > 0)
        matrix = sp.csr_array((count_N[keep], (row_N[keep], gene_N[keep])), shape=(len(joinids_B), self.n_genes))
        matrix.sort_indices()
        cells = CellBatch(
            joinids=joinids_B,
            offsets=matrix.indptr.astype(np.int64),
            genes=matrix.indices.astype(np.int64),
            counts=matrix.data,
            totals=total_B,
        )
        return cells, obs, mito_B

    def _read_obs(self, coords, joinids_B: np.ndarray) -> pa.Table:
        if joinids_B[-1] > self.obs.domain[0][1]:
            raise CellmillError(STALE_PLAN)
        names = ["soma_joinid", *self.strings, "n_measured_vars", "raw_sum", "nnz"]
        table = self.obs.read((coords,), column_names=names, result_order="row-major").concat()
        found = table["soma_joinid"].to_numpy()
        rows = np.minimum(np.searchsorted(found, joinids_B), max(len(found) - 1, 0))
        if not len(found) or (found[rows] != joinids_B).any():
            raise CellmillError(STALE_PLAN)
        table = table.take(rows)
        columns = {name: table[name].cast(pa.string()) for name in self.strings}
        columns["organism"] = pa.array([self.organism] * len(table))
        columns["n_measured_genes"] = table["n_measured_vars"].cast(pa.int32())
        return pa.table({**columns, "raw_sum": table["raw_sum"], "nnz": table["nnz"]})

    def _read_X(self, coords, joinids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row (position in `joinids_B`), var joinid and count (float) of every stored value."""
        rows, genes, counts = [], [], []
        is_range = joinids_B[-1] - joinids_B[0] + 1 == len(joinids_B)
        for table in self.X.read((coords,)).tables():
            joinid_N, gene_N, count_N = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            if is_range:
                row_N = joinid_N - joinids_B[0]
            else:  # a slice holds cells that were not planned, too
                row_N = np.searchsorted(joinids_B, joinid_N)
                wanted = joinids_B[np.minimum(row_N, len(joinids_B) - 1)] == joinid_N
                row_N, gene_N, count_N = row_N[wanted], gene_N[wanted], count_N[wanted]
            rows.append(row_N)
            genes.append(gene_N)
            counts.append(count_N)
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        return np.concatenate(rows), np.concatenate(genes), np.concatenate(counts)


def _reads(joinids: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending joinids into ranges [start, stop) of positions: whole tiles, about `CELLS_PER_READ` cells each."""
    if not len(joinids):
        return []
    tile = joinids // TILE
    read = np.searchsorted(tile, tile) // CELLS_PER_READ  # the read that the first cell of a cell's tile falls in
    edges = np.flatnonzero(np.diff(read)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(joinids)], strict=True))


def _qc_table(cells: CellBatch, obs: pa.Table, mito_B: np.ndarray, removed_B: np.ndarray) -> pa.Table:
    columns = [
        cells.joinids,
        obs["dataset_id"].combine_chunks().dictionary_encode(),
        cells.totals,
        obs["nnz"],
        pa.array(mito_B, from_pandas=True),  # NaN becomes null
        pa.array([MITO_RULE if removed else None for removed in removed_B], pa.string()),
    ]
    return pa.table(columns, schema=QC_SCHEMA)
