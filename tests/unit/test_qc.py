"""Which rule removes which cell, and what the tables say about it."""

import numpy as np
import pyarrow as pa
import pytest
from cellmill.config import AssayQuality, Quality
from cellmill.qc import (
    LATE_RULES,
    MAD_BINS,
    MAD_STEP,
    OBS_RULES,
    PASSED,
    RULES,
    X_RULES,
    add_rows,
    explain_removed,
    first_broken_rule,
    mad_limits,
    mad_quantities,
    obs_columns,
    table_rows,
    text_codes,
    thresholds,
)

GOOD = {
    "dataset_id": "a",
    "is_primary_data": True,
    "suspension_type": "cell",
    "tissue_type": "tissue",
    "assay": "10x 3' v3",
    "raw_sum": 1000.0,
    "nnz": 500,
}
QUALITY = Quality(
    min_counts=500,
    max_counts=2000,
    min_genes=200,
    assays=["10x 3' v3"],
    suspension_types=["cell"],
    tissue_types=["tissue"],
)
OWN = Quality(
    min_counts=500,
    per_assay={
        "Smart-seq2": AssayQuality(min_counts=10_000, max_counts=90_000, max_mito_fraction=0.5),
        "10x 3' v3": AssayQuality(min_genes=600),
    },
)


def broken(quality: Quality = QUALITY, held_out: bool = False, **changes) -> str | None:
    """The rule that a good cell with `changes` breaks."""
    cell = {name: [value] for name, value in (GOOD | changes).items()}
    position = first_broken_rule(pa.table(cell), quality, np.array([held_out]))[0]
    return None if position == PASSED else OBS_RULES[position]


def test_each_rule_alone():
    assert broken() is None
    assert broken(held_out=True) == "held_out"
    assert broken(is_primary_data=False) == "primary_only"
    assert broken(raw_sum=1000.5) == "raw_counts"
    assert broken(suspension_type="nucleus") == "suspension_types"
    assert broken(tissue_type="organoid") == "tissue_types"
    assert broken(assay="inDrop") == "assays"
    assert broken(raw_sum=499.0) == "min_counts"
    assert broken(raw_sum=2001.0) == "max_counts"
    assert broken(nnz=199) == "min_genes"


@pytest.mark.parametrize("raw_sum", [0.5, -3.0, float("nan"), float("inf")])
def test_what_is_no_sum_of_counts(raw_sum):
    assert broken(raw_sum=raw_sum) == "raw_counts"


def test_thresholds_are_inclusive():
    assert broken(raw_sum=500.0) is None
    assert broken(raw_sum=2000.0) is None
    assert broken(nnz=200) is None


def test_empty_lists_and_none_remove_nothing():
    lax = Quality(primary_only=False, min_counts=0, max_counts=None, min_genes=0, assays=[], suspension_types=[])
    assert broken(lax, is_primary_data=False, suspension_type="na", assay="x", raw_sum=0.0, nnz=0) is None
    assert "tissue_type" not in obs_columns(lax)  # older Censuses lack it
    assert "tissue_type" in obs_columns(QUALITY)


def test_a_cell_counts_under_the_first_rule_it_breaks():
    worst = {"is_primary_data": False, "suspension_type": "na", "tissue_type": "x", "assay": "x", "raw_sum": 1.5}
    worst["nnz"] = 1
    order = [broken(held_out=True, **worst)]
    for name in ("is_primary_data", "raw_sum", "suspension_type", "tissue_type", "assay"):
        order.append(broken(**worst))
        del worst[name]
    order += [broken(raw_sum=1.0, nnz=1), broken(raw_sum=2001.0, nnz=1), broken(**worst)]
    assert order == list(OBS_RULES[:-1])


