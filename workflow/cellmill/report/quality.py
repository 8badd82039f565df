"""Quality control of a selection as pages show it: what each rule removed, and the distributions behind the rules.

Cells are counted, never listed: a page of 100 million cells is as small as one of a thousand.

Legend: B cells of one batch, K groups of cells (data sets, or assays), P parts (kept, removed), E bins of a quantity.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill import qc
from cellmill.errors import CellmillError
from cellmill.report import charts, inputs
from cellmill.report.render import Figures, share

MAX_DATASETS = 24
"""Data sets with plots of their own; the page says where there are more."""
MAX_ASSAYS = 8
MAX_BARS = 40
ALL = "all cells"
_ROWS = 1 << 17
_SHARES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Quantity:
    """A number of a cell that a rule looks at."""

    title: str
    rules: tuple[str, ...]
    """Keys of `cellmill.config.Quality`: its thresholds."""
    format: str
    """How its axis is written (d3)."""
    unknown: str
    """What is said where no cell has a value."""
    mads: str | None = None
    """Its logarithm among `cellmill.qc.MAD_QUANTITIES`; such a quantity has a logarithmic axis."""

    @property
    def log(self) -> bool:
        """Has it a logarithmic axis."""
        return self.mads is not None


QUANTITIES = {
    "raw_sum": Quantity("raw counts", ("min_counts", "max_counts"), "~s", "No cell.", "log_counts"),
    "nnz": Quantity("expressed genes", ("min_genes",), "~s", "No cell.", "log_genes"),
    "mito_fraction": Quantity("mitochondrial share", ("max_mito_fraction",), ".0%", "Its genes were not measured."),
    "ribo_fraction": Quantity("ribosomal share", ("max_ribo_fraction",), ".0%", "Its genes were not measured."),
    "doublet_score": Quantity("doublet score", ("max_doublet_score",), ".2~f", "No score was computed."),
}


def read_plan(path: Path) -> dict:
    """The content of a ``plan.json``, or a `CellmillError` that says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CellmillError(
            f"{path} cannot be read as JSON ({inputs.one_line(error)}); delete it and run again"
        ) from error
    if "edges" not in content.get("histograms", {}):
        raise CellmillError(f"{path} holds no histograms for the QC plots; delete it and run again")
    return content


# --- what each rule removed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """Cells of a data set: selected, removed by each rule that removed any, kept."""

    dataset: str
    selected: int
    by_rule: dict[str, int]
    kept: int


def read_removed(path: Path) -> list[Removed]:
    """``qc.parquet`` as one entry per data set, those that lost most cells first (held out is not lost)."""
    table = inputs.read_table(path, ["dataset_id", "rule", "removed", "remaining"])
    found = []
    for dataset, part in table.groupby("dataset_id", sort=False, observed=True):
        by_rule = {rule: int(n) for rule, n in zip(part["rule"], part["removed"], strict=True) if n}
        kept = int(part["remaining"].iloc[-1])
        found.append(Removed(str(dataset), kept + sum(by_rule.values()), by_rule, kept))
    lost = {entry.dataset: entry.selected - entry.kept - entry.by_rule.get("held_out", 0) for entry in found}
    return sorted(found, key=lambda entry: (-lost[entry.dataset], entry.dataset))


def in_order(rules) -> list[str]:
    """Rules in their order of application."""
    return sorted(set(rules), key=qc.RULES.index)


def removed_section(page: Figures, name: str, removed: list[Removed]) -> dict:
    """Table and bars of what each rule removed from each data set."""
    rules = in_order(rule for entry in removed for rule in entry.by_rule)
    rows = [
        {
            "dataset": entry.dataset,
            "selected": entry.selected,
            "removed": [(entry.by_rule.get(rule, 0), _share_of(entry.by_rule.get(rule, 0), entry)) for rule in rules],
            "kept": entry.kept,
            "share": _share_of(entry.kept, entry),
        }
        for entry in removed
    ]
    bars = [
        {"dataset": entry.dataset, "rule": rule.replace("_", " "), "order": order, "cells": n}
        | {"selected": entry.selected, "place": place, "share": n / max(entry.selected, 1)}
        for place, entry in enumerate(removed[:MAX_BARS])
        for order, (rule, n) in enumerate([("kept", entry.kept), *((r, entry.by_rule.get(r, 0)) for r in rules)])
        if n
    ]
    colours = dict(zip(qc.RULES, charts.CATEGORIES, strict=False))
    named = {"kept": "var(--bar)"} | {rule.replace("_", " "): colours[rule] for rule in rules}
    figure = None
    if bars:
        height = 22 * min(len(removed), MAX_BARS)
        figure = page.figure(f"removed-{name}", charts.removed_bars(named), f"removed.{name}", bars, height=height)
    return {
        "rules": rules,
        "idle": [rule for rule in qc.RULES if rule not in rules],
        "rows": rows,
        "total": _total(removed, rules),
        "figure": figure,
        "legend": list(named.items()),
        "n_bars": min(len(removed), MAX_BARS),
    }


