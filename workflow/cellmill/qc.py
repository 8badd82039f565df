"""Quality control: which rule removes a cell, and how many cells each rule removes from each data set.

The rules are applied in the order of `RULES`; a cell is counted under the first rule that it breaks. All but the last
are answered by the columns of obs alone, before any count is read.

Legend: B cells, D data sets.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellmill.config import Quality

OBS_RULES = ("held_out", "primary_only", "suspension_types", "assays", "min_counts", "max_counts", "min_genes")
"""Rules in order of application; `held_out` are the cells of benchmark data sets, the others are keys of the config."""
MITO_RULE = "max_mito_fraction"
RULES = (*OBS_RULES, MITO_RULE)
OBS_COLUMNS = ("dataset_id", "is_primary_data", "suspension_type", "assay", "raw_sum", "nnz")
"""Columns of obs that `first_broken_rule` needs."""
TABLE_SCHEMA = pa.schema(
    [("dataset_id", pa.string()), ("rule", pa.string()), ("removed", pa.int64()), ("remaining", pa.int64())]
)


def first_broken_rule(obs: pa.Table, quality: Quality, held_out: frozenset[str] = frozenset()) -> np.ndarray:
    """The first of `OBS_RULES` that each cell breaks.

    Parameters
    ----------
    obs
        B rows with the columns `OBS_COLUMNS`.
    quality
        Thresholds; a list that is empty and a threshold that is None remove nothing.
    held_out
        Data sets that are held out as a whole.

    Returns
    -------
    int64 [B], positions in `OBS_RULES`, or ``len(OBS_RULES)`` where a cell passes all of them.
    """
    broken = {
        "held_out": _is_in(obs["dataset_id"], held_out) if held_out else None,
        "primary_only": ~obs["is_primary_data"].to_numpy() if quality.primary_only else None,
        "suspension_types": ~_is_in(obs["suspension_type"], quality.suspension_types)
        if quality.suspension_types
        else None,
        "assays": ~_is_in(obs["assay"], quality.assays) if quality.assays else None,
        "min_counts": obs["raw_sum"].to_numpy() < quality.min_counts,
        "max_counts": obs["raw_sum"].to_numpy() > quality.max_counts if quality.max_counts is not None else None,
        "min_genes": obs["nnz"].to_numpy() < quality.min_genes,
    }
    first_B = np.full(len(obs), len(OBS_RULES))
    for position in reversed(range(len(OBS_RULES))):  # the earliest rule is written last and so wins
        mask_B = broken[OBS_RULES[position]]
        if mask_B is not None:
            first_B[mask_B.astype(bool)] = position
    return first_B


def _is_in(column: pa.ChunkedArray, values) -> np.ndarray:
    """Bool [B]: is the text of `column` (plain or dictionary) one of `values`."""
    column = column.cast(pa.large_string())
    return pc.is_in(column, value_set=pa.array(sorted(values), pa.large_string())).to_numpy()


def table_rows(counts: dict[str, np.ndarray]) -> list[dict]:
    """Rows ``dataset_id, rule, removed, remaining`` in order of application, starting with the pseudo-rule `selected`.

    Parameters
    ----------
    counts
        For each data set int64 [len(OBS_RULES) + 1]: cells removed by each rule, and cells kept.
    """
    rows = []
    for dataset_id, removed in sorted(counts.items()):
        remaining = int(removed.sum())
        rows.append({"dataset_id": dataset_id, "rule": "selected", "removed": 0, "remaining": remaining})
        for rule, n in zip(OBS_RULES, removed[:-1], strict=True):
            remaining -= int(n)
            rows.append({"dataset_id": dataset_id, "rule": rule, "removed": int(n), "remaining": remaining})
    return rows


def add_mito_rows(rows: list[dict], removed: dict[str, int]) -> list[dict]:
    """`rows` of `table_rows` with the last rule of each data set, `max_mito_fraction`, after the others.

    Parameters
    ----------
    rows
        What the plan counted.
    removed
        For each data set, the cells that the mitochondrial share removed; a data set that is absent lost none.
    """
    out = []
    for row in rows:
        out.append(row)
        if row["rule"] == OBS_RULES[-1]:
            n = removed.get(row["dataset_id"], 0)
            out.append({**row, "rule": MITO_RULE, "removed": n, "remaining": row["remaining"] - n})
    return out


def explain_removed(rows: list[dict]) -> str:
    """Half a sentence for an error: how many cells were selected and which rules removed how many."""
    selected = sum(row["remaining"] for row in rows if row["rule"] == "selected")
    removed = {rule: sum(row["removed"] for row in rows if row["rule"] == rule) for rule in RULES}
    parts = ", ".join(f"{rule} removed {n:,}" for rule, n in removed.items() if n)
    return f"of {selected:,} selected cells {parts}"
