"""Quality control: which rule removes a cell, and how many cells each rule removes from each data set.

The rules are applied in the order of `RULES`; a cell is counted under the first rule that it breaks. `OBS_RULES` are
answered by the columns of obs alone, before any count is read; `X_RULES` by a cell's counts; `LATE_RULES` by comparing
cells of all blocks.

Legend: B cells, M quantities of `MAD_QUANTITIES`, E bins of one of them.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellmill.config import Quality

OBS_RULES = (
    "held_out",
    "primary_only",
    "raw_counts",
    "suspension_types",
    "tissue_types",
    "assays",
    "min_counts",
    "max_counts",
    "min_genes",
    "max_mads",
)
X_RULES = ("max_mito_fraction", "max_ribo_fraction", "max_doublet_score")
LATE_RULES = ("leaks", "duplicates")
RULES = (*OBS_RULES, *X_RULES, *LATE_RULES)
"""All rules in order of application: keys of the config, but for `held_out`, what may never enter the corpus, and
`raw_counts`, a sum of counts that is no whole number, so that the layer holds no counts."""
PASSED = len(OBS_RULES)
"""What stands in place of a rule's position for a cell that breaks none."""
OBS_COLUMNS = ("dataset_id", "is_primary_data", "suspension_type", "assay", "raw_sum", "nnz")
"""Columns of obs that `first_broken_rule` needs; with `tissue_types` also ``tissue_type``, which old Censuses lack."""
MAD_QUANTITIES = ("log_counts", "log_genes", "complexity")
"""ln(raw_sum + 1), ln(nnz + 1), and the second over the first."""
MAD_STEP = 1e-4
"""They are rounded to multiples of this, so that limits come from histograms, in bounded memory, and do not depend on
how obs is streamed."""
MAD_BINS = 250_000
MIN_CELLS_FOR_MAD = 50
"""Smaller groups of cells have no limits: their median says little."""
TABLE_SCHEMA = pa.schema(
    [("dataset_id", pa.string()), ("rule", pa.string()), ("removed", pa.int64()), ("remaining", pa.int64())]
)


def obs_columns(quality: Quality) -> tuple[str, ...]:
    """The columns of obs that the rules of `quality` look at."""
    return (*OBS_COLUMNS, "tissue_type") if quality.tissue_types else OBS_COLUMNS


def first_broken_rule(obs: pa.Table, quality: Quality, held_out_B: np.ndarray | None = None) -> np.ndarray:
    """The first of `OBS_RULES`, but for `max_mads`, that each cell breaks.

    Parameters
    ----------
    obs
        B rows with the columns `obs_columns`.
    quality
        Thresholds; a list that is empty and a threshold that is None remove nothing.
    held_out_B
        Bool: cells that may never enter.

    Returns
    -------
    int64 [B], positions in `OBS_RULES`, or `PASSED`.
    """
    raw_sum_B, nnz_B, assay = obs["raw_sum"].to_numpy(), obs["nnz"].to_numpy(), obs["assay"]
    broken = {
        "held_out": held_out_B,
        "primary_only": ~obs["is_primary_data"].to_numpy() if quality.primary_only else None,
        "raw_counts": ~((raw_sum_B >= 0) & (raw_sum_B == np.floor(raw_sum_B)) & np.isfinite(raw_sum_B)),
        "suspension_types": _is_not_in(obs, "suspension_type", quality.suspension_types),
        "tissue_types": _is_not_in(obs, "tissue_type", quality.tissue_types),
        "assays": _is_not_in(obs, "assay", quality.assays),
        "min_counts": raw_sum_B < thresholds(quality, "min_counts", assay),
        "max_counts": raw_sum_B > thresholds(quality, "max_counts", assay),
        "min_genes": nnz_B < thresholds(quality, "min_genes", assay),
    }
    first_B = np.full(len(obs), PASSED)
    for rule, mask_B in reversed(broken.items()):  # the earliest rule is written last and so wins
        if mask_B is not None:
            first_B[mask_B] = OBS_RULES.index(rule)
    return first_B


def thresholds(quality: Quality, name: str, assays: pa.ChunkedArray) -> np.ndarray:
    """The threshold of each cell: its assay's own where `quality.per_assay` has one, else the general one.

    Parameters
    ----------
    quality
        Thresholds.
    name
        A number of `Quality`, such as ``min_counts`` or ``max_mito_fraction``.
    assays
        Assay of B cells, text or dictionary.

    Returns
    -------
    float64 [B], infinite where there is no threshold.
    """
    assay_B, names = text_codes(assays)
    limits = []
    for assay in names:
        own = getattr(quality.per_assay.get(assay), name, None)
        limit = getattr(quality, name) if own is None else own
        limits.append(np.inf if limit is None else limit)
    return np.array(limits, np.float64)[assay_B]


