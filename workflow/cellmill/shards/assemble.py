"""From blocks to the shards of a selection: one order of all cells, whatever the number of blocks."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.config import Splits
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.qc import MITO_RULE, TABLE_SCHEMA, add_mito_rows, explain_removed
from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch
from cellmill.shards.manifest import write_manifest
from cellmill.shards.reader import read_shard
from cellmill.shards.writer import ShardWriter
from cellmill.splits import ALL, VALIDATION, check_kept
from cellmill.vocabulary import Vocabulary


def assemble(
    *,
    plan: Path,
    summary: Path,
    blocks: list[Path],
    block_qcs: list[Path],
    vocabulary: Path,
    cells_per_shard: int,
    seed: int,
    out: Path,
    qc: Path,
    qc_cells: Path,
) -> dict:
    """Write the shards of a selection, its manifest, and the two tables of quality control.

    The cells of a corpus are put in the order of a hash of (seed, joinid), so that any run of neighbours is a random
    sample; a benchmark (split "all") keeps the order of joinids. Neither order depends on the blocks. One split's cells
    are held in memory at a time.

    Parameters
    ----------
    plan, summary
        ``plan.parquet`` and ``plan.json`` of the selection.
    blocks, block_qcs
        Outputs of `cellmill.shards.curate.curate_block`, in the order of the blocks.
    vocabulary
        ``vocabulary.parquet``.
    cells_per_shard
        Cells per file; the last one of a split may hold fewer.
    seed
        Key of the shuffle.
    out
        Folder ``shards/{cells}``: ``{split}-00000.parquet``, ..., ``manifest.json``. Replaced as a whole.
    qc
        Parquet ``dataset_id, rule, removed, remaining``, rules in order of application, the first row `selected`.
    qc_cells
        Parquet: the rows of the blocks' QC, in the order of joinids.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    CellmillError
        No cell is left of the selection, of one of its splits, or of a donor or data set that is held out by name.
    """
    content = json.loads(Path(summary).read_text())
    genes = Vocabulary.read(vocabulary)
    cells_qc = pa.concat_tables([pq.read_table(path) for path in block_qcs]).unify_dictionaries()
    rows = add_mito_rows(content["qc"], _removed_by_mito(cells_qc))
    name = content["selection"]

    out = Path(out)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        splits = {}
        for split in sorted(content["splits"]):
            cells, obs = _cells_of_split(plan, blocks, split, len(genes))
            if not len(cells):
                raise CellmillError(
                    f"{name}: no cell of split '{split}' is left after quality control: {explain_removed(rows)}; relax "
                    f"{name}.quality.{MITO_RULE} or select more"
                )
            if split == VALIDATION:
                named = Splits(**content["validation"])
                kept = set(obs[f"{named.unit}_id"].unique().to_pylist())
                for unit in named.validation:
                    check_kept(unit, kept, named)
            key = cells.joinids if split == ALL else hash64(seed, "shuffle", cells.joinids)
            order = np.lexsort((cells.joinids, key))
            splits[split] = []
            for number, start in enumerate(range(0, len(order), cells_per_shard)):
                chosen = order[start : start + cells_per_shard]
                with ShardWriter(temporary / f"{split}-{number:05d}.parquet") as writer:
                    writer.write(cells.take(chosen), obs.take(chosen))
                splits[split].append(writer.close())
        manifest = write_manifest(
            temporary,
            organism=content["organism"],
            census=content["census"],
            selection={key: content[key] for key in ("selection", "filter", "quality", "held_out")},
            vocabulary_hash=genes.hash,
            n_genes=len(genes),
            splits=splits,
        )
        with atomic(qc) as path:
            pq.write_table(pa.Table.from_pylist(rows, TABLE_SCHEMA), path, compression="zstd")
        with atomic(qc_cells) as path:
            pq.write_table(cells_qc, path, compression="zstd")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _removed_by_mito(cells_qc: pa.Table) -> dict[str, int]:
    """Cells that the mitochondrial share removed, for each data set that lost any."""
    removed = cells_qc.filter(pc.equal(cells_qc["removed_by"], MITO_RULE))["dataset_id"].cast(pa.string())
    return {row["values"]: row["counts"] for row in removed.value_counts().to_pylist()}


def _cells_of_split(plan: Path, blocks: list[Path], split: str, n_genes: int) -> tuple[CellBatch, pa.Table]:
    """All kept cells of a split, in the order of joinids."""
    joinids = pq.read_table(plan, columns=["soma_joinid"], filters=[("split", "=", split)])["soma_joinid"].to_numpy()
    batches, tables = [], []
    for block in blocks:
        cells, obs = read_shard(block, n_genes=n_genes)
        rows = np.flatnonzero(np.isin(cells.joinids, joinids, assume_unique=True))
        if len(rows):  # a block without cells lacks the extra columns and cannot be concatenated
            batches.append(cells.take(rows))
            tables.append(obs.drop_columns(["soma_joinid", "total_counts", "n_genes"]).take(rows))
    if not batches:
        none = np.zeros(0, np.int64)
        return CellBatch(none, np.zeros(1, np.int64), none, none, none), pa.table({})
    return CellBatch.concatenate(batches), pa.concat_tables(tables).unify_dictionaries()
