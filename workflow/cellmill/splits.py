"""Held-out cells for validation: whole donors or whole data sets, never single cells.

A unit is a tuple: (dataset_id, donor_id), because two data sets may both know a "donor 1", or (dataset_id,).
"""

import difflib
import hashlib

from cellmill.config import Splits
from cellmill.errors import CellmillError

TRAIN, VALIDATION, ALL = "train", "validation", "all"


def units_of(donors: list[tuple[str, str]], splits: Splits) -> list[tuple[str, ...]]:
    """The unit that each (dataset_id, donor_id) belongs to."""
    return [pair if splits.unit == "donor" else pair[:1] for pair in donors]


def validation_units(cells: dict[tuple[str, ...], int], splits: Splits) -> set[tuple[str, ...]]:
    """The units to hold out.

    Where `splits.validation` names units, all that bear one of the names (their last part) are held out. Elsewhere
    the units with cells are ordered by the SHA-256 of their names and the first `validation_fraction` of them,
    rounded, but at least one, are held out: the choice depends on the names alone.

    Parameters
    ----------
    cells
        For each selected unit its cells that passed quality control.
    splits
        What to hold out.

    Raises
    ------
    CellmillError
        A name is that of no unit, or of units that lost all their cells to quality control.
    """
    if splits.validation:
        names = {unit[-1] for unit in cells}
        kept = {unit[-1] for unit, n in cells.items() if n}
        for name in splits.validation:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:3]
                raise CellmillError(
                    f"corpus.splits.validation names the {splits.unit} '{name}', which no selected cell has; "
                    f"near names are {', '.join(repr(n) for n in near)}"
                )
            check_kept(name, kept, splits)
        return {unit for unit in cells if unit[-1] in splits.validation}
    units = [unit for unit, n in cells.items() if n]
    units.sort(key=lambda unit: hashlib.sha256("\0".join(unit).encode()).digest())
    return set(units[: max(1, round(splits.validation_fraction * len(units)))])


def check_kept(name: str, kept: set[str], splits: Splits) -> None:
    """Raise `CellmillError` where a unit that is held out by name is not among those with cells (`kept`)."""
    if name not in kept:
        raise CellmillError(
            f"corpus.splits.validation names the {splits.unit} '{name}', which has no cell left after quality control; "
            "leave it out, or relax corpus.quality"
        )


def check_not_empty(cells: dict[str, int], splits: Splits, n_units: int) -> None:
    """Raise `CellmillError` where train or validation has no cell.

    Parameters
    ----------
    cells
        Cells of each split.
    splits
        The config, to say which key to mend.
    n_units
        Donors or data sets that the cells come from.
    """
    if not cells.get(VALIDATION):
        raise CellmillError(
            f"no cell is left for validation among {n_units} {splits.unit}s; name units in corpus.splits.validation "
            "or relax corpus.quality"
        )
    if not cells.get(TRAIN):
        raise CellmillError(
            f"no cell is left to train on: all {n_units} {splits.unit}s are held out for validation; hold out fewer in "
            "corpus.splits, or select more"
        )
