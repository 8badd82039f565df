"""Copies of cells: within a corpus, beyond what the primary flag says, and between a corpus and the benchmarks.

Both work on the fingerprints that curation wrote (`cellmill.fingerprints`), never on counts. Copies are looked for
among cells that share a fingerprint: sorting finds those, so nothing grows with the square of the cells. A corpus's
fingerprints are dealt to files by their values, one group at a time, so that memory holds and sorts one file of them.

Legend: N cells of a corpus, M cells that share a fingerprint with another, B cells of one batch, Q cells of all
benchmarks, P pairs, G groups.
"""

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import atomic, unwritable
from cellmill.fingerprints import GROUPS, MIN_EQUAL, MIN_SHARE, PRINTS, PRINTS_SCHEMA
from cellmill.progress import Progress

NAME = pa.dictionary(pa.int32(), pa.string())
DUPLICATES_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", NAME),
        ("kept_joinid", pa.int64()),
        ("kept_dataset_id", NAME),
        ("groups_equal", pa.int8()),
        ("groups_compared", pa.int8()),
    ]
)
VALUE = np.dtype([("print", np.uint64), ("row", np.uint32)])
CELL = np.dtype([("print", np.uint64), ("prints", np.uint64, GROUPS), ("cell", np.uint32)])
LEAKS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.string()),
        ("observation_joinid", pa.string()),
        ("selection", pa.string()),
        ("benchmark", pa.string()),
        ("benchmark_joinid", pa.int64()),
        ("benchmark_dataset_id", pa.string()),
        ("benchmark_observation_joinid", pa.string()),
    ]
)
COMPARED = b"cellmill.compared"
"""Key of the tables' metadata: JSON, by selection and benchmark the number of cells, and of those too shallow (or with
too few of the genes measured) to be compared with any other."""
AT_A_TIME = {"values": 1 << 22, "cells": 1 << 19}
"""What is sorted in memory at a time: fingerprints of one group; cells with the fingerprints of all groups."""
BATCH = 1 << 18
NEIGHBOURS = 8
"""Cells of one fingerprint are compared with so many that follow them in the order of their other fingerprints."""
PAIRS = 1 << 20
"""Pairs of cells with a fingerprint in common that the audit looks at together."""
NAMED = 5
"""Leaked cells that an error names."""


