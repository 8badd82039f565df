"""One block of planned cells: read their counts from the Census, check them, finish quality control, write them.

A thread reads the Census one table ahead, while compiled loops (`cellmill.shards.kernels`) work on the last one. What
is in memory is two tables, the cells of one read and the metadata of `CELLS_PER_OBS_READ`: it does not grow with the
block.

Legend: B cells of one read, V_all genes of the Census, V genes in the vocabulary, G groups of fingerprints.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cellmill.census.read import open_census, suggest
from cellmill.census.vocabulary import is_mitochondrial, is_ribosomal
from cellmill.config import Census, Quality
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.fingerprints import GROUPS, PRINTS_SCHEMA, comparable_groups, comparable_prints, gene_keys
from cellmill.progress import Progress
from cellmill.qc import X_RULES, text_codes, thresholds
from cellmill.shards import kernels
from cellmill.shards.format import OBS_STRINGS, OVERFLOWN, PACKED
from cellmill.shards.order import Order
from cellmill.shards.writer import BlockWriter
from cellmill.vocabulary import Vocabulary

TILE = 2048
"""Rows of a tile of X in the Census: reads that end at tile edges decompress no tile twice."""
NONZEROS_PER_READ = 8_000_000
"""Planned nonzeros of one read, unless a single tile holds more."""
CELLS_PER_OBS_READ = 2**16
STALE_PLAN = "the plan names cells that this Census does not have; plan the selection anew"
QC_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.dictionary(pa.int32(), pa.string())),
        ("assay", pa.dictionary(pa.int32(), pa.string())),
        ("raw_sum", pa.int64()),
        ("nnz", pa.int64()),
        ("mito_fraction", pa.float64()),
        ("ribo_fraction", pa.float64()),
        ("doublet_score", pa.float64()),
        ("removed_by", pa.string()),
    ]
)

kernels.load()


def curate_block(
    census: Census,
    path: Path | None,
    *,
    plan: Path,
    summary: Path,
    block: int,
    vocabulary: Path,
    organism: str,
    quality: Quality,
    extra_obs: list[str],
    doublets: list[Path],
    out: Path,
    qc: Path,
    prints: Path,
) -> None:
    """Write the kept cells of one block, the QC of all that were planned, and fingerprints of those that are kept.

    Shares of counts are over all genes of the Census, those outside the vocabulary too; a share is null, and removes
    nothing, where the cell's data set measured no gene of its kind.

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    plan, summary
        ``plan.parquet`` and ``plan.json`` of the selection.
    block
        Number of the block; it may hold no cell.
    vocabulary
        ``vocabulary/{organism}.parquet``.
    organism
        Organism of the Census.
    quality
        The thresholds of `cellmill.qc.X_RULES` are applied here; the other rules were applied by the plan.
    extra_obs
        Further columns of obs to keep.
    doublets
        Parquets ``soma_joinid, doublet_score`` that hold the block's cells among others; a cell without a score stays.
    out
        The kept cells, as `cellmill.shards.writer.BlockWriter` writes them.
    qc
        Parquet with the columns of `QC_SCHEMA`, in the order of joinids; `removed_by` is null for cells that are kept.
    prints
        Parquet with the columns of `cellmill.fingerprints.PRINTS_SCHEMA`, in the order of joinids.

    Raises
    ------
    CellmillError
        A count is not a non-negative integer, obs and X disagree, a joinid of the plan is not in the Census, the
        Census has no column of `extra_obs`, or it cannot be read to the end.
    """
    content = json.loads(Path(summary).read_text())
    genes = Vocabulary.read(vocabulary)
    joinids = content["blocks"][block]["joinids"] or (0, -1)
    scores = _DoubletScores(doublets, joinids)
    done = 0
    with (
        open_census(census, path) as collection,
        _table_writer(qc, QC_SCHEMA) as qc_writer,
        _table_writer(prints, PRINTS_SCHEMA, use_dictionary=["dataset_id"]) as prints_writer,
        BlockWriter(out, Order(**content["order"])) as writer,
        Progress(f"block {block}", content["blocks"][block]["cells"]) as progress,
    ):
        source = _Source(collection, organism, genes, extra_obs)
        for cells, table in _ahead(source.stream(_reads(plan, block), last=joinids[1])):
            if table is not None:
                cells.add(table)
                continue
            cells.check()
            values = {
                "max_mito_fraction": source.share(cells, kernels.MITO),
                "max_ribo_fraction": source.share(cells, kernels.RIBO),
                "max_doublet_score": scores.of(cells.joinids_B),
            }
            rule_B = _first_broken(quality, cells.obs["assay"], values)
            qc_writer.write_table(_qc_table(cells, values, rule_B))
            prints_BG = np.zeros((len(cells), GROUPS), np.uint64)
            kept_B = rule_B == len(X_RULES)
            split_B, splits = text_codes(cells.planned["split"])
            for code, split in enumerate(splits):
                rows = np.flatnonzero(kept_B & (split_B == code))
                packed, n_genes, prints_BG[rows] = cells.pack(rows)
                writer.write_packed(packed, cells.obs.select(source.kept_columns).take(rows), split, n_genes=n_genes)
            prints_writer.write_table(_prints_table(cells, prints_BG, np.flatnonzero(kept_B)))
            done += len(cells)
            progress.update(done)


class _Cells:
    """The planned cells of one read: their metadata, and their counts as they come in."""

    def __init__(self, planned: pa.Table, obs: pa.Table, source: "_Source"):
        self.planned, self.obs, self.source = planned, obs, source
        self.joinids_B = planned["soma_joinid"].to_numpy()
        room_B = obs["nnz"].to_numpy()
        self.state_BS = kernels.new_state(room_B)
        self.first_B = self.state_BS[:, kernels.NEXT].copy()
        self.nonzeros = int(room_B.sum())

    def __len__(self) -> int:
        return len(self.joinids_B)

    @property
    def pairs(self) -> np.ndarray:
        """Genes and counts so far. The next cells will use the same memory, so these must be packed before."""
        return self.source.room(self.nonzeros)

    def add(self, table: pa.Table) -> None:
        """Take in a table of X; others' counts in it are passed over."""
        for batch in table.to_batches():
            stored = [batch[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")]
            faulty = kernels.gather(*stored, self.joinids_B, self.source.code_of, self.state_BS, self.pairs)
            if faulty >= 0:
                raise CellmillError(
                    f"{self._name(np.searchsorted(self.joinids_B, stored[0][faulty]))} has a count of "
                    f"{stored[2][faulty]:g} in X['raw']; counts must be raw: non-negative integers below 2^31"
                )

    def check(self) -> None:
        """Refuse cells of which obs and X disagree."""
        total_B, nnz_B = self.state_BS[:, kernels.TOTAL], self.state_BS[:, kernels.NNZ]
        raw_sum_B, genes_B = self.obs["raw_sum"].to_numpy(), self.obs["nnz"].to_numpy()
        wrong = np.flatnonzero((total_B != raw_sum_B) | (nnz_B != genes_B))
        if len(wrong):
            row = wrong[0]
            raise CellmillError(
                f"{self._name(row)}: obs says {raw_sum_B[row]:.0f} counts in {genes_B[row]} genes, X['raw'] holds "
                f"{total_B[row]} in {nnz_B[row]}; build the Census anew"
            )

    def pack(self, rows: np.ndarray) -> tuple[pa.Table, int, np.ndarray]:
        """Cells at ascending `rows` as `BlockWriter.write_packed` takes them, and uint64 [K, G], their fingerprints."""
        lengths, totals = self.state_BS[rows, kernels.NEXT] - self.first_B[rows], self.state_BS[rows, kernels.TOTAL]
        group_V, n = self.source.group_V, lengths.sum()
        room = {  # no cell has more overflown numbers than its sums allow
            "genes": np.empty(n, np.uint8),
            "genes_overflow": np.empty(np.minimum(lengths, len(group_V) // OVERFLOWN).sum(), np.uint16),
            "counts": np.empty(n, np.uint8),
            "counts_overflow": np.empty(np.minimum(lengths, totals // OVERFLOWN).sum(), np.uint32),
        }
        ends = np.zeros((len(PACKED), len(rows) + 1), np.int32)
        prints, members = np.zeros((len(rows), GROUPS), np.uint64), np.zeros((len(rows), GROUPS), np.int32)
        n_genes = kernels.pack(
            rows,
            self.first_B,
            self.state_BS,
            self.pairs,
            np.zeros(len(group_V), np.int32),
            group_V,
            self.source.key_V,
            *room.values(),
            ends,
            prints,
            members,
        )
        columns = {"soma_joinid": self.joinids_B[rows], "total_counts": totals}
        for (name, values), end in zip(room.items(), ends, strict=True):
            buffers = [None, pa.py_buffer(end), pa.py_buffer(values)]
            columns[name] = pa.BinaryArray.from_buffers(pa.binary(), len(rows), buffers)
        return pa.table(columns), n_genes, comparable_prints(prints, members, self.source.comparable(self)[rows])

    def _name(self, row: int) -> str:
        return f"data set {self.obs['dataset_id'][row]}, cell {self.joinids_B[row]} (soma_joinid)"


@dataclass(frozen=True)
class _DataSet:
    """What a data set measured: any gene of each kind (of `cellmill.shards.kernels`), and whole groups (bool [G])."""

    kinds: frozenset[int]
    groups_G: np.ndarray


class _Source:
    """The Census: its genes, what its data sets measured, and a stream of planned cells."""

    def __init__(self, collection, organism: str, vocabulary: Vocabulary, extra_obs: list[str]):
        experiment = collection["census_data"][organism]
        rna = experiment.ms["RNA"]
        self.obs, self.X, self.presence = experiment.obs, rna.X["raw"], rna["feature_dataset_presence_matrix"]
        self.organism = organism
        var = rna.var.read(column_names=["soma_joinid", "feature_id", "feature_name"]).concat()
        joinid_V = var["soma_joinid"].to_numpy()
        ids = pc.index_in(var["feature_id"].cast(pa.string()), value_set=pa.array(vocabulary.feature_ids))
        self.gene_of = np.full(joinid_V.max() + 1, -1, np.int32)
        self.gene_of[joinid_V] = ids.fill_null(-1).to_numpy()
        self.var_of = np.flatnonzero(self.gene_of >= 0)
        if len(self.var_of) != len(vocabulary):
            raise CellmillError("the vocabulary names genes that this Census does not have; build it from this Census")
        self.var_of = self.var_of[np.argsort(self.gene_of[self.var_of])]
        self.kind_of = np.full(len(self.gene_of), kernels.PLAIN, np.uint8)
        self.kind_of[joinid_V[is_ribosomal(var["feature_name"])]] = kernels.RIBOSOMAL
        self.kind_of[joinid_V[is_mitochondrial(var["feature_name"])]] = kernels.MITOCHONDRIAL
        self.code_of = kernels.codes(self.gene_of, self.kind_of)
        self.group_V = np.ascontiguousarray(vocabulary.group_V, np.int8)
        self.key_V = gene_keys(self.group_V)
        rows = collection["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat()
        self.joinid_of = dict(zip(rows["dataset_id"].to_pylist(), rows["soma_joinid"].to_pylist(), strict=True))
        self.data_sets: dict[str, _DataSet] = {}
        self._room = np.empty(0, np.int64)
        self._obs_read: tuple[pa.Table | None, int] = None, -1
        for name in extra_obs:
            if name not in self.obs.schema.names:
                close = suggest(name, self.obs.schema.names)
                raise CellmillError(f"census.extra_obs names '{name}', a column that the Census's obs lacks{close}")
        self.kept_columns = [*dict.fromkeys([*OBS_STRINGS, *extra_obs]), "n_measured_genes"]
        self._text_columns = [name for name in self.kept_columns if name not in ("organism", "n_measured_genes")]

    def stream(self, reads: Iterator[pa.Table], last: int) -> Iterator[tuple[_Cells, pa.Table | None]]:
        """Cells, up to the joinid `last`, with each table of X that holds counts of them, and at last with None."""
        for planned in reads:
            joinids_B = planned["soma_joinid"].to_numpy()
            # One slice is far quicker than a list of points, unless few cells of its range are wanted.
            span = joinids_B[-1] - joinids_B[0] + 1
            coords = slice(int(joinids_B[0]), int(joinids_B[-1])) if span <= 2 * len(joinids_B) else pa.array(joinids_B)
            end = self.obs.domain[0][1]
            if joinids_B[-1] > end:
                raise CellmillError(STALE_PLAN)
            obs = self._read_obs(coords, min(last, end))
            cells = _Cells(planned, self._obs_of(obs, joinids_B), self)
            self._learn_data_sets(cells.obs["dataset_id"])
            for table in self.X.read((coords,)).tables():
                yield cells, table
            yield cells, None

    def room(self, n: int) -> np.ndarray:
        """Memory for int64 [n] or more, the same every time: new memory costs as much as the work on it."""
        if len(self._room) < n:
            self._room = np.empty(n, np.int64)
        return self._room

    def share(self, cells: _Cells, column: int) -> np.ndarray:
        """float64 [B], share of counts in genes of a kind (its column of the state); NaN where none was measured."""
        kind = {kernels.MITO: kernels.MITOCHONDRIAL, kernels.RIBO: kernels.RIBOSOMAL}[column]
        code_B, names = text_codes(cells.obs["dataset_id"])
        measured_B = np.array([kind in self.data_sets[name].kinds for name in names])[code_B]
        share_B = cells.state_BS[:, column] / np.maximum(cells.state_BS[:, kernels.TOTAL], 1)
        return np.where(measured_B, share_B, np.nan)

    def comparable(self, cells: _Cells) -> np.ndarray:
        """Bool [B, G], the groups of which the cell's data set measured every gene."""
        code_B, names = text_codes(cells.obs["dataset_id"])
        return np.array([self.data_sets[name].groups_G for name in names])[code_B]

    def _read_obs(self, coords: slice | pa.Array, last: int) -> pa.Table:
        """The metadata of a range of cells and of those after it, or of some cells.

        A read decompresses whole tiles of obs, many times the cells of one range of X: so the next ranges use it, too.
        """
        if isinstance(coords, slice):
            if self._obs_read[1] >= coords.stop:
                return self._obs_read[0]
            last = max(coords.stop, min(last, coords.start + CELLS_PER_OBS_READ - 1))
            coords = slice(coords.start, last)
        names = ["soma_joinid", *self._text_columns, "observation_joinid", "n_measured_vars", "raw_sum", "nnz"]
        table = self.obs.read((coords,), column_names=names, result_order="row-major").concat()
        if isinstance(coords, slice):
            self._obs_read = table, last
        return table

    def _obs_of(self, table: pa.Table, joinids_B: np.ndarray) -> pa.Table:
        """The metadata of the planned cells of a range."""
        found = table["soma_joinid"].to_numpy()
        rows = np.minimum(np.searchsorted(found, joinids_B), max(len(found) - 1, 0))
        if not len(found) or (found[rows] != joinids_B).any():
            raise CellmillError(STALE_PLAN)
        table = table.take(rows).unify_dictionaries().combine_chunks()
        columns = {name: table[name] for name in table.column_names}
        for name in self._text_columns:
            if not pa.types.is_dictionary(table[name].type):
                columns[name] = table[name].cast(pa.string())
        columns["organism"] = pa.DictionaryArray.from_arrays(np.zeros(len(rows), np.int32), [self.organism])
        columns["n_measured_genes"] = table["n_measured_vars"].cast(pa.int32())
        return pa.table(columns)

    def _learn_data_sets(self, names: pa.ChunkedArray) -> None:
        """Read from the presence matrix what data sets measured that were not met before."""
        for name in set(text_codes(names)[1]) - set(self.data_sets):
            measured = np.zeros(len(self.gene_of), bool)
            for part in self.presence.read((self.joinid_of[name],)).tables():
                measured[part["soma_dim_1"].to_numpy()] = part["soma_data"].to_numpy()
            groups_G = comparable_groups(self.group_V, {name: measured[self.var_of]})[name]
            self.data_sets[name] = _DataSet(frozenset(np.unique(self.kind_of[measured]).tolist()), groups_G)


class _DoubletScores:
    """Doublet scores of the cells of a block."""

    def __init__(self, paths: list[Path], joinids: list[int]):
        first, last = joinids
        within = (ds.field("soma_joinid") >= first) & (ds.field("soma_joinid") <= last)
        tables = [ds.dataset(path).to_table(filter=within, use_threads=False) for path in paths]
        scores = pa.concat_tables(tables).sort_by("soma_joinid") if tables else pa.table({})
        self.joinids = scores["soma_joinid"].to_numpy() if tables else np.zeros(0, np.int64)
        self.scores = scores["doublet_score"].to_numpy() if tables else np.zeros(0)

    def of(self, joinids_B: np.ndarray) -> np.ndarray:
        """float64 [B], NaN for cells without a score."""
        score_B = np.full(len(joinids_B), np.nan)
        row_B = np.searchsorted(self.joinids, joinids_B)
        known = np.flatnonzero(row_B < len(self.joinids))
        known = known[self.joinids[row_B[known]] == joinids_B[known]]
        score_B[known] = self.scores[row_B[known]]
        return score_B


def _reads(plan: Path, block: int) -> Iterator[pa.Table]:
    """The planned cells of a block, in the order of joinids: whole tiles, about `NONZEROS_PER_READ` at a time."""
    scanner = ds.dataset(plan).scanner(
        columns=["soma_joinid", "split", "nnz"],
        filter=ds.field("block") == block,
        use_threads=False,
        batch_readahead=1,
        fragment_readahead=1,
    )
    waiting: list[pa.Table] = []
    for batch in scanner.to_batches():
        table = pa.concat_tables([*waiting, pa.Table.from_batches([batch])])
        *whole, last = itertools.pairwise(_edges(table["soma_joinid"].to_numpy(), table["nnz"].to_numpy()))
        for start, stop in whole:
            yield table.slice(start, stop - start)
        waiting = [table.slice(last[0])]  # the next batch may add to it
    if waiting and len(waiting[0]):
        yield waiting[0]


def _edges(joinids: np.ndarray, nnz: np.ndarray) -> list[int]:
    """Positions where reads of ascending joinids start, and where the last one ends."""
    starts = np.flatnonzero(np.diff(joinids // TILE, prepend=-1))
    nonzeros = np.add.reduceat(nnz, starts) if len(starts) else starts
    edges, held = [0], 0
    for start, n in zip(starts.tolist(), nonzeros.tolist(), strict=True):
        if held and held + n > NONZEROS_PER_READ:
            edges.append(start)
            held = 0
        held += n
    return [*edges, len(joinids)]


def _ahead(items: Iterator) -> Iterator:
    """The same items, each next one made in a thread while the last one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _first_broken(quality: Quality, assays: pa.ChunkedArray, values: dict[str, np.ndarray]) -> np.ndarray:
    """int64 [B], the first of `X_RULES` that each cell breaks, their number where it breaks none."""
    first_B = np.full(len(assays), len(X_RULES))
    for place in reversed(range(len(X_RULES))):  # the earliest rule is written last and so wins
        rule = X_RULES[place]
        first_B[values[rule] > thresholds(quality, rule, assays)] = place  # not where the value is NaN
    return first_B


def _qc_table(cells: _Cells, values: dict[str, np.ndarray], rule_B: np.ndarray) -> pa.Table:
    columns = [
        cells.joinids_B,
        _encoded(cells.obs["dataset_id"]),
        _encoded(cells.obs["assay"]),
        cells.state_BS[:, kernels.TOTAL],
        cells.state_BS[:, kernels.NNZ],
        *(pa.array(values[rule], from_pandas=True) for rule in X_RULES),  # NaN becomes null
        pa.array(X_RULES).take(pa.array(rule_B, mask=rule_B == len(X_RULES))),
    ]
    return pa.table(columns, schema=QC_SCHEMA)


def _prints_table(cells: _Cells, prints_BG: np.ndarray, rows: np.ndarray) -> pa.Table:
    obs = cells.obs.select(["dataset_id", "observation_joinid"]).take(rows)
    columns = [
        cells.joinids_B[rows],
        _encoded(obs["dataset_id"]),
        obs["observation_joinid"].cast(pa.string()),
        *np.ascontiguousarray(prints_BG[rows].T),
    ]
    return pa.table(columns, schema=PRINTS_SCHEMA)


def _encoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A text column with a dictionary of the values that occur: the Census's own holds those of all cells."""
    return column.cast(pa.string()).dictionary_encode()


@contextlib.contextmanager
def _table_writer(path: Path, schema: pa.Schema, use_dictionary: bool | list[str] = True) -> Iterator[pq.ParquetWriter]:
    """A parquet file that appears whole or not at all."""
    settings = {"compression": "zstd", "use_dictionary": use_dictionary}
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema, **settings) as writer:
        yield writer