def _total(removed: list[Removed], rules: list[str]) -> dict:
    everything = Removed(
        "all data sets",
        sum(entry.selected for entry in removed),
        {rule: sum(entry.by_rule.get(rule, 0) for entry in removed) for rule in rules},
        sum(entry.kept for entry in removed),
    )
    return {
        "dataset": everything.dataset,
        "selected": everything.selected,
        "removed": [(everything.by_rule[rule], _share_of(everything.by_rule[rule], everything)) for rule in rules],
        "kept": everything.kept,
        "share": _share_of(everything.kept, everything),
    }


def _share_of(n: int, entry: Removed) -> str:
    return share(n / max(entry.selected, 1))


# --- distributions ----------------------------------------------------------------------------------------------------


class Binned:
    """Cells of a selection in bins, by data set and by assay.

    Attributes
    ----------
    edges
        For each quantity float64 [E + 1].
    counts
        For each group, ``("dataset", name)`` or ``("assay", name)``, and quantity int64 [P, E].
    joint
        For each group int64 [P, E, E]: raw counts by genes, of the cells whose counts were read.
    assays
        For each data set the names of its assays.
    """

    def __init__(self, log_edges: np.ndarray):
        self.edges = {name: log_edges if QUANTITIES[name].log else _SHARES for name in QUANTITIES}
        self.counts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.joint: dict[tuple[str, str], np.ndarray] = {}
        self.assays: dict[str, set[str]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Count the cells of a batch of ``qc_cells.parquet``."""
        is_removed_B = batch["removed_by"].is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        bins = {name: self._bin(name, batch[name].to_numpy(zero_copy_only=False)) for name in QUANTITIES}
        codes = {}
        for kind in ("dataset", "assay"):
            column = batch["dataset_id" if kind == "dataset" else kind]
            codes[kind] = code_B, names = qc.text_codes(pa.chunked_array([column]))
            place_B = code_B * 2 + is_removed_B
            for name, bin_B in bins.items():
                n_bins = len(self.edges[name]) - 1
                tally_KPE = _tally(place_B, bin_B, 2 * len(names), n_bins).reshape(len(names), 2, n_bins)
                for group, tally_PE in zip(names, tally_KPE, strict=True):
                    own = self.counts.setdefault((kind, group), {})
                    own[name] = own.get(name, 0) + tally_PE
            n_bins = len(self.edges["raw_sum"]) - 1
            both_B = bins["raw_sum"] * n_bins + bins["nnz"]
            tally_KPE = _tally(place_B, both_B, 2 * len(names), n_bins**2).reshape(len(names), 2, n_bins, n_bins)
            for group, tally_PEE in zip(names, tally_KPE, strict=True):
                self.joint[kind, group] = self.joint.get((kind, group), 0) + tally_PEE
        (dataset_B, datasets), (assay_B, assays) = codes.values()
        for pair in np.unique(dataset_B * len(assays) + assay_B).tolist():
            self.assays.setdefault(datasets[pair // len(assays)], set()).add(assays[pair % len(assays)])

    def add_planned(self, datasets: dict) -> None:
        """Count the cells that the plan removed before their counts were read: ``histograms.datasets`` of it.

        Not those that are held out, which say nothing of quality, and not those it kept, which qc_cells.parquet has.
        """
        for dataset, quantities in datasets.items():
            for name, outcomes in quantities.items():
                for outcome in outcomes.keys() - {"held_out", "kept"}:
                    own = self.counts.setdefault(("dataset", dataset), {})
                    tally_PE = own.setdefault(name, np.zeros((2, len(self.edges[name]) - 1), np.int64))
                    for place, n in outcomes[outcome].items():
                        tally_PE[1, int(place)] += n

    def _bin(self, name: str, value_B: np.ndarray) -> np.ndarray:
        """int64 [B]: the bin of each value, outer bins also holding what lies beyond; -1 where it is missing."""
        edges, value_B = self.edges[name], value_B.astype(np.float64)
        bin_B = np.clip(np.searchsorted(edges, value_B, side="right") - 1, 0, len(edges) - 2)
        return np.where(np.isfinite(value_B), bin_B, -1)


def _tally(place_B: np.ndarray, bin_B: np.ndarray, n_places: int, n_bins: int) -> np.ndarray:
    known = bin_B >= 0
    return np.bincount(place_B[known] * n_bins + bin_B[known], minlength=n_places * n_bins)


def bin_cells(plan: dict, path: Path) -> Binned:
    """All selected cells in bins.

    Parameters
    ----------
    plan
        Content of ``plan.json``: raw counts and genes of the cells that the rules on obs removed.
    path
        ``qc_cells.parquet``, read batch by batch: the quantities of the others, and which of them were removed.
    """
    binned = Binned(np.array(plan["histograms"]["edges"]))
    columns = ["dataset_id", "assay", *QUANTITIES, "removed_by"]
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # buffered, the whole file would stay in memory
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise CellmillError(
                    f"{path} has no column {', '.join(missing)}; another version wrote it, so delete it and run again"
                )
            for batch in file.iter_batches(_ROWS, columns=columns):
                if len(batch):
                    binned.add(batch)
    except (OSError, pa.ArrowInvalid) as error:
        raise CellmillError(
            f"{path} cannot be read for the QC plots ({inputs.one_line(error)}); delete it and run the workflow again"
        ) from error
    binned.add_planned(plan["histograms"]["datasets"])
    return binned


def distributions(page: Figures, name: str, plan: dict, binned: Binned) -> dict | None:
    """Histograms of every quantity, raw counts against genes, and quantiles by data set, with a chooser of cells."""
    groups, n_datasets = _groups(binned)
    if not groups:
        return None
    plots = [_histogram(page, name, quantity, plan, binned, groups) for quantity in QUANTITIES]
    joint = []
    for number, (_, members) in enumerate(groups):
        cells_PEE = sum(binned.joint[group] for group in members if group in binned.joint)
        if np.ndim(cells_PEE):
            most = np.log1p(cells_PEE.sum(axis=0).max())
            for i, j in np.argwhere(cells_PEE.sum(axis=0)).tolist():
                kept, lost = cells_PEE[:, i, j].tolist()
                shade = round(float(np.log1p(kept + lost) / most), 2)
                joint.append({"group": number, "i": i, "j": j, "kept": kept, "removed": lost, "shade": shade})
    density = None
    if joint:
        edges = np.round(binned.edges["raw_sum"], 1).tolist()
        used = [[row[axis] for row in joint] for axis in "ij"]
        domains = [[edges[min(places)], edges[max(places) + 1]] for places in used]
        density = page.figure(f"density-{name}", charts.density(edges, *domains), f"density.{name}", joint, group="0")
    return {
        "choices": [
            ("", [("0", ALL)]),
            ("data set", [(str(i), label) for i, (label, m) in enumerate(groups) if i and m[0][0] == "dataset"]),
            ("assay", [(str(i), label) for i, (label, m) in enumerate(groups) if i and m[0][0] == "assay"]),
        ],
        "plots": plots,
        "density": density,
        "strips": _strips(page, name, binned, groups) if n_datasets > 1 else [],
        "n_datasets": n_datasets,
        "n_shown": min(n_datasets, MAX_DATASETS),
    }


def _groups(binned: Binned) -> tuple[list[tuple[str, list]], int]:
    """What can be chosen, label and members: all cells, the largest data sets, and assays, if there are several."""
    sizes: dict[str, list] = {"dataset": [], "assay": []}
    for kind, group in binned.counts:
        sizes[kind].append((int(binned.counts[kind, group]["raw_sum"].sum()), group))
    datasets = [group for _, group in sorted(sizes["dataset"], key=lambda item: (-item[0], item[1]))]
    assays = [group for _, group in sorted(sizes["assay"], key=lambda item: (-item[0], item[1]))]
    groups = [(ALL, [("dataset", dataset) for dataset in datasets])] if datasets else []
    if len(datasets) > 1:
        groups += [(dataset, [("dataset", dataset)]) for dataset in datasets[:MAX_DATASETS]]
    if len(assays) > 1:
        groups += [(assay, [("assay", assay)]) for assay in assays[:MAX_ASSAYS]]
    return groups, len(datasets)


def _histogram(page: Figures, name: str, key: str, plan: dict, binned: Binned, groups) -> dict:
    quantity, rows, limits, empty = QUANTITIES[key], [], [], []
    for number, (_, members) in enumerate(groups):
        cells_PE = sum(binned.counts[group][key] for group in members if key in binned.counts[group])
        used = np.flatnonzero(cells_PE.sum(axis=0)) if np.ndim(cells_PE) else ()
        for place in used:
            kept, lost = cells_PE[:, place].tolist()
            rows.append({"group": number, "bin": int(place), "kept": kept, "removed": lost})
        if not len(used):
            empty.append(number)
        else:
            limits += [{"group": number} | limit for limit in _limits(quantity, plan, binned, members)]
    if not rows:
        return {"title": quantity.title, "figure": None, "unknown": quantity.unknown}
    shown = [row["bin"] for row in rows]
    rows += [{"group": number, "bin": shown[0], "kept": 0, "removed": 0} for number in empty]  # an axis without bars
    edges = np.round(binned.edges[key], 3)
    domain = [float(edges[min(shown)]), float(edges[max(shown) + 1])]
    chart = charts.histogram(edges.tolist(), domain, quantity.log, quantity.format, bool(limits))
    figure = page.figure(f"histogram-{name}-{key}", chart, f"qc.{name}.{key}", rows + limits, group="0")
    return {"title": quantity.title, "figure": figure}


def _limits(quantity: Quantity, plan: dict, binned: Binned, members: Sequence[tuple[str, str]]) -> list[dict]:
    """Thresholds that can remove a cell of a group: the general ones, those of its assays, and its MAD limits."""
    rules = plan["quality"]
    assays = {
        assay for kind, group in members for assay in (binned.assays.get(group, ()) if kind == "dataset" else (group,))
    }
    found = []
    for rule in quantity.rules:
        own = {assay: (rules.get("per_assay") or {}).get(assay, {}).get(rule) for assay in assays}
        if not assays or any(value is None for value in own.values()):
            found.append((rules.get(rule), rule))
        found += [(value, f"{rule} of {assay}") for assay, value in sorted(own.items())]
    if quantity.mads and len(members) == 1 and members[0][0] == "dataset":
        for assay, limits in (plan.get("mads") or {}).get(members[0][1], {}).items():
            of_assay = f" of {assay}" if len(assays) > 1 else ""
            found += [(float(np.expm1(value)), f"max_mads{of_assay}") for value in limits.get(quantity.mads, ())]
    smallest, largest = (1, np.inf) if quantity.log else (0, 1)
    return [
        {"threshold": round(value, 3), "rule": rule.replace("_", " ")}
        for value, rule in found
        if value is not None and smallest < value < largest
    ]


def _strips(page: Figures, name: str, binned: Binned, groups) -> list[dict]:
    """For each quantity, the quantiles of the kept cells of each data set, in the order of their size."""
    strips = []
    for key, quantity in QUANTITIES.items():
        rows = []
        for label, members in groups[1:]:
            kept_E = binned.counts[members[0]].get(key, np.zeros((2, 1)))[0]
            if members[0][0] == "dataset" and kept_E.sum():
                rows.append({"dataset": label, "cells": int(kept_E.sum())} | _quantiles(kept_E, binned.edges[key]))
        if rows:
            chart = charts.strips(quantity.log, quantity.format)
            figure = page.figure(f"strips-{key}", chart, f"strips.{name}.{key}", rows, height=20 * len(rows))
            strips.append({"title": quantity.title, "figure": figure})
    return strips


def _quantiles(cells_E: np.ndarray, edges: np.ndarray) -> dict[str, float]:
    """Quantiles of binned values, linear within a bin."""
    up_to = np.concatenate([[0], np.cumsum(cells_E)]) / cells_E.sum()
    shares = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
    return {name: float(f"{np.interp(at, up_to, edges):.4g}") for name, at in shares.items()}
