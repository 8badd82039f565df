"""The last step of a selection: its shards in one folder with a manifest, and the tables of quality control."""

import contextlib
import errno
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.config import Splits
from cellmill.errors import CellmillError
from cellmill.files import atomic, unwritable
from cellmill.qc import LATE_RULES, TABLE_SCHEMA, X_RULES, add_rows, explain_removed, removed_by_rule
from cellmill.shards.manifest import write_manifest
from cellmill.shards.shuffle import PART, among, joinids_of
from cellmill.splits import VALIDATION, check_kept
from cellmill.vocabulary import Vocabulary

ROWS = 2**17
"""Rows of the blocks' quality control that are in memory at a time."""


def assemble(
    *,
    summary: Path,
    parts: list[Path],
    block_qcs: list[Path],
    vocabulary: Path,
    duplicates: Path | None,
    leaks: Path | None,
    out: Path,
    qc: Path,
    qc_cells: Path,
) -> dict:
    """Link the shards of a selection into its folder, write its manifest, and sum up quality control.

    Parameters
    ----------
    summary
        ``plan.json`` of the selection.
    parts
        Folders of `cellmill.shards.shuffle.shuffle_part`, in order.
    block_qcs
        Per-cell quality control of the blocks, in order.
    vocabulary
        ``vocabulary/{organism}.parquet``.
    duplicates, leaks
        Parquet files with the `soma_joinid` of the cells that these rules removed; None where a rule removed none.
    out
        Folder ``shards/{cells}``: ``{split}-00000.parquet``, ..., ``manifest.json``. Replaced as a whole. The shards
        are hard links where the file system has them, else copies.
    qc
        Parquet ``dataset_id, rule, removed, remaining``, rules in order of application, the first row `selected`.
    qc_cells
        Parquet: the rows of the blocks' quality control one after the other, `removed_by` filled for the late rules.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    CellmillError
        A part is missing, or no cell is left of the selection, of a split, or of a unit that is held out by name.
    """
    content = json.loads(Path(summary).read_text())
    late = {"leaks": leaks, "duplicates": duplicates}
    with atomic(qc_cells) as qc_cells_temporary, atomic(qc) as qc_temporary:
        late_joinids = {rule: joinids_of([path] if path else []) for rule, path in late.items()}
        cells = _write_qc_cells(block_qcs, late_joinids, qc_cells_temporary)
        rows = add_rows(content["qc"], {rule: cells[rule] for rule in (*X_RULES, *LATE_RULES)})
        pq.write_table(pa.Table.from_pylist(rows, TABLE_SCHEMA), qc_temporary, compression="zstd")
        shards = _shards_of(parts)
        splits = {split: [] for split in sorted(content["splits"])}
        for _, shard in shards:
            splits[shard["split"]].append(shard)
        if empty := [split for split, listed in splits.items() if not listed]:
            raise CellmillError(
                f"{content['selection']}: no cell of split '{empty[0]}' is left after quality control: "
                f"{explain_removed(rows)}; relax {content['selection']}.quality or select more"
            )
        _check_named_units(content, shards)
        n_cells, n_kept = sum(shard["cells"] for _, shard in shards), sum(cells[None].values())
        if n_cells != n_kept:
            raise CellmillError(
                f"{content['selection']}: quality control kept {n_kept:,} cells, but the shards in {parts[0].parent} "
                f"hold {n_cells:,}; delete that folder and the blocks beside it and run again"
            )
        with _replaced(Path(out)) as folder:
            for part, shard in shards:
                _link(part / shard["file"], folder / shard["file"])
            genes = Vocabulary.read(vocabulary)
            selection = {key: content[key] for key in ("selection", "filter", "quality", "held_out")}
            manifest = write_manifest(
                folder,
                organism=content["organism"],
                census=content["census"],
                selection=selection | {"removed": removed_by_rule(rows)},
                vocabulary_hash=genes.hash,
                n_genes=len(genes),
                splits=splits,
            )
    return manifest


def _shards_of(parts: list[Path]) -> list[tuple[Path, dict]]:
    """Folder and description of every shard, in order."""
    shards = []
    for part in map(Path, parts):
        try:
            shards += [(part, shard) for shard in json.loads((part / PART).read_text())["shards"]]
        except (OSError, ValueError, KeyError) as error:
            raise CellmillError(f"{part} is no finished part of shards; delete it and run again") from error
    return shards


def _check_named_units(content: dict, shards: list[tuple[Path, dict]]) -> None:
    """Raise `CellmillError` where a donor or data set that is held out by name has lost all its cells."""
    from cellmill.shards.reader import read_obs  # it imports torch, which nothing else here needs

    held = [part / shard["file"] for part, shard in shards if shard["split"] == VALIDATION]
    if not held:
        return
    named = Splits(**content["validation"])
    column = f"{named.unit}_id"
    kept = {unit for path in held for unit in read_obs(path, [column])[column].unique().to_pylist()}
    for unit in named.validation:
        check_kept(unit, kept, named)


def _write_qc_cells(block_qcs: list[Path], late: dict[str, np.ndarray], path: Path) -> dict[str | None, Counter]:
    """Write the per-cell table to `path`; returns the cells that each rule removed from each data set, None: kept."""
    cells = defaultdict(Counter)
    with contextlib.ExitStack() as stack:
        writer = None
        for table in _rows_of(block_qcs):
            removed_by = table["removed_by"].cast(pa.string()).combine_chunks()
            joinid_B = table["soma_joinid"].to_numpy()
            for rule in LATE_RULES:
                broken_B = among(joinid_B, late[rule]) & removed_by.is_null().to_numpy(zero_copy_only=False)
                removed_by = pc.if_else(pa.array(broken_B), pa.scalar(rule), removed_by)
            place = table.schema.get_field_index("removed_by")
            table = table.set_column(place, pa.field("removed_by", pa.string()), removed_by)
            for row in table.group_by(["removed_by", "dataset_id"]).aggregate([([], "count_all")]).to_pylist():
                cells[row["removed_by"]][row["dataset_id"]] += row["count_all"]
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
            writer.write_table(table)
    return cells


def _rows_of(block_qcs: list[Path]) -> Iterator[pa.Table]:
    """The blocks' rows in order, `ROWS` at a time whatever the blocks are; the last table may be smaller, or empty."""
    waiting = None
    for path in block_qcs:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # buffered, the whole file would stay in memory
            for batch in file.iter_batches(ROWS, use_threads=False):
                table = _plain(pa.Table.from_batches([batch]))
                waiting = table if waiting is None else pa.concat_tables([waiting, table])
                while len(waiting) >= ROWS:
                    yield _coded(waiting.slice(0, ROWS))
                    waiting = waiting.slice(ROWS)
            if waiting is None:
                waiting = _plain(file.schema_arrow.empty_table())
    yield _coded(waiting)


def _plain(table: pa.Table) -> pa.Table:
    """`table` with strings in place of dictionaries, which differ from block to block."""
    kinds = [field.type for field in table.schema]
    columns = [
        column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column
        for column, kind in zip(table.columns, kinds, strict=True)
    ]
    return pa.table(dict(zip(table.column_names, columns, strict=True)))


def _coded(table: pa.Table) -> pa.Table:
    """`table` with dictionaries whose order depends on its rows alone."""
    columns = [column.combine_chunks() for column in table.columns]
    columns = [column.dictionary_encode() if pa.types.is_string(column.type) else column for column in columns]
    return pa.table(dict(zip(table.column_names, columns, strict=True)))


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """A new folder, which takes the place of `out` when the block ends."""
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