def text_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int64 [B] codes into a list of the names that occur, of a text column (plain or dictionary)."""
    column = column.unify_dictionaries() if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    column = column.combine_chunks()
    present, code_B = np.unique(column.indices.to_numpy(), return_inverse=True)
    return code_B, column.dictionary.take(pa.array(present)).to_pylist()


def _is_not_in(obs: pa.Table, column: str, values: list[str]) -> np.ndarray | None:
    """Bool [B]: is the text of `column` (plain or dictionary) none of `values`. None where there are none."""
    if not values:
        return None
    text = obs[column].cast(pa.large_string())
    return ~pc.is_in(text, value_set=pa.array(sorted(values), pa.large_string())).to_numpy()


def mad_quantities(raw_sum_B: np.ndarray, nnz_B: np.ndarray) -> np.ndarray:
    """int64 [M, B]: `MAD_QUANTITIES` of cells in steps of `MAD_STEP`; a cell without counts has the complexity 0."""
    counts_B, genes_B = np.log1p(raw_sum_B), np.log1p(nnz_B)
    complexity_B = np.divide(genes_B, counts_B, out=np.zeros(len(counts_B)), where=counts_B > 0)
    steps_MB = np.rint(np.stack([counts_B, genes_B, complexity_B]) / MAD_STEP)
    return np.minimum(steps_MB, MAD_BINS - 1).astype(np.int64)


def mad_limits(cells_ME: np.ndarray, max_mads: float) -> np.ndarray:
    """Smallest and largest value that a cell of a group may have: the median, less and plus `max_mads` MADs.

    The MAD, median absolute deviation, is not scaled, as in Heumos et al. 2023 (doi:10.1038/s41576-023-00586-w).

    Parameters
    ----------
    cells_ME
        Cells of the group with each value of `mad_quantities`.
    max_mads
        Largest distance from the median.

    Returns
    -------
    float64 [M, 2], in steps of `MAD_STEP`; infinite where the group is small or the MAD is 0.
    """
    limits_M2 = np.tile([-np.inf, np.inf], (len(cells_ME), 1))
    for limits, cells_E in zip(limits_M2, cells_ME, strict=True):
        values = np.flatnonzero(cells_E)
        cells = cells_E[values]
        if cells.sum() >= MIN_CELLS_FOR_MAD:
            median = _median(values, cells)
            mad = _median(np.abs(values - median), cells)
            if mad:
                limits[:] = median - max_mads * mad, median + max_mads * mad
    return limits_M2


def _median(values: np.ndarray, cells: np.ndarray) -> float:
    """Median over `cells` of `values`, that many cells having each."""
    order = np.argsort(values, kind="stable")
    up_to = np.cumsum(cells[order])
    middle = np.searchsorted(up_to, [(up_to[-1] - 1) // 2, up_to[-1] // 2], side="right")
    return float(values[order][middle].mean())


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


def add_rows(rows: list[dict], removed: dict[str, dict[str, int]]) -> list[dict]:
    """`rows` of `table_rows` with further rules after the last one of each data set.

    Parameters
    ----------
    rows
        What was counted before.
    removed
        For each further rule (of `RULES`) the cells that it removed from each data set; one that is absent lost none.
    """
    out = []
    for place, row in enumerate(rows):
        out.append(row)
        if place + 1 < len(rows) and rows[place + 1]["dataset_id"] == row["dataset_id"]:
            continue
        remaining = row["remaining"]
        for rule in sorted(removed, key=RULES.index):
            n = removed[rule].get(row["dataset_id"], 0)
            remaining -= n
            out.append({**row, "rule": rule, "removed": n, "remaining": remaining})
    return out


def explain_removed(rows: list[dict]) -> str:
    """Half a sentence for an error: how many cells were selected and which rules removed how many."""
    selected = sum(row["remaining"] for row in rows if row["rule"] == "selected")
    parts = ", ".join(f"{rule} removed {n:,}" for rule, n in removed_by_rule(rows).items() if n)
    return f"of {selected:,} selected cells {parts}"


def removed_by_rule(rows: list[dict]) -> dict[str, int]:
    """Cells that each rule removed, over all data sets."""
    removed = dict.fromkeys(RULES, 0)
    for row in rows:
        if row["rule"] in removed:
            removed[row["rule"]] += row["removed"]
    return removed
