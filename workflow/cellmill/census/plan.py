"""The plan of a selection: which cells, in which split, block and shard, decided from obs before any count is read.

A selection is a corpus (of one organism) or one benchmark data set. `cellmill.census.scan` streams obs through the
filter and the rules of `cellmill.qc`; `cellmill.census.holdout` says what may not enter, `cellmill.splits` what is for
validation, `cellmill.census.blocks` how the work is cut and what it will cost.

Legend: U units (pairs of dataset_id and donor_id).
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from cellmill import qc
from cellmill.census import blocks as cutting
from cellmill.census.holdout import BY_NAME, HoldOut, held_out_by_benchmark, held_out_by_name
from cellmill.census.read import (
    check_terms,
    known_values,
    open_census,
    organism_obs,
    suggest,
    value_filter,
    values_elsewhere,
)
from cellmill.census.scan import EDGES, Scan, find_limits, histogram_summary, limit_summary, scan_obs, settle
from cellmill.config import Census, Corpus, Dataset, HeldOut, Splits
from cellmill.errors import CellmillError
from cellmill.files import atomic, unwritable
from cellmill.shards.order import Order, hash_edges
from cellmill.splits import ALL, TRAIN, VALIDATION, check_not_empty, units_of, validation_units

OBS_BUFFER_MB = 1
"""Read buffer of each column of obs: 131,072 cells at a time, so that planning takes little memory."""
_HEADINGS = ("selection", "organism", "data sets", "cells", "removed", "nonzeros", "GB of shards", "blocks")
_HEADINGS += ("CPU time", "MB per job")
_WIDTH = 250


def plan_cells(
    census: Census,
    path: Path | None,
    selection: Corpus | Dataset,
    *,
    name: str,
    organism: str,
    benchmarks: dict[str, Dataset],
    blocks: int,
    cells_per_shard: int,
    shuffle_seed: int,
    plan: Path,
    summary: Path,
) -> dict:
    """Plan a selection and write ``plan.parquet`` and ``plan.json``.

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    selection
        The corpus (cut into splits) or a benchmark data set (one split "all").
    name
        `corpus`, `corpus-ORGANISM` or the benchmark's name; stands in errors and in the summary.
    organism
        Organism of the Census, such as homo_sapiens.
    benchmarks
        Benchmark data sets of the same organism and Census. What they touch (`Dataset.hold_out`) is held out of this
        selection. Empty when a benchmark is planned.
    blocks
        Jobs that curate the selection, each a range of joinids.
    cells_per_shard
        Cells of a shard, about.
    shuffle_seed
        Seed of the order of a corpus's cells; a benchmark keeps the order of the joinids.
    plan
        Parquet with the columns of `cellmill.census.blocks.PLAN_SCHEMA`, in the order of the joinids.
    summary
        JSON: cells, nonzeros, predicted bytes, seconds and memory, splits, order of the shards, blocks, data sets,
        removed cells, limits of `max_mads`, filter, Census, and histograms of the depth and genes of all selected
        cells. Under `held_out`: the selected cells of each data set that each benchmark and `corpus.held_out` keeps
        out.

    Returns
    -------
    dict
        The content of `summary`.

    Raises
    ------
    CellmillError
        A filter term, a name that is held out or a column of a benchmark is unknown, no cell passes the filter, none
        passes quality control, or a split would be empty.
    """
    key = "corpus" if isinstance(selection, Corpus) else f"datasets.{name}"
    with _scratch(Path(plan).with_name("passed.parquet.tmp")) as passed:
        with open_census(census, path, buffer_mb=OBS_BUFFER_MB) as collection:
            obs = organism_obs(collection, organism)
            _check_columns(obs, selection, key)
            condition = _checked_filter(collection, organism, selection, key)
            _check_quality(collection, organism, selection.quality, f"{key}.quality")
            hold_outs = _hold_outs(collection, organism, selection, benchmarks)
            splits = _splits_of_organism(collection, organism, selection)
            description = _describe(census, collection)
            scan = scan_obs(obs, condition, selection.quality, list(hold_outs.values()), passed)
        limits = find_limits(passed, len(scan.groups), selection.quality.max_mads)
        cells_U, nonzeros_U, edges = settle(passed, limits, scan)

        counts = {dataset_id: cells_QRE[0].sum(axis=1) for dataset_id, cells_QRE in scan.histograms.items()}
        if not counts:
            raise CellmillError(
                f"{name}: no cell of {organism} passes the filter {condition}; every term occurs in the Census, but no "
                f"cell has all of them, so relax {key}.include or exclude"
            )
        rows = qc.table_rows(counts)
        cells, nonzeros = int(cells_U.sum()), int(nonzeros_U.sum())
        if not cells:
            raise CellmillError(
                f"{name}: no cell is left after quality control: {qc.explain_removed(rows)}; relax {key}.quality or "
                "select more"
            )
        splits_U = _assign_splits(scan, cells_U, splits)
        deep = max(1, -(-nonzeros // cutting.NONZEROS_PER_SHARD))  # shards that so many counts ask for
        planned, joinid_edges = cutting.write_plan(
            passed,
            limits,
            plan,
            units=scan.units,
            splits_U=splits_U,
            cuts=cutting.cut(edges, nonzeros + cells, blocks),
            cells_per_shard=min(cells_per_shard, -(-cells // deep)),
        )

    split_rows = _split_summary(scan.units, cells_U, nonzeros_U, splits_U)
    shards = {
        split: cutting.n_shards(row["cells"], row["nonzeros"], cells_per_shard) for split, row in split_rows.items()
    }
    if splits:
        order = Order("hash", shuffle_seed, {split: hash_edges(n) for split, n in shards.items()})
    else:
        order = Order("joinid", 0, {ALL: joinid_edges})
    largest = max(row["nonzeros"] / len(order.edges[split]) for split, row in split_rows.items())
    planned = [block | cutting.predict_block(block["nonzeros"], census.buffer_mb) for block in planned]
    content = {
        "selection": name,
        "organism": organism,
        "census": description,
        "filter": condition,
        "quality": selection.quality.model_dump(),
        "cells": cells,
        "nonzeros": nonzeros,
        "predicted": cutting.predict(planned, largest),
        "splits": split_rows,
        "order": order.as_dict(),
        "blocks": planned,
        "datasets": {dataset_id: int(removed[-1]) for dataset_id, removed in sorted(counts.items()) if removed[-1]},
        "held_out": {source: _held_cells(scan, hold_out) for source, hold_out in hold_outs.items()},
        "qc": rows,
        "mads": limit_summary(limits, scan.groups),
        "validation": splits and splits.model_dump(),
        "histograms": {"edges": EDGES.tolist(), "datasets": histogram_summary(scan.histograms)},
    }
    with atomic(summary) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A file that is gone when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        path.unlink(missing_ok=True)


def _check_columns(obs, selection: Corpus | Dataset, where: str) -> None:
    """The columns that hold a benchmark's cell types and batches must exist."""
    if isinstance(selection, Dataset):
        for key in ("label", "batch"):
            column = getattr(selection, key)
            if column not in obs.schema.names:
                raise CellmillError(
                    f"{where}.{key}: the Census has no obs column '{column}'{suggest(column, obs.schema.names)}"
                )