def find_duplicates(prints: list[Path], *, out: Path) -> int:
    """Find the cells of a corpus that are copies of another one, within a data set and across data sets.

    Copies agree in at least `MIN_EQUAL` groups and in `MIN_SHARE` of the groups that both have. Copies of copies form
    one cluster; of each, the cell with the smallest (dataset_id, soma_joinid) is kept. So what is kept depends on the
    cells alone, not on the blocks that they were read in. Memory: about 0.5 GB, 2 bytes for each cell, and some 30 for
    each that shares a fingerprint. Disk, while it works and beside `out`: 12 bytes for each cell, or 130 for each that
    shares a fingerprint if that is more.

    Parameters
    ----------
    prints
        Fingerprints of all blocks of one corpus (`PRINTS_SCHEMA`), in any order.
    out
        Parquet with the columns of `DUPLICATES_SCHEMA`, a row for each cell that is not kept, in the order of
        (dataset_id, soma_joinid); groups are those that it has in common with the kept cell (few or none where both
        are copies of a third). Its metadata say how many cells could not be compared (`COMPARED`).

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    CellmillError
        A file of fingerprints is absent, damaged or has other columns, or the disk is full.
    """
    out = Path(out)
    with _scratch(out) as scratch:
        row_M, compared = _sharing(prints, scratch)
        with _Candidates(prints, row_M, scratch) as cells:
            parent_M = _joined(cells, scratch)
            copies = np.flatnonzero(parent_M != np.arange(len(parent_M)))
            copies = copies[np.lexsort((cells.joinid_M[copies], cells.dataset_M[copies]))]
            schema = DUPLICATES_SCHEMA.with_metadata({COMPARED: json.dumps(compared)})
            with atomic(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for start in range(0, len(copies), BATCH):
                    copy_P = copies[start : start + BATCH]
                    kept_P = parent_M[copy_P]
                    equal_P, compared_P = _agreement(cells.take(copy_P), cells.take(kept_P))
                    columns = [
                        cells.joinid_M[copy_P],
                        _names(cells.dataset_M[copy_P], cells.names),
                        cells.joinid_M[kept_P],
                        _names(cells.dataset_M[kept_P], cells.names),
                        equal_P.astype(np.int8),
                        compared_P.astype(np.int8),
                    ]
                    writer.write_table(pa.table(columns, schema=schema))
    return len(copies)


def audit_leaks(
    corpus_prints: dict[str, list[Path]],
    benchmark_prints: dict[str, list[Path]],
    *,
    action: str,
    out: Path,
    copies: dict[str, Path] | None = None,
) -> int:
    """Find the cells of corpora that are cells of a benchmark: by profile, or as the very same cell of the Census.

    What it cannot see: cells too shallow to be compared, data sets that measured too few of the fingerprints' genes
    (both counted in the table's metadata, `COMPARED`), and cells whose counts were changed, as by another alignment.
    The benchmarks' fingerprints are held in memory (some 300 bytes a cell), the corpora's pass by.

    Parameters
    ----------
    corpus_prints
        For each corpus the fingerprints of its blocks (`PRINTS_SCHEMA`).
    benchmark_prints
        For each benchmark data set the fingerprints of its blocks, of the same vocabulary as the corpora.
    action
        "fail" raises if anything is found; "drop" does not (the cells are left out by the shuffle).
    out
        Parquet with the columns of `LEAKS_SCHEMA`: a row for each corpus cell and benchmark that has it, naming the
        benchmark's first such cell. Where the action is "fail" and there are rows, they are written to
        ``{stem}_found.parquet`` beside it instead, since a workflow deletes the output of a job that failed.
    copies
        For each corpus what `find_duplicates` wrote: a copy of a leaked cell has leaked, too, also where it shares too
        few measured genes with the benchmark to be compared with it.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    CellmillError
        A file of fingerprints is absent, damaged or has other columns; or, with action "fail", there are leaks.
    """
    out = Path(out)
    found = out.with_name(f"{out.stem}_found.parquet")
    found.unlink(missing_ok=True)
    targets = _Targets(benchmark_prints)
    compared, tables = dict(targets.compared), [LEAKS_SCHEMA.empty_table()]
    for selection, paths in corpus_prints.items():
        counts = Counter()
        with Progress(f"leaks of {selection}", _rows(paths)) as progress:
            for start, batch in _batches(paths, PRINTS_SCHEMA.names):
                prints_BG = _prints(batch)
                counts.update(_counted(prints_BG))
                tables.append(targets.leaks(selection, batch, prints_BG))
                progress.update(start + len(batch))
        compared[selection] = _described(counts)
    leaks = pa.concat_tables(tables)
    for selection, path in (copies or {}).items():
        leaks = pa.concat_tables([leaks, _leaked_copies(leaks, selection, path)])
    leaks = leaks.sort_by([(name, "ascending") for name in ("selection", "dataset_id", "soma_joinid", "benchmark")])
    fails = action == "fail" and len(leaks) > 0
    with atomic(found if fails else out) as temporary:
        schema = LEAKS_SCHEMA.with_metadata({COMPARED: json.dumps(compared)})
        pq.write_table(leaks.cast(schema), temporary, compression="zstd")
    if fails:
        raise CellmillError(_explain(leaks, found))
    return len(leaks)


def _leaked_copies(leaks: pa.Table, selection: str, path: Path) -> pa.Table:
    """Rows for the copies of a corpus's leaked cells that have none yet, each with what the leaked one is a copy of."""
    found = pq.read_table(path, columns=["soma_joinid", "dataset_id", "kept_joinid", "kept_dataset_id"]).to_pandas()
    kept = found[["kept_joinid", "kept_dataset_id"]].drop_duplicates("kept_joinid")
    members = pd.DataFrame(
        {
            "cluster": np.concatenate([found["kept_joinid"], kept["kept_joinid"]]),
            "soma_joinid": np.concatenate([found["soma_joinid"], kept["kept_joinid"]]),
            "dataset_id": np.concatenate([found["dataset_id"].astype(str), kept["kept_dataset_id"].astype(str)]),
        }
    )
    known = leaks.to_pandas()
    known = known[known["selection"] == selection].merge(members[["cluster", "soma_joinid"]], on="soma_joinid")
    known = known.drop_duplicates(["cluster", "benchmark"]).drop(
        columns=["soma_joinid", "dataset_id", "observation_joinid"]
    )
    rows = members.merge(known, on="cluster").assign(observation_joinid=None)
    listed = set(zip(leaks["soma_joinid"].to_pylist(), leaks["benchmark"].to_pylist(), strict=True))
    new = [pair not in listed for pair in zip(rows["soma_joinid"], rows["benchmark"], strict=True)]
    return pa.Table.from_pandas(rows.loc[new, LEAKS_SCHEMA.names], schema=LEAKS_SCHEMA, preserve_index=False)


class _Targets:
    """The cells of all benchmarks, to be looked up by fingerprint and by identity.

    Attributes
    ----------
    compared
        For each benchmark what `_described` says.
    """

    def __init__(self, benchmark_prints: dict[str, list[Path]]):
        self.compared = {}
        self.benchmarks = list(benchmark_prints)
        tables, benchmarks = [PRINTS_SCHEMA.empty_table()], [np.zeros(0, np.int64)]
        for number, (benchmark, paths) in enumerate(benchmark_prints.items()):
            counts = Counter()
            for _, batch in _batches(paths, PRINTS_SCHEMA.names):
                counts.update(_counted(_prints(batch)))
                tables.append(pa.Table.from_batches([batch]))
                benchmarks.append(np.full(len(batch), number))
            self.compared[benchmark] = _described(counts)
        table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        self.benchmark_Q = np.concatenate(benchmarks)
        # the order in which the first of several cells with one profile is chosen
        order = np.lexsort((table["soma_joinid"].to_numpy(), table["dataset_id"].cast(pa.string()), self.benchmark_Q))
        self.table, self.benchmark_Q = table.take(order), self.benchmark_Q[order]
        self.joinid_Q = self.table["soma_joinid"].to_numpy()
        self.dataset_Q = np.array(self.table["dataset_id"].cast(pa.string()).to_pylist(), dtype=object)
        self.prints_QG = _prints(self.table)
        profiles = _first_of_equal(np.column_stack([self.benchmark_Q.astype(np.uint64), self.prints_QG]))
        self._sorted = [_Sorted(self.prints_QG[:, group], profiles) for group in range(GROUPS)]
        self._by_joinid = _Sorted(self.joinid_Q, np.arange(len(self.joinid_Q)))

    def leaks(self, selection: str, batch: pa.RecordBatch, prints_BG: np.ndarray) -> pa.Table:
        """The rows (`LEAKS_SCHEMA`) of one batch of a corpus."""
        pairs = []
        for group in range(GROUPS):
            compared = np.flatnonzero(prints_BG[:, group])
            for place, target in self._sorted[group].find(prints_BG[compared, group]):
                cell = compared[place]
                same = _are_copies(*_agreement(prints_BG[cell], self.prints_QG[target]))
                pairs.append(self._first(cell[same], target[same]))
        for cell, target in self._by_joinid.find(batch["soma_joinid"].to_numpy()):
            dataset = np.array(batch["dataset_id"].cast(pa.string()).take(pa.array(cell)).to_pylist(), dtype=object)
            same = dataset == self.dataset_Q[target]
            pairs.append(self._first(cell[same], target[same]))

        none = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        cell, target = self._first(*(np.concatenate(side) for side in zip(*(none + pairs), strict=True)))
        benchmark = self.benchmark_Q[target]
        ours, theirs = batch.take(pa.array(cell)), self.table.take(target)
        columns = [
            ours["soma_joinid"],
            ours["dataset_id"].cast(pa.string()),
            ours["observation_joinid"],
            pa.repeat(selection, len(cell)),
            pa.array(self.benchmarks, pa.string()).take(pa.array(benchmark)),
            theirs["soma_joinid"],
            theirs["dataset_id"].cast(pa.string()),
            theirs["observation_joinid"],
        ]
        return pa.table(columns, schema=LEAKS_SCHEMA)

    def _first(self, cell: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of pairs in any order each cell's first one in each benchmark, by cell and target."""
        order = np.lexsort((target, cell))
        cell, target = cell[order], target[order]
        first = np.ones(len(cell), bool)  # targets are in the order of their benchmarks
        first[1:] = (np.diff(cell) != 0) | (np.diff(self.benchmark_Q[target]) != 0)
        return cell[first], target[first]


class _Sorted:
    """Values at some `rows`, to be looked up; each may stand several times."""

    def __init__(self, values: np.ndarray, rows: np.ndarray):
        self.order = rows[np.argsort(values[rows], kind="stable")]
        self.values = values[self.order]

    def find(self, wanted_B: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every pair (position in `wanted_B`, row) of equal values, as two int64 [P]; few pairs at a time.

        At most `PAIRS`, or those of one of `wanted_B`.
        """
        left = np.searchsorted(self.values, wanted_B, side="left")
        many = np.searchsorted(self.values, wanted_B, side="right") - left
        up_to, start = np.concatenate([[0], np.cumsum(many)]), 0
        while start < len(wanted_B):
            stop = max(start + 1, int(np.searchsorted(up_to, up_to[start] + PAIRS, side="right")) - 1)
            here = slice(start, stop)
            cell = np.repeat(np.arange(start, stop), many[here])
            within = np.arange(len(cell)) - np.repeat(up_to[here] - up_to[start], many[here])
            yield cell, self.order[np.repeat(left[here], many[here]) + within]
            start = stop


def _first_of_equal(values_QC: np.ndarray) -> np.ndarray:
    """Ascending, the first of all rows that are equal."""
    order = np.lexsort(values_QC.T)
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(values_QC[order].view(np.int64), axis=0) != 0).any(axis=1)
    return np.sort(order[first])


def _explain(leaks: pa.Table, path: Path) -> str:
    """The one sentence about leaks: how many, between which data sets, which cells, and what to do."""
    rows = leaks.select(["dataset_id", "benchmark", "benchmark_dataset_id"]).to_pylist()
    datasets = Counter(tuple(row.values()) for row in rows).most_common()
    cells = len(leaks.group_by(["selection", "dataset_id", "soma_joinid"]).aggregate([]))
    said = [
        f"{n:,} of data set {dataset} in benchmark {benchmark} (data set {theirs})"
        for (dataset, benchmark, theirs), n in datasets[:NAMED]
    ]
    if len(datasets) > NAMED:
        said.append(f"and {len(datasets) - NAMED} more pairs of data sets")
    named = [
        f"{row['observation_joinid']} is {row['benchmark_observation_joinid']}"
        for row in leaks.slice(0, NAMED).to_pylist()
    ]
    names = sorted({dataset for (dataset, _, _), _ in datasets})
    selections = leaks["selection"].unique().to_pylist()
    return (
        f"{cells:,} cells of {' and '.join(selections)} are cells of a benchmark: {', '.join(said)}; the first are "
        f"{', '.join(named)}, and all stand in {path}; add the data sets of the corpus ({', '.join(names[:NAMED])}"
        f"{', ...' if len(names) > NAMED else ''}) to corpus.held_out.datasets, or leave these cells out with "
        "corpus.leaks: drop"
    )


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what does not fit in memory; what a killed job left there goes first."""
    folder = out.with_name(out.name + ".tmp.d")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _dealt(records: Iterator[np.ndarray], total: int, at_a_time: int, scratch: Path) -> Iterator[np.ndarray]:
    """Deal `total` records to files by ranges of the field ``print``, and give them back file by file.

    A file holds about `at_a_time` records, all of those with the same fingerprint.
    """
    bits = max(0, -(-total // at_a_time) - 1).bit_length()
    paths = [scratch / f"dealt-{number}" for number in range(1 << bits)]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for part in records:
            # numpy shifts a 64-bit number by 64 bits to no certain value, so one bit goes first
            number = (part["print"] >> np.uint64(1)) >> np.uint64(63 - bits)
            order = np.argsort(number, kind="stable")
            edges = np.searchsorted(number[order], np.arange((1 << bits) + 1))
            for file, start, stop in zip(files, edges, edges[1:], strict=False):
                file.write(part[order[start:stop]].tobytes())
            dtype = part.dtype
    for path in paths:
        yield np.fromfile(path, dtype)
        path.unlink()


def _sharing(paths: list[Path], scratch: Path) -> tuple[np.ndarray, dict]:
    """Rows (uint32 [M], ascending) that share a fingerprint with another row, and what `_described` says of all."""
    total = _rows(paths)
    shares_N, prints_N = np.zeros(total, bool), np.zeros(total, np.uint8)

    def records(group: str) -> Iterator[np.ndarray]:
        yield np.empty(0, VALUE)
        for start, batch in _batches(paths, [group]):
            print_B = batch[group].to_numpy()
            here = np.flatnonzero(print_B)
            part = np.empty(len(here), VALUE)
            part["print"], part["row"] = print_B[here], start + here
            yield part

    with Progress("fingerprints that cells share", total) as progress:
        for number, group in enumerate(PRINTS):
            for part in _dealt(records(group), total, AT_A_TIME["values"], scratch):
                prints_N[part["row"]] += 1
                ascending = np.sort(part["print"])
                twice = ascending[1:][ascending[1:] == ascending[:-1]]
                if len(twice):
                    place = np.minimum(np.searchsorted(twice, part["print"]), len(twice) - 1)
                    shares_N[part["row"][twice[place] == part["print"]]] = True
            progress.update(total * (number + 1) // GROUPS)
    counts = {"cells": total, "not_comparable": int((prints_N < MIN_EQUAL).sum())}
    return np.flatnonzero(shares_N).astype(np.uint32), _described(counts)


class _Candidates:
    """The M cells that share a fingerprint: who they are in memory, their fingerprints in a file.

    Attributes
    ----------
    names
        Names of data sets, sorted.
    dataset_M, joinid_M
        int32 [M], position in `names`; int64 [M].
    """

    def __init__(self, paths: list[Path], row_M: np.ndarray, scratch: Path):
        self.path = scratch / "candidates"
        code_of: dict[str, int] = {}
        codes, joinids = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        with self.path.open("wb") as file:
            for start, batch in _batches(paths, ["soma_joinid", "dataset_id", *PRINTS]):
                first, last = np.searchsorted(row_M, [start, start + len(batch)])
                part = batch.take(pa.array(row_M[first:last].astype(np.int64) - start))
                file.write(_prints(part).tobytes())
                joinids.append(part["soma_joinid"].to_numpy())
                code = [code_of.setdefault(name, len(code_of)) for name in part["dataset_id"].dictionary.to_pylist()]
                codes.append(np.array(code, np.int32)[part["dataset_id"].indices.to_numpy()])
        self.names = sorted(code_of)
        rank = np.searchsorted(self.names, list(code_of)).astype(np.int32)
        self.dataset_M, self.joinid_M = rank[np.concatenate(codes)], np.concatenate(joinids)
        self._file = self.path.open("rb")

    def __enter__(self) -> "_Candidates":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.joinid_M)

    def records(self, group: int) -> Iterator[np.ndarray]:
        """Records of `CELL` of those that have a fingerprint of the group, some at a time."""
        yield np.empty(0, CELL)
        for start in range(0, len(self), BATCH):
            offset = start * GROUPS * 8
            prints_BG = np.fromfile(self.path, np.uint64, BATCH * GROUPS, offset=offset).reshape(-1, GROUPS)
            here = np.flatnonzero(prints_BG[:, group])
            part = np.empty(len(here), CELL)
            part["print"], part["prints"], part["cell"] = prints_BG[here, group], prints_BG[here], start + here
            yield part

    def take(self, cell_P: np.ndarray) -> np.ndarray:
        """uint64 [P, G], fingerprints of cells in any order."""
        size, descriptor = GROUPS * 8, self._file.fileno()
        rows = [os.pread(descriptor, size, cell * size) for cell in cell_P.tolist()]
        return np.frombuffer(b"".join(rows), np.uint64).reshape(-1, GROUPS)


def _joined(cells: _Candidates, scratch: Path) -> np.ndarray:
    """uint32 [M], of each cell the one to keep of its cluster of copies (a position in the M cells)."""
    parent_M = np.arange(len(cells), dtype=np.uint32)
    kernels = _kernels()
    with Progress("copies among cells that share one", len(cells), show=len(cells) > 0) as progress:
        for group in range(GROUPS):
            for part in _dealt(cells.records(group), len(cells), AT_A_TIME["cells"], scratch):
                part = part[_neighbours(part, group, cells)]
                for step in range(1, NEIGHBOURS + 1):
                    left = np.flatnonzero(part["print"][step:] == part["print"][:-step])
                    left = left[_are_copies(*_agreement(part["prints"][left], part["prints"][left + step]))]
                    ends = part["cell"][left], part["cell"][left + step]
                    kernels["join"](parent_M, cells.dataset_M, cells.joinid_M, *ends)
            progress.update(len(cells) * (group + 1) // GROUPS)
    kernels["flatten"](parent_M)
    return parent_M


def _neighbours(part: np.ndarray, group: int, cells: _Candidates) -> np.ndarray:
    """The order in which records of `CELL` are compared with the `NEIGHBOURS` that follow them.

    By the fingerprint. Where more cells share one than are compared, by the next groups', too: copies that differ in
    one group only are neighbours in the order of the group behind it, however many cells share a fingerprint.
    """
    order = np.argsort(part["print"], kind="stable")
    ascending = part["print"][order]
    if not (ascending[NEIGHBOURS + 1 :] == ascending[: -(NEIGHBOURS + 1)]).any():
        return order
    keys = [part["prints"][:, (group + step) % GROUPS] for step in range(GROUPS)]
    return np.lexsort((cells.joinid_M[part["cell"]], cells.dataset_M[part["cell"]], *keys[::-1]))


@functools.cache
def _kernels() -> dict:
    import numba  # heavy, and only this phase needs it

    @numba.njit
    def root(parent_M, cell):
        while parent_M[cell] != cell:
            parent_M[cell] = parent_M[parent_M[cell]]
            cell = parent_M[cell]
        return cell

    @numba.njit
    def join(parent_M, dataset_M, joinid_M, left_P, right_P):
        """Join the clusters of each pair; the smallest (data set, joinid) becomes the root."""
        for left, right in zip(left_P, right_P):  # noqa: B905 (numba knows no strict)
            a, b = root(parent_M, left), root(parent_M, right)
            if (dataset_M[b], joinid_M[b]) < (dataset_M[a], joinid_M[a]):
                a, b = b, a
            parent_M[b] = a

    @numba.njit
    def flatten(parent_M):
        """Let every cell point to the root of its cluster."""
        for cell in range(len(parent_M)):
            parent_M[cell] = root(parent_M, cell)

    return {"join": join, "flatten": flatten}


def _agreement(left_PG: np.ndarray, right_PG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two int64 [P]: the groups in which pairs of cells are equal, and those that both have."""
    both_PG = (left_PG > 0) & (right_PG > 0)
    return ((left_PG == right_PG) & both_PG).sum(axis=1), both_PG.sum(axis=1)


def _are_copies(equal_P: np.ndarray, compared_P: np.ndarray) -> np.ndarray:
    return (equal_P >= MIN_EQUAL) & (equal_P >= MIN_SHARE * compared_P)


def _counted(prints_BG: np.ndarray) -> dict[str, int]:
    return {"cells": len(prints_BG), "not_comparable": int(((prints_BG > 0).sum(axis=1) < MIN_EQUAL).sum())}


def _described(counts: dict[str, int]) -> dict:
    """Number of cells, of those that cannot be compared, and their share (null without cells)."""
    cells, without = counts.get("cells", 0), counts.get("not_comparable", 0)
    return {"cells": cells, "not_comparable": without, "share": without / cells if cells else None}


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, pre_buffer=False)  # buffered, the whole file would stay in memory
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise CellmillError(
            f"fingerprints {path} cannot be read as parquet ({reason}); delete the file and run again"
        ) from error
    if not file.schema_arrow.equals(PRINTS_SCHEMA):
        raise CellmillError(
            f"fingerprints {path} have other columns than {PRINTS_SCHEMA.names}; delete the file and run again"
        )
    return file


def _rows(paths: list[Path]) -> int:
    total = 0
    for path in paths:
        with _open(path) as file:
            total += file.metadata.num_rows
    return total


def _batches(paths: list[Path], columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of all files in order, each with the number of rows before it. One file is open at a time."""
    start = 0
    for path in paths:
        with _open(path) as file:
            try:
                for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
                    yield start, batch
                    start += len(batch)
            except (OSError, pa.ArrowInvalid) as error:
                reason = str(error).splitlines()[0]
                raise CellmillError(
                    f"fingerprints {path} are damaged ({reason}); delete the file and run again"
                ) from error


def _prints(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """uint64 [B, G]."""
    return np.stack([batch[name].to_numpy() for name in PRINTS], axis=1)


def _names(code_B: np.ndarray, names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(code_B.astype(np.int32)), pa.array(names, pa.string()))
