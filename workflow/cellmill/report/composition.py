"""What shards are made of: cells by tissue, assay, cell type and data set, and how well the shuffle mixed them.

Legend: C values of a column, D draws, B cells of a batch.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.randomness import uniform
from cellmill.report import charts
from cellmill.report.render import Figures
from cellmill.shards.dataset import Shards

COLUMNS = ("dataset_id", "tissue", "assay", "cell_type", "disease", "suspension_type", "sex", "development_stage")
MAX_VALUES = 15
UNKNOWN = "unknown"
BATCH = 64
"""Cells of a batch whose mixing is looked at."""
MAX_SHARDS, MAX_CELLS = 16, 4096
"""How many shards, and cells of each, are looked at."""
DRAWS = 500
_ROWS = 1 << 17


def section(page: Figures, name: str, shards: Shards) -> dict:
    """Cells by each of `COLUMNS`, the most frequent values first."""
    counts = count_values(shards, COLUMNS)
    n_cells = sum(counts["dataset_id"].values())
    shown, unknown = [], []
    for column, cells in counts.items():
        order = sorted(cells, key=lambda value: (-cells[value], value))
        if order == [UNKNOWN]:
            unknown.append(column.replace("_", " "))
            continue
        rows = [
            {"value": value, "place": place, "cells": cells[value], "share": round(cells[value] / n_cells, 6)}
            for place, value in enumerate(order[:MAX_VALUES])
        ]
        rest = sum(cells[value] for value in order[MAX_VALUES:])
        if rest:
            label = f"{len(order) - MAX_VALUES:,} others"
            rows.append({"value": label, "place": MAX_VALUES, "cells": rest, "share": round(rest / n_cells, 6)})
        figure = None
        if len(rows) > 1:
            figure = page.figure("amounts", charts.amounts(), f"amounts.{name}.{column}", rows, height=19 * len(rows))
        title = "data set" if column == "dataset_id" else column.replace("_", " ")
        shown.append({"title": title, "n": len(order), "figure": figure, "only": order[0]})
    return {"columns": shown, "unknown": unknown, "n_cells": n_cells}


def count_values(shards: Shards, columns: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Cells of every value of text columns, over all splits, read in batches; a missing value counts as unknown."""
    counts: dict[str, dict[str, int]] = {column: {} for column in columns}
    for split in shards.splits:
        for entry in shards.manifest["splits"][split]:
            with pq.ParquetFile(shards.folder / entry["file"], pre_buffer=False) as file:
                for batch in file.iter_batches(_ROWS, columns=list(columns)):
                    for column in columns:
                        names, n_C = _values(batch[column])
                        own = counts[column]
                        for value, n in zip(names, n_C.tolist(), strict=True):
                            if n:
                                own[value] = own.get(value, 0) + n
    return counts


def _values(column: pa.Array) -> tuple[list[str], np.ndarray]:
    """Values of a dictionary column, and how many cells have each."""
    codes, names = _codes(column)
    return names, np.bincount(codes, minlength=len(names))


def _codes(column: pa.Array) -> tuple[np.ndarray, list[str]]:
    column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names = [UNKNOWN if value is None else value for value in column.dictionary.to_pylist()]
    codes = column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    return codes, [*names, UNKNOWN]


def mixing(shards: Shards) -> list[dict]:
    """How mixed the cells of the first split are, as they lie in the shards: entropy within batches of `BATCH` cells.

    Returns
    -------
    list of dict
        For data set and cell type ``column, values, whole, drawn, stored``: entropy in bits of the whole split, and the
        mean over batches drawn at random from it and over batches of neighbouring cells.
    """
    split = shards.splits[0]
    rows = []
    for column in ("dataset_id", "cell_type"):
        counts: dict[str, int] = {}
        stored, batch = [], min(BATCH, shards.n_cells(split))
        entries = [entry for entry in shards.manifest["splits"][split] if entry["cells"]]
        looked_at = {entries[i]["file"] for i in np.linspace(0, len(entries) - 1, MAX_SHARDS).astype(int)}
        for entry in entries:
            with pq.ParquetFile(shards.folder / entry["file"], pre_buffer=False) as file:
                for number, cells in enumerate(file.iter_batches(MAX_CELLS, columns=[column])):
                    codes, names = _codes(cells[column])
                    for value, n in zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True):
                        counts[value] = counts.get(value, 0) + n
                    if number == 0 and entry["file"] in looked_at:
                        whole = codes[: len(codes) // batch * batch].reshape(-1, batch)
                        stored += [entropy(np.bincount(codes_B)) for codes_B in whole]
        n_C = np.array([n for n in counts.values() if n])
        edges_C = np.cumsum(n_C) / n_C.sum()
        draws_DB = np.searchsorted(edges_C, uniform(0, "mixing", np.arange(DRAWS * batch)), side="right")
        drawn = [entropy(np.bincount(draws_B)) for draws_B in draws_DB.reshape(DRAWS, batch)]
        rows.append(
            {"column": column, "values": len(n_C), "whole": entropy(n_C), "batch": batch}
            | {"drawn": float(np.mean(drawn)), "stored": float(np.mean(stored)) if stored else None}
        )
    return rows


def entropy(n_C: np.ndarray) -> float:
    """Shannon entropy in bits of counts."""
    shares = n_C[n_C > 0] / n_C.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0