def _checked_filter(collection, organism: str, selection: Corpus | Dataset, where: str) -> str | None:
    """The selection's filter, once every term of it is known to occur in the Census."""
    include = _checked(collection, organism, selection.include, f"{where}.include")
    exclude = _checked(collection, organism, getattr(selection, "exclude", {}), f"{where}.exclude")
    return value_filter(include, exclude)


def _check_quality(collection, organism: str, quality, where: str) -> None:
    """The values that quality control names must occur in the Census."""
    named = {
        "assays": ("assay", quality.assays),
        "tissue_types": ("tissue_type", quality.tissue_types),
        "per_assay": ("assay", list(quality.per_assay)),
    }
    for key, (column, values) in named.items():
        if values:
            _checked(collection, organism, {column: values}, f"{where}.{key}")


def _checked(collection, organism: str, terms: dict[str, list], where: str) -> dict[str, list]:
    try:
        return check_terms(collection, organism, terms)
    except CellmillError as error:
        raise CellmillError(f"{where}: {error}") from error


def _hold_outs(collection, organism: str, selection: Corpus | Dataset, benchmarks: dict[str, Dataset]):
    """What keeps cells out of the selection, by the benchmark's name or `BY_NAME`."""
    obs = organism_obs(collection, organism)
    hold_outs: dict[str, HoldOut] = {}
    for name, dataset in benchmarks.items():
        condition = _checked_filter(collection, organism, dataset, f"datasets.{name}")
        hold_outs[name] = held_out_by_benchmark(collection, obs, condition, dataset.hold_out)
    if isinstance(selection, Corpus) and selection.held_out != HeldOut():
        hold_outs[BY_NAME] = held_out_by_name(collection, organism, selection.held_out)
    return hold_outs


