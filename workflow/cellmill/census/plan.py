"""The plan of a selection: which cells, in which split and block, decided from obs before any count is read.

A selection is the corpus or one benchmark data set. One pass streams obs through the filter and the rules of
`cellmill.qc`; a second one, over the joinids that are left, assigns splits (`cellmill.splits`) and blocks. Neither
holds more than a table of obs (and the list of donors) at a time, whatever the size of the Census.

Legend: B cells of one table, U units (pairs of dataset_id and donor_id), D data sets, Q quantities of `QUANTITIES`,
R outcomes (the rules of `cellmill.qc`, then kept), E bins of a histogram.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill import qc
from cellmill.census.read import check_terms, open_census, organism_obs, suggest, value_filter
from cellmill.config import Census, Corpus, Dataset
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.splits import ALL, TRAIN, VALIDATION, check_not_empty, units_of, validation_units

SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.dictionary(pa.int32(), pa.string())),
        ("split", pa.dictionary(pa.int32(), pa.string())),
        ("block", pa.int32()),
        ("nnz", pa.int64()),
    ]
)
ROW_GROUP = 1 << 20
QUANTITIES = ("raw_sum", "nnz")
EDGES = np.round(10 ** (np.arange(7 * 12 + 1) / 12), 6)
"""Edges of the histograms of `QUANTITIES`, twelve bins a decade; the outer bins also hold what lies beyond them."""
BYTES_PER_NONZERO = 1.2
"""Of shards, predicted from the nonzeros of all genes; see the measurement in docs/log.md."""
_PASSED = pa.schema([("soma_joinid", pa.int64()), ("unit", pa.int32()), ("nnz", pa.int64())])


def plan_cells(
    census: Census,
    path: Path | None,
    selection: Corpus | Dataset,
    *,
    name: str,
    organism: str,
    benchmarks: dict[str, Dataset],
    plan: Path,
    summary: Path,
) -> dict:
    """Plan a selection and write ``plan.parquet`` and ``plan.json``.

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    selection
        The corpus (cut into splits and `blocks`) or a benchmark data set (one split "all", one block).
    name
        `corpus` or the benchmark's name; stands in errors and in the summary.
    organism
        Organism of the Census, such as homo_sapiens.
    benchmarks
        Benchmark data sets of the same Census. Every data set (dataset_id) of which one of them selects a cell is held
        out of this selection as a whole. Empty when a benchmark is planned.
    plan
        Parquet with the columns of `SCHEMA`, in the order of the joinids.
    summary
        JSON: cells, nonzeros, predicted bytes, splits, blocks, data sets, removed cells, filter, Census, and histograms
        of the depth and genes of all selected cells.

    Returns
    -------
    dict
        The content of `summary`.

    Raises
    ------
    CellmillError
        A filter term or a column of a benchmark is unknown, no cell passes the filter, none passes quality control, or
        a split would be empty.
    """
    passed = Path(plan).with_name("passed.tmp.parquet")
    passed.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_census(census, path) as collection:
            obs = organism_obs(collection, organism)
            _check_columns(obs, selection, name)
            condition = _checked_filter(collection, organism, selection, name)
            if selection.quality.assays:
                _checked(collection, organism, {"assay": selection.quality.assays}, f"{name}.quality.assays")
            held_out = {
                benchmark: _dataset_cells(obs, _checked_filter(collection, organism, dataset, benchmark))
                for benchmark, dataset in benchmarks.items()
            }
            description = _describe(census, collection)
            everything = frozenset(dataset_id for counts in held_out.values() for dataset_id in counts)
            units, histograms = _scan(obs, condition, selection.quality, everything, passed)

        counts = {dataset_id: cells_QRE[0].sum(axis=1) for dataset_id, cells_QRE in histograms.items()}
        if not counts:
            raise CellmillError(
                f"{name}: no cell of the Census passes the filter {condition}; every term occurs, but no cell has all "
                "of them, so relax include or exclude"
            )
        rows = qc.table_rows(counts)
        cells = sum(int(removed[-1]) for removed in counts.values())
        if not cells:
            raise CellmillError(
                f"{name}: no cell is left after quality control: {qc.explain_removed(rows)}; relax {name}.quality or "
                "select more"
            )
        donors, cells_U, nonzeros_U = _columns(units)
        splits_U = _splits(donors, cells_U, selection, everything)
        n_blocks = selection.blocks if isinstance(selection, Corpus) else 1
        blocks = _write_plan(passed, plan, donors, splits_U, n_blocks, int(nonzeros_U.sum()))
    finally:
        passed.unlink(missing_ok=True)

    content = {
        "selection": name,
        "organism": organism,
        "census": description,
        "filter": condition,
        "quality": selection.quality.model_dump(),
        "cells": cells,
        "nonzeros": int(nonzeros_U.sum()),
        "predicted_bytes": round(int(nonzeros_U.sum()) * BYTES_PER_NONZERO),
        "splits": _split_summary(donors, cells_U, nonzeros_U, splits_U),
        "blocks": blocks,
        "datasets": {dataset_id: int(removed[-1]) for dataset_id, removed in sorted(counts.items()) if removed[-1]},
        "held_out": held_out,
        "qc": rows,
        "validation": selection.splits.model_dump() if isinstance(selection, Corpus) else None,
        "histograms": {"edges": EDGES.tolist(), "datasets": _histograms(histograms)},
    }
    with atomic(summary) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


def _check_columns(obs, selection: Corpus | Dataset, name: str) -> None:
    """The columns that hold a benchmark's cell types and batches must exist."""
    if isinstance(selection, Dataset):
        for key in ("label", "batch"):
            column = getattr(selection, key)
            if column not in obs.schema.names:
                raise CellmillError(
                    f"datasets.{name}.{key}: the Census has no obs column '{column}'{suggest(column, obs.schema.names)}"
                )


