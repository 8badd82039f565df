"""The passes over obs that a plan rests on: which cells pass, and what is known of them.

`scan_obs` streams obs once through all rules that look at a cell alone and writes the few numbers of every cell that
passes to a temporary table. The limits of `max_mads`, which need the other cells of a data set and assay, come from
that table (`find_limits`), and so does all else: `passed_cells` streams it, `settle` sums it up. Memory does not grow
with the Census, but for one entry per donor of a data set and one per tile of X.

Legend: B cells of one table, U units (pairs of dataset_id and donor_id), G groups (pairs of dataset_id and assay),
Q quantities of `QUANTITIES`, R outcomes (the rules of `cellmill.qc.OBS_RULES`, then kept), E bins of a histogram,
M quantities of `cellmill.qc.MAD_QUANTITIES`, P tiles of X with planned cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill import qc
from cellmill.census.holdout import HoldOut
from cellmill.census.read import TILE
from cellmill.config import Quality
from cellmill.progress import Progress

QUANTITIES = ("raw_sum", "nnz")
EDGES = np.round(10 ** (np.arange(7 * 12 + 1) / 12), 6)
"""Edges of the histograms of `QUANTITIES`, twelve bins a decade; the outer bins also hold what lies beyond them."""
PASSED_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("unit", pa.int32()),
        ("group", pa.int32()),
        ("raw_sum", pa.int64()),
        ("nnz", pa.int64()),
    ]
)
ROWS = 1 << 17
"""Rows of a row group of the temporary table: what is held in memory at a time."""


@dataclass
class Scan:
    """What a pass over obs found.

    Attributes
    ----------
    units, groups
        Pairs of dataset_id with donor_id, and with assay, in order of appearance.
    selected_U
        Cells of each unit that the filter selects.
    is_held_out_U
        Units that may not enter.
    histograms
        For each data set int64 [Q, R, E]: its selected cells by quantity, outcome and bin.
    """

    units: list[tuple[str, str]] = field(default_factory=list)
    groups: list[tuple[str, str]] = field(default_factory=list)
    selected_U: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    is_held_out_U: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    histograms: dict[str, np.ndarray] = field(default_factory=dict)

    def count(self, names: list[str], dataset_B: np.ndarray, outcome_B: np.ndarray, values_QB: list) -> None:
        """Add cells to the histograms: of the data sets `names` (one may come twice), with these outcomes, values."""
        outcomes, bins = qc.PASSED + 1, len(EDGES) - 1
        tallies = []
        for value_B in values_QB:
            bin_B = np.clip(np.searchsorted(EDGES, value_B, side="right") - 1, 0, bins - 1)
            place_B = (dataset_B * outcomes + outcome_B) * bins + bin_B
            tally = np.bincount(place_B, minlength=len(names) * outcomes * bins)
            tallies.append(tally.reshape(-1, outcomes, bins))
        for name, *cells_QRE in zip(names, *tallies, strict=True):
            if np.any(cells_QRE[0]):
                self.histograms[name] = self.histograms.get(name, 0) + np.stack(cells_QRE)


def scan_obs(obs, condition: str | None, quality: Quality, hold_outs: list[HoldOut], passed: Path) -> Scan:
    """Stream obs once: count the cells that a rule removes, and write the others to `passed`.

    Parameters
    ----------
    obs
        The organism's obs.
    condition
        Value filter of the selection; None selects every cell.
    quality
        Thresholds.
    hold_outs
        What may not enter.
    passed
        Parquet with the columns of `PASSED_SCHEMA`, in the order of joinids: the cells that pass, but for `max_mads`.
    """
    scan = Scan()
    units: dict[tuple[str, str], int] = {}
    groups: dict[tuple[str, str], int] = {}
    held_U: list[bool] = []
    columns = ["soma_joinid", "donor_id", *qc.obs_columns(quality)]
    n_cells = obs.count
    with pq.ParquetWriter(passed, PASSED_SCHEMA) as writer, Progress("obs", n_cells) as progress:
        # Row-major is the order of the joinids: without it, tables may come in any order.
        for table in obs.read(column_names=columns, value_filter=condition, result_order="row-major"):
            if not len(table):
                continue
            dataset_B, datasets = qc.text_codes(table["dataset_id"])
            unit_B = _number(dataset_B, datasets, *qc.text_codes(table["donor_id"]), units)
            group_B = _number(dataset_B, datasets, *qc.text_codes(table["assay"]), groups)
            held_U += [any(out.covers(*unit) for out in hold_outs) for unit in list(units)[len(held_U) :]]
            broken_B = qc.first_broken_rule(table, quality, np.array(held_U, bool)[unit_B])
            is_lost_B = broken_B < qc.PASSED
            values_QB = [table[name].to_numpy() for name in QUANTITIES]
            scan.count(datasets, dataset_B[is_lost_B], broken_B[is_lost_B], [v[is_lost_B] for v in values_QB])
            selected_U = np.bincount(unit_B, minlength=len(units))
            selected_U[: len(scan.selected_U)] += scan.selected_U
            scan.selected_U = selected_U
            columns_B = [table["soma_joinid"].to_numpy(), unit_B, group_B, *values_QB]
            kept = pa.table([column[~is_lost_B] for column in columns_B], names=PASSED_SCHEMA.names)
            if len(kept):
                writer.write_table(kept.cast(PASSED_SCHEMA), row_group_size=ROWS)
            progress.update(min(int(columns_B[0][-1]) + 1, n_cells))  # joinids count all cells of the Census
    scan.units, scan.groups, scan.is_held_out_U = list(units), list(groups), np.array(held_U, bool)
    return scan


def _number(first_B: np.ndarray, firsts: list[str], second_B: np.ndarray, seconds: list[str], numbers: dict):
    """int64 [B]: the number of each pair of names; `numbers` gets those that are new."""
    pairs, place_B = np.unique(first_B * len(seconds) + second_B, return_inverse=True)
    found = [
        numbers.setdefault((firsts[pair // len(seconds)], seconds[pair % len(seconds)]), len(numbers))
        for pair in pairs.tolist()
    ]
    return np.array(found, np.int64)[place_B]


def find_limits(passed: Path, n_groups: int, max_mads: float | None) -> np.ndarray | None:
    """Limits of `max_mads`, from the cells in `passed`.

    Groups are read one after the other. In a Census the cells of a data set are neighbours, so each is read about once.

    Returns
    -------
    float64 [G, M, 2] as `cellmill.qc.mad_limits` has them, or None where the rule is off.
    """
    if max_mads is None:
        return None
    limits_GM2 = np.empty((n_groups, len(qc.MAD_QUANTITIES), 2))
    for group, limits_M2 in enumerate(limits_GM2):
        cells_ME = np.zeros((len(qc.MAD_QUANTITIES), qc.MAD_BINS), np.int64)
        for cells in _row_groups(passed, group):
            of_group_B = cells["group"] == group
            steps_MB = qc.mad_quantities(cells["raw_sum"][of_group_B], cells["nnz"][of_group_B])
            for cells_E, steps_B in zip(cells_ME, steps_MB, strict=True):
                np.add.at(cells_E, steps_B, 1)
        limits_M2[:] = qc.mad_limits(cells_ME, max_mads)
    return limits_GM2


def _row_groups(passed: Path, group: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The columns of `passed`, one row group at a time; only those that may hold cells of a group, if one is given."""
    with pq.ParquetFile(passed) as file:
        place = PASSED_SCHEMA.get_field_index("group")
        for number in range(file.num_row_groups):
            range_of = file.metadata.row_group(number).column(place).statistics
            if group is None or range_of.min <= group <= range_of.max:
                table = file.read_row_group(number)
                yield {name: table[name].to_numpy() for name in table.column_names}