def test_dictionary_columns_as_the_census_stores_them():
    table = pa.table({name: pa.array([value, value]) for name, value in GOOD.items()})
    for name in ("dataset_id", "suspension_type", "tissue_type", "assay"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    assert first_broken_rule(table, QUALITY).tolist() == [PASSED, PASSED]


def test_an_assay_has_thresholds_of_its_own():
    smart = {"assay": "Smart-seq2"}
    assert broken(OWN, raw_sum=9999.0, **smart) == "min_counts"
    assert broken(OWN, raw_sum=10_000.0, **smart) is None
    assert broken(OWN, raw_sum=90_001.0, **smart) == "max_counts"
    assert broken(OWN, raw_sum=90_001.0, assay="inDrop") is None
    # what an assay leaves out stays general
    assert broken(OWN, nnz=599) == "min_genes"
    assert broken(OWN, nnz=600, raw_sum=499.0) == "min_counts"
    assert broken(OWN, nnz=599, raw_sum=10_000.0, **smart) is None


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_thresholds_of_rules_on_counts(as_dictionary):
    assays = pa.chunked_array([["inDrop", "Smart-seq2"], [], ["Smart-seq2"]], pa.string())
    assays = assays.dictionary_encode() if as_dictionary else assays
    assert thresholds(OWN, "max_mito_fraction", assays).tolist() == [0.2, 0.5, 0.5]
    assert thresholds(OWN, "max_ribo_fraction", assays).tolist() == [1.0, 1.0, 1.0]
    assert thresholds(OWN, "max_doublet_score", assays).tolist() == [np.inf] * 3
    assert thresholds(OWN, "max_mito_fraction", assays.slice(0, 0)).tolist() == []


def test_codes_of_the_names_that_occur():
    column = pa.chunked_array([pa.array(["x", "b", "a", "b"]).dictionary_encode().slice(1)])
    codes, names = text_codes(column)
    assert [names[code] for code in codes] == ["b", "a", "b"]
    assert sorted(names) == ["a", "b"]


def histogram(*values_of_quantity) -> np.ndarray:
    """Cells by quantity and value."""
    cells = np.zeros((len(values_of_quantity), MAD_BINS), np.int64)
    for row, values in zip(cells, values_of_quantity, strict=True):
        np.add.at(row, values, 1)
    return cells


def test_quantities_by_hand():
    steps = mad_quantities(np.array([0, 999, 10**12]), np.array([0, 99, 1]))
    # ln 1000 = 6.907755, ln 100 = 4.605170, their ratio is 2/3
    assert steps[:, 1].tolist() == [69078, 46052, 6667]
    assert steps[:, 0].tolist() == [0, 0, 0]
    assert steps[0, 2] == MAD_BINS - 1
    assert MAD_STEP * steps[1, 1] == pytest.approx(np.log(100), abs=MAD_STEP / 2)


def test_limits_by_hand():
    # 51 cells: the median is 100; 17 cells lie 0, 17 lie 10 and 17 lie 40 away, so that the MAD is 10
    odd = [100] * 17 + [90] * 8 + [110] * 9 + [60] * 9 + [140] * 8
    assert mad_limits(histogram(odd), 3.0).tolist() == [[70.0, 130.0]]
    # 52 cells: the median lies between 100 and 101; distances are 0.5 and 49.5, the MAD lies between them, at 25
    even = [100] * 13 + [101] * 13 + [51] * 13 + [150] * 13
    assert mad_limits(histogram(even), 2.0).tolist() == [[50.5, 150.5]]


@pytest.mark.parametrize("n", [50, 77, 500])
def test_limits_are_those_of_numpy(n):
    values = np.random.default_rng(n).integers(60_000, 90_000, n)
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    assert mad_limits(histogram(values), 2.5).tolist() == [[median - 2.5 * mad, median + 2.5 * mad]]


def test_small_groups_and_a_spread_of_nothing_have_no_limits():
    spread = list(range(1000, 1049))
    none = [-np.inf, np.inf]
    assert mad_limits(histogram(spread, [5] * 26 + list(range(24))), 1.0).tolist() == [none, none]
    assert mad_limits(histogram([*spread, 1049]), 1.0).tolist() == [[1012.0, 1037.0]]


def test_tables_account_for_every_cell():
    removed = np.zeros(len(OBS_RULES) + 1, np.int64)
    removed[OBS_RULES.index("primary_only")] = 3
    removed[OBS_RULES.index("max_mads")] = 2
    removed[-1] = 95
    of_obs = table_rows({"b": removed, "a": removed})
    rows = add_rows(of_obs, {"duplicates": {"b": 1}, "max_mito_fraction": {"a": 5}, "max_ribo_fraction": {}})
    more = ["max_mito_fraction", "max_ribo_fraction", "duplicates"]
    assert [row["rule"] for row in rows] == 2 * ["selected", *OBS_RULES, *more]
    assert [row["dataset_id"] for row in rows] == ["a"] * 14 + ["b"] * 14
    assert [row["remaining"] for row in rows[:14]] == [100, 100] + [97] * 8 + [95, 90, 90, 90]
    assert rows[-1] == {"dataset_id": "b", "rule": "duplicates", "removed": 1, "remaining": 94}
    assert rows[-3] == {"dataset_id": "b", "rule": "max_mito_fraction", "removed": 0, "remaining": 95}
    # rules in two steps: those on counts, then the late ones
    of_counts = add_rows(of_obs, {"max_mito_fraction": {"a": 5}, "max_ribo_fraction": {}})
    assert add_rows(of_counts, {"duplicates": {"b": 1}}) == rows
    assert explain_removed(rows) == (
        "of 200 selected cells primary_only removed 6, max_mads removed 4, max_mito_fraction removed 5, "
        "duplicates removed 1"
    )
    assert (*OBS_RULES, *X_RULES, *LATE_RULES) == RULES