def _checked_filter(collection, organism: str, selection: Corpus | Dataset, name: str) -> str | None:
    """The selection's filter, once every term of it is known to occur in the Census."""
    include = _checked(collection, organism, selection.include, f"{name}.include")
    exclude = _checked(collection, organism, getattr(selection, "exclude", {}), f"{name}.exclude")
    return value_filter(include, exclude)


def _checked(collection, organism: str, terms: dict[str, list], where: str) -> dict[str, list]:
    try:
        return check_terms(collection, organism, terms)
    except CellmillError as error:
        raise CellmillError(f"{where}: {error}") from error


def _describe(census: Census, collection) -> dict:
    """What identifies the Census, for the manifest.

    A Census that this run built is described without the day that it was built on: same cells, same manifest.
    """
    labels = ["census_schema_version", "dataset_schema_version", "total_cell_count"]
    description = {"source": census.source}
    if census.source == "public":
        description["version"] = census.version
    if census.source in ("public", "local"):
        labels.append("census_build_date")
    summary = collection["census_info"]["summary"].read(column_names=["label", "value"]).concat().to_pylist()
    return description | {row["label"]: row["value"] for row in summary if row["label"] in labels}


def _dataset_cells(obs, condition: str | None) -> dict[str, int]:
    """Cells that pass `condition` in each data set that has any."""
    cells: dict[str, int] = {}
    for table in obs.read(column_names=["dataset_id"], value_filter=condition):
        for value in table["dataset_id"].cast(pa.string()).value_counts().to_pylist():
            cells[value["values"]] = cells.get(value["values"], 0) + value["counts"]
    return dict(sorted(cells.items()))


