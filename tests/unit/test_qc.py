"""Which rule removes which cell, and what the tables say about it."""

import numpy as np
import pyarrow as pa
from cellmill.config import Quality
from cellmill.qc import OBS_RULES, RULES, add_mito_rows, explain_removed, first_broken_rule, table_rows

PASSED = len(OBS_RULES)
GOOD = {
    "dataset_id": "a",
    "is_primary_data": True,
    "suspension_type": "cell",
    "assay": "10x 3' v3",
    "raw_sum": 1000.0,
    "nnz": 500,
}
QUALITY = Quality(min_counts=500, max_counts=2000, min_genes=200, assays=["10x 3' v3"], suspension_types=["cell"])


def broken(quality: Quality = QUALITY, held_out=frozenset(), **changes) -> str | None:
    """The rule that a good cell with `changes` breaks."""
    cell = {name: [value] for name, value in (GOOD | changes).items()}
    position = first_broken_rule(pa.table(cell), quality, held_out)[0]
    return None if position == PASSED else OBS_RULES[position]


def test_each_rule_alone():
    assert broken() is None
    assert broken(held_out=frozenset(["a"])) == "held_out"
    assert broken(is_primary_data=False) == "primary_only"
    assert broken(suspension_type="nucleus") == "suspension_types"
    assert broken(assay="inDrop") == "assays"
    assert broken(raw_sum=499.0) == "min_counts"
    assert broken(raw_sum=2001.0) == "max_counts"
    assert broken(nnz=199) == "min_genes"


def test_thresholds_are_inclusive():
    assert broken(raw_sum=500.0) is None
    assert broken(raw_sum=2000.0) is None
    assert broken(nnz=200) is None


def test_empty_lists_and_none_remove_nothing():
    lax = Quality(primary_only=False, min_counts=0, max_counts=None, min_genes=0, assays=[], suspension_types=[])
    assert broken(lax, is_primary_data=False, suspension_type="na", assay="x", raw_sum=0.0, nnz=0) is None


def test_a_cell_counts_under_the_first_rule_it_breaks():
    worst = {"is_primary_data": False, "suspension_type": "na", "assay": "x", "raw_sum": 1.0, "nnz": 1}
    order = [broken(held_out=frozenset(["a"]), **worst), broken(**worst)]
    for name in ("is_primary_data", "suspension_type", "assay", "raw_sum"):
        del worst[name]
        order.append(broken(**worst))
    assert order == ["held_out", "primary_only", "suspension_types", "assays", "min_counts", "min_genes"]


def test_dictionary_columns_as_the_census_stores_them():
    table = pa.table({name: pa.array([value, value]) for name, value in GOOD.items()})
    for name in ("dataset_id", "suspension_type", "assay"):
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    assert first_broken_rule(table, QUALITY).tolist() == [PASSED, PASSED]


def test_tables_account_for_every_cell():
    removed = np.zeros(len(OBS_RULES) + 1, np.int64)
    removed[OBS_RULES.index("primary_only")] = 3
    removed[OBS_RULES.index("min_genes")] = 2
    removed[-1] = 95
    rows = add_mito_rows(table_rows({"b": removed, "a": removed}), {"a": 5})
    assert [row["dataset_id"] for row in rows] == ["a"] * 9 + ["b"] * 9
    assert [row["rule"] for row in rows[:9]] == ["selected", *RULES]
    assert [row["remaining"] for row in rows[:9]] == [100, 100, 97, 97, 97, 97, 97, 95, 90]
    assert rows[-1] == {"dataset_id": "b", "rule": "max_mito_fraction", "removed": 0, "remaining": 95}
    said = explain_removed(rows)
    assert said == "of 200 selected cells primary_only removed 6, min_genes removed 4, max_mito_fraction removed 5"