def passed_cells(passed: Path, limits_GM2: np.ndarray | None) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The cells in `passed`, a table at a time: their columns by name, and bool [B] where `max_mads` removes them."""
    for cells in _row_groups(passed):
        is_outlier_B = np.zeros(len(cells["group"]), bool)
        if limits_GM2 is not None:
            steps_MB = qc.mad_quantities(cells["raw_sum"], cells["nnz"])
            low_MB, high_MB = limits_GM2[cells["group"]].transpose(2, 1, 0)
            is_outlier_B = ((steps_MB < low_MB) | (steps_MB > high_MB)).any(axis=0)
        yield cells, is_outlier_B


def settle(passed: Path, limits_GM2: np.ndarray | None, scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum up the cells in `passed` and add them to the histograms of `scan`.

    Returns
    -------
    cells_U, nonzeros_U
        What is kept of each unit.
    edges_P
        The `work` before the first planned cell of each tile of X.
    """
    cells_U, nonzeros_U = np.zeros((2, len(scan.units)), np.int64)
    edges, before, last_tile = [], 0, -1
    for cells, is_outlier_B in passed_cells(passed, limits_GM2):
        outcome_B = np.where(is_outlier_B, qc.OBS_RULES.index("max_mads"), qc.PASSED)
        groups, group_B = np.unique(cells["group"], return_inverse=True)
        datasets = [scan.groups[group][0] for group in groups]
        scan.count(datasets, group_B, outcome_B, [cells[name] for name in QUANTITIES])
        joinid_B, unit_B, nnz_B = (cells[name][~is_outlier_B] for name in ("soma_joinid", "unit", "nnz"))
        if len(joinid_B):
            np.add.at(cells_U, unit_B, 1)
            np.add.at(nonzeros_U, unit_B, nnz_B)
            tile_B = joinid_B // TILE
            work_B = work(nnz_B)
            is_edge_B = np.diff(tile_B, prepend=last_tile) > 0
            edges.append(before + (np.cumsum(work_B) - work_B)[is_edge_B])
            before, last_tile = before + int(work_B.sum()), tile_B[-1]
    return cells_U, nonzeros_U, np.concatenate([np.zeros(0, np.int64), *edges])


def work(nnz_B: np.ndarray) -> np.ndarray:
    """int64 [B]: what a cell counts for when blocks are cut: its nonzeros, and one for itself."""
    return nnz_B + 1


def histogram_summary(histograms: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
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


def limit_summary(limits_GM2: np.ndarray | None, groups: list[tuple[str, str]]) -> dict[str, dict[str, dict]]:
    """By data set, assay and quantity of `cellmill.qc.MAD_QUANTITIES`: smallest and largest value, where limited."""
    summary: dict[str, dict[str, dict]] = {}
    if limits_GM2 is not None:
        for (dataset_id, assay), limits_M2 in sorted(zip(groups, limits_GM2.tolist(), strict=True)):
            limits = {
                name: [round(limit * qc.MAD_STEP, 6) for limit in pair]
                for name, pair in zip(qc.MAD_QUANTITIES, limits_M2, strict=True)
                if np.isfinite(pair).all()
            }
            if limits:
                summary.setdefault(dataset_id, {})[assay] = limits
    return summary