def _scan(obs, condition: str | None, quality, held_out: frozenset[str], passed: Path):
    """Stream obs once: bin the kept and removed cells, and write joinid, unit and nnz of the kept ones to `passed`.

    Returns
    -------
    units : dict
        For each (dataset_id, donor_id), in order of appearance, the list [cells, nonzeros] that pass.
    histograms : dict
        For each data set int64 [Q, R, E]: its selected cells by quantity, outcome and bin.
    """
    units: dict[tuple[str, str], list[int]] = {}
    codes: dict[tuple[str, str], int] = {}
    histograms: dict[str, np.ndarray] = {}
    outcomes, bins = len(qc.OBS_RULES) + 1, len(EDGES) - 1
    columns = ["soma_joinid", "donor_id", *qc.OBS_COLUMNS]
    with pq.ParquetWriter(passed, _PASSED) as writer:
        # Row-major is the order of the joinids: without it, tables may come in any order.
        for table in obs.read(column_names=columns, value_filter=condition, result_order="row-major"):
            dataset_B, dataset_names = _codes(table["dataset_id"])
            donor_B, donor_names = _codes(table["donor_id"])
            broken_B = qc.first_broken_rule(table, quality, held_out)
            tallies = []
            for name in QUANTITIES:
                bin_B = np.clip(np.searchsorted(EDGES, table[name].to_numpy(), side="right") - 1, 0, bins - 1)
                place_B = (dataset_B * outcomes + broken_B) * bins + bin_B
                tally = np.bincount(place_B, minlength=len(dataset_names) * outcomes * bins)
                tallies.append(tally.reshape(-1, outcomes, bins))
            tally_DQRE = np.stack(tallies, axis=1)
            for dataset_id, cells_QRE in zip(dataset_names, tally_DQRE, strict=True):
                if cells_QRE.any():
                    histograms[dataset_id] = histograms.get(dataset_id, 0) + cells_QRE

            pairs, unit_B = np.unique(dataset_B * len(donor_names) + donor_B, return_inverse=True)
            passes_B = broken_B == len(qc.OBS_RULES)
            nnz_B = table["nnz"].to_numpy()
            cells = np.bincount(unit_B[passes_B], minlength=len(pairs))
            nonzeros = np.bincount(unit_B[passes_B], weights=nnz_B[passes_B], minlength=len(pairs))
            code_of = np.empty(len(pairs), np.int32)
            for place, pair in enumerate(pairs):
                unit = (dataset_names[pair // len(donor_names)], donor_names[pair % len(donor_names)])
                code_of[place] = codes.setdefault(unit, len(codes))
                total = units.setdefault(unit, [0, 0])
                total[0] += int(cells[place])
                total[1] += int(nonzeros[place])
            writer.write_table(
                pa.table(
                    [table["soma_joinid"].to_numpy()[passes_B], code_of[unit_B[passes_B]], nnz_B[passes_B]],
                    schema=_PASSED,
                )
            )
    return units, histograms


def _histograms(histograms: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """By data set, quantity and outcome (a rule, or "kept"): the cells of every bin that has any."""
    return {
        dataset_id: {
            name: {
                outcome: {str(at): int(cells_E[at]) for at in np.flatnonzero(cells_E)}
                for outcome, cells_E in zip((*qc.OBS_RULES, "kept"), cells_RE, strict=True)
                if cells_E.any()
            }
            for name, cells_RE in zip(QUANTITIES, cells_QRE, strict=True)
        }
        for dataset_id, cells_QRE in sorted(histograms.items())
    }


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int64 [B] codes into a list of names, of a text column (plain or dictionary)."""
    column = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    column = column.combine_chunks()
    return column.indices.to_numpy().astype(np.int64), column.dictionary.to_pylist()


def _columns(units: dict) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    totals = np.array(list(units.values()), dtype=np.int64).reshape(-1, 2)
    return list(units), totals[:, 0], totals[:, 1]


def _splits(
    donors: list[tuple[str, str]], cells_U: np.ndarray, selection: Corpus | Dataset, held_out: frozenset[str]
) -> list[str]:
    """The split of each (dataset_id, donor_id)."""
    if isinstance(selection, Dataset):
        return [ALL] * len(donors)
    units = units_of(donors, selection.splits)
    known = {unit: 0 for unit in units if unit[0] not in held_out}
    for unit, cells in zip(units, cells_U, strict=True):
        if cells:
            known[unit] += int(cells)
    chosen = validation_units(known, selection.splits)
    splits_U = [VALIDATION if unit in chosen else TRAIN for unit in units]
    sums = {split: int(cells_U[np.array(splits_U) == split].sum()) for split in (TRAIN, VALIDATION)}
    check_not_empty(sums, selection.splits, sum(cells > 0 for cells in known.values()))
    return splits_U


def _write_plan(
    passed: Path, plan: Path, donors: list[tuple[str, str]], splits_U: list[str], n_blocks: int, nonzeros: int
) -> list[dict]:
    """Write `plan` from the cells that passed; returns joinid range, cells and nonzeros of each block.

    A block is a range of joinids, so that its job reads neighbouring tiles; blocks hold about equal nonzeros.
    """
    dataset_names = sorted({dataset_id for dataset_id, _ in donors})
    split_names = sorted(set(splits_U))
    dataset_of_U = np.searchsorted(dataset_names, [dataset_id for dataset_id, _ in donors]).astype(np.int32)
    split_of_U = np.searchsorted(split_names, splits_U).astype(np.int32)
    blocks = [{"block": block, "cells": 0, "nonzeros": 0, "joinids": None} for block in range(n_blocks)]
    before = 0
    with atomic(plan) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for batch in pq.ParquetFile(passed).iter_batches(ROW_GROUP):
            joinid_B, unit_B, nnz_B = (column.to_numpy() for column in batch.columns)
            start_B = before + np.cumsum(nnz_B) - nnz_B
            before += int(nnz_B.sum())
            block_B = np.minimum(start_B * n_blocks // max(nonzeros, 1), n_blocks - 1).astype(np.int32)
            for number in np.unique(block_B):
                block, mask_B = blocks[number], block_B == number
                joinids = joinid_B[mask_B]
                block["cells"] += len(joinids)
                block["nonzeros"] += int(nnz_B[mask_B].sum())
                block["joinids"] = [block["joinids"][0] if block["joinids"] else int(joinids[0]), int(joinids[-1])]
            columns = [
                joinid_B,
                pa.DictionaryArray.from_arrays(dataset_of_U[unit_B], pa.array(dataset_names)),
                pa.DictionaryArray.from_arrays(split_of_U[unit_B], pa.array(split_names)),
                block_B,
                nnz_B,
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=ROW_GROUP)
    return blocks


def _split_summary(
    donors: list[tuple[str, str]], cells_U: np.ndarray, nonzeros_U: np.ndarray, splits_U: list[str]
) -> dict[str, dict]:
    """Cells, nonzeros and number of donors of each split."""
    summary = {}
    for split in sorted(set(splits_U)):
        mask_U = (np.array(splits_U) == split) & (cells_U > 0)
        summary[split] = {
            "cells": int(cells_U[mask_U].sum()),
            "nonzeros": int(nonzeros_U[mask_U].sum()),
            "donors": int(mask_U.sum()),
        }
    return summary
