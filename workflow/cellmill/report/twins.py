"""Copies of cells as the corpus page shows them: duplicates within a corpus, and the audit against the benchmarks."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from cellmill.duplicates import COMPARED
from cellmill.report import charts, inputs
from cellmill.report.render import Figures, share

MAX_DATASETS = 24
MAX_PAIRS = 40
MAX_CELLS = 20


def duplicates_section(page: Figures, name: str, path: Path, config: dict) -> dict:
    """Cells of a corpus with the profile of another one, by the data sets that both stand in."""
    table = inputs.read_table(path, ["soma_joinid", "dataset_id", "kept_joinid", "kept_dataset_id"])
    pairs = _pairs(table)
    compared = _compared(path)
    dropped = config["corpus"]["duplicates"] == "drop"
    shown = sorted(set(pairs["dataset_id"]) | set(pairs["kept_dataset_id"]))
    rows = [
        {"dataset": pair.dataset_id, "kept_dataset": pair.kept_dataset_id, "cells": int(pair.cells)}
        for pair in pairs.itertuples()
    ]
    figure = None
    if len(rows) > 2 and len(shown) <= MAX_DATASETS:
        height = 30 * pairs["dataset_id"].nunique()
        figure = page.figure("matrix", charts.matrix(), f"duplicates.{name}", rows, height=height)
    within = int(pairs.loc[pairs["dataset_id"] == pairs["kept_dataset_id"], "cells"].sum())
    return {
        "cells": len(table),
        "within": within,
        "across": len(table) - within,
        "dropped": dropped,
        "figure": figure,
        "pairs": rows[:MAX_PAIRS],
        "n_pairs": len(rows),
        "compared": compared,
        "finding": _duplicates_finding(len(table), within, pairs, dropped, compared),
    }


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """``dataset_id, kept_dataset_id, cells``, the most cells first."""
    names = table[["dataset_id", "kept_dataset_id"]].astype(str)
    pairs = names.groupby(["dataset_id", "kept_dataset_id"]).size().rename("cells").reset_index()
    return pairs.sort_values(["cells", "dataset_id"], ascending=[False, True], kind="stable", ignore_index=True)


def _duplicates_finding(n: int, within: int, pairs: pd.DataFrame, dropped: bool, compared: dict | None) -> str:
    shallow = _shallow(compared)
    if not n:
        return f"No cell has the profile of another one{shallow}."
    what = "one of each profile is kept" if dropped else "all of them are kept"
    said = f"{n:,} cells are copies of another cell ({what}): {within:,} within a data set"
    across = pairs[pairs["dataset_id"] != pairs["kept_dataset_id"]]
    if len(across):
        most = across.iloc[0]
        most_of = ", most of them" if len(across) > 1 else ","
        said += (
            f", {n - within:,} across data sets{most_of} cells of {most.dataset_id} that are in {most.kept_dataset_id}"
        )
    return f"{said}{shallow}."


def leaks_section(path: Path) -> dict:
    """What the audit of a corpus found: benchmark cells in it, and how many cells it could not compare."""
    columns = ["soma_joinid", "dataset_id", "benchmark", "benchmark_joinid", "benchmark_dataset_id"]
    table = inputs.read_table(path, [*columns, "observation_joinid", "benchmark_observation_joinid"])
    names = table[["dataset_id", "benchmark", "benchmark_dataset_id"]].astype(str)
    pairs = names.groupby(list(names.columns)).size().rename("cells").reset_index()
    compared = [{"name": name} | counts for name, counts in (_compared(path) or {}).items()]
    n = table[["dataset_id", "soma_joinid"]].drop_duplicates().shape[0]
    return {
        "cells": n,
        "pairs": pairs.sort_values("cells", ascending=False, kind="stable").head(MAX_PAIRS).to_dict("records"),
        "named": table.head(MAX_CELLS).astype(str).to_dict("records"),
        "compared": [entry | {"share": share(entry["not_comparable"] / max(entry["cells"], 1))} for entry in compared],
        "finding": _leaks_finding(n, compared),
    }


def _leaks_finding(n: int, compared: list[dict]) -> str | None:
    if len(compared) < 2 and not n:
        return "There is no benchmark of this organism, so nothing could leak."
    cells = sum(entry["cells"] for entry in compared)
    shallow = _shallow({key: sum(entry[key] for entry in compared) for key in ("cells", "not_comparable")})
    if n:
        return f"Cells of the corpus that had the profile of a benchmark's cell, and were left out: {n:,}{shallow}."
    return f"No benchmark cell is in the corpus, by the profiles of {cells:,} cells{shallow}."


def _shallow(compared: dict | None) -> str:
    """The end of a sentence: how many cells are too shallow to compare."""
    if not compared or not compared["not_comparable"]:
        return ""
    part = share(compared["not_comparable"] / max(compared["cells"], 1))
    return f"; {part} of the cells are too shallow to tell"


def _compared(path: Path) -> dict | None:
    """What the table's metadata say of the cells that were compared, and could not be."""
    said = (pq.read_schema(path).metadata or {}).get(COMPARED)
    return json.loads(said) if said else None