def _held_cells(scan: Scan, hold_out: HoldOut) -> dict[str, int]:
    """The selected cells of each data set that are held out for one reason."""
    cells: dict[str, int] = {}
    for unit, n in zip(scan.units, scan.selected_U.tolist(), strict=True):
        if hold_out.covers(*unit):
            cells[unit[0]] = cells.get(unit[0], 0) + n
    return dict(sorted(cells.items()))


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


def _splits_of_organism(collection, organism: str, selection: Corpus | Dataset) -> Splits | None:
    """What is held out for validation, less the names that only other organisms of the Census have."""
    if isinstance(selection, Dataset):
        return None
    splits = selection.splits
    if len(selection.organisms) == 1 or not splits.validation:
        return splits
    column = f"{splits.unit}_id"
    here = known_values(organism_obs(collection, organism), column)
    elsewhere = values_elsewhere(collection, organism, column)
    named = [name for name in splits.validation if name in here or name not in elsewhere]
    return splits.model_copy(update={"validation": named})


def _assign_splits(scan: Scan, cells_U: np.ndarray, splits: Splits | None) -> list[str]:
    """The split of each unit."""
    if splits is None:
        return [ALL] * len(scan.units)
    units = units_of(scan.units, splits)
    known = {unit: 0 for unit, is_held_out in zip(units, scan.is_held_out_U, strict=True) if not is_held_out}
    for unit, cells in zip(units, cells_U.tolist(), strict=True):
        if cells:
            known[unit] += cells
    chosen = validation_units(known, splits)
    splits_U = [VALIDATION if unit in chosen else TRAIN for unit in units]
    sums = {split: int(cells_U[np.array(splits_U) == split].sum()) for split in (TRAIN, VALIDATION)}
    check_not_empty(sums, splits, sum(cells > 0 for cells in known.values()))
    return splits_U


def _split_summary(
    units: list[tuple[str, str]], cells_U: np.ndarray, nonzeros_U: np.ndarray, splits_U: list[str]
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


def show_plans(summaries: list[Path], out: Path) -> str:
    """Show the plans of a run as one table: what will be read, what is left out, and what it will cost.

    Parameters
    ----------
    summaries
        ``plan.json`` of each selection.
    out
        Text file to write.

    Returns
    -------
    str
        The table, as `out` holds it.
    """
    plans = [json.loads(Path(path).read_text()) for path in summaries]
    sums = [sum(amounts) for amounts in zip(*(_amounts(plan) for plan in plans), strict=True)]
    most = max(plan["predicted"]["memory_mb"] for plan in plans)
    table = Table(box=MARKDOWN, show_footer=True)
    for heading, total in zip(_HEADINGS, _row("all", "", "", sums, most), strict=True):
        justify = "left" if heading in ("selection", "organism", "removed") else "right"
        table.add_column(heading, total, justify=justify, no_wrap=True)
    for plan in plans:
        removed = sorted(qc.removed_by_rule(plan["qc"]).items(), key=lambda item: -item[1])
        said = "\n".join(f"{rule} {n:,}" for rule, n in removed if n)
        most = plan["predicted"]["memory_mb"]
        table.add_row(*_row(plan["selection"], plan["organism"], said, _amounts(plan), most))
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    console.print(table)
    text = "\n".join(line.strip() for line in console.file.getvalue().splitlines()).strip() + "\n"
    with atomic(out) as temporary:
        temporary.write_text(text)
    return text


def _amounts(plan: dict) -> list[int | float]:
    """What adds up over plans: data sets, cells, nonzeros, bytes, blocks and CPU seconds."""
    predicted = plan["predicted"]
    counts = [len(plan["datasets"]), plan["cells"], plan["nonzeros"]]
    return [*counts, predicted["bytes"], len(plan["blocks"]), predicted["seconds"]]


def _row(selection: str, organism: str, removed: str, amounts: list[int | float], memory_mb: int) -> list[str]:
    datasets, cells, nonzeros, size, blocks, seconds = amounts
    counts = [f"{datasets:,}", f"{cells:,}", removed, f"{nonzeros:,}", f"{size / 1e9:,.3f}", f"{blocks:,}"]
    return [selection, organism, *counts, _time(seconds), f"{memory_mb:,}"]


def _time(seconds: float) -> str:
    """CPU time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
