"""Whole donors or data sets are held out, by name or by the hash of their names."""

import random

import pytest
from cellmill.config import Splits
from cellmill.errors import CellmillError
from cellmill.splits import check_not_empty, units_of, validation_units

DONORS = [("x", "donor 1"), ("x", "donor 2"), ("y", "donor 1"), ("z", "K562")]


def cells(unit: str = "donor", n: int = 10) -> dict:
    return dict.fromkeys(units_of(DONORS, Splits(unit=unit)), n)


def test_units_are_pairs_or_data_sets():
    assert units_of(DONORS, Splits(unit="donor")) == DONORS
    assert units_of(DONORS, Splits(unit="dataset")) == [("x",), ("x",), ("y",), ("z",)]


def test_a_name_holds_out_that_donor_in_every_data_set():
    assert validation_units(cells(), Splits(validation=["donor 1"])) == {("x", "donor 1"), ("y", "donor 1")}
    assert validation_units(cells("dataset"), Splits(unit="dataset", validation=["x"])) == {("x",)}


def test_an_unknown_name_is_said_with_its_neighbours():
    with pytest.raises(CellmillError, match=r"the donor 'K526', which no selected cell has; near names are 'K562'"):
        validation_units(cells(), Splits(validation=["donor 1", "K526"]))


def test_the_hash_depends_on_names_alone():
    units = {(f"d{i % 7}", f"donor {i}"): 1 for i in range(200)}
    chosen = validation_units(units, Splits(validation_fraction=0.1))
    assert len(chosen) == 20
    shuffled = list(units)
    random.Random(0).shuffle(shuffled)
    assert validation_units(dict.fromkeys(shuffled, 5), Splits(validation_fraction=0.1)) == chosen
    # a larger share holds out the same units and more
    assert chosen < validation_units(units, Splits(validation_fraction=0.2))


def test_a_small_share_is_at_least_one_unit_with_cells():
    few = {("x", "a"): 0, ("x", "b"): 3, ("x", "c"): 4}
    chosen = validation_units(few, Splits(validation_fraction=0.01))
    assert len(chosen) == 1
    assert ("x", "a") not in chosen


def test_a_named_unit_without_cells_is_an_error():
    few = {("x", "a"): 0, ("x", "b"): 3, ("y", "b"): 0}
    assert validation_units(few, Splits(validation=["b"])) == {("x", "b"), ("y", "b")}
    with pytest.raises(CellmillError, match="the donor 'a', which has no cell left after quality control"):
        validation_units(few, Splits(validation=["b", "a"]))


def test_empty_splits_are_errors():
    check_not_empty({"train": 1, "validation": 1}, Splits(), 2)
    with pytest.raises(CellmillError, match="no cell is left for validation among 4 donors"):
        check_not_empty({"train": 5, "validation": 0}, Splits(), 4)
    with pytest.raises(CellmillError, match="no cell is left to train on: all 1 datasets are held out"):
        check_not_empty({"train": 0, "validation": 5}, Splits(unit="dataset"), 1)
