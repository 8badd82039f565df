"""Fingerprints of real cells: what they depend on, and whether they tell copies from cells that are merely alike."""

import numpy as np
import pytest
from cellmill.fingerprints import (
    GENES_PER_GROUP,
    GROUPS,
    MIN_EQUAL,
    MIN_GENES,
    MIN_SHARE,
    choose_groups,
    comparable_groups,
    fingerprints,
)
from print_cells import RealCells, batch, genes_that_differ, prints_of, real_cells, same_barcode, thinned


@pytest.fixture(scope="module")
def cells(data) -> RealCells:
    return real_cells(data)


@pytest.fixture(scope="module")
def prints(cells) -> np.ndarray:
    return prints_of(cells.counts, cells.group_V, cells.dataset, cells.measured)


def test_groups_hold_what_most_data_sets_measure_and_most_cells_express(cells):
    sizes = np.bincount(cells.group_V[cells.group_V >= 0])
    assert sizes.tolist() == [GENES_PER_GROUP] * GROUPS
    datasets = np.sum(list(cells.measured.values()), axis=0)
    assert datasets[(cells.group_V >= 0) & (cells.group_V < GROUPS // 2)].min() == len(cells.measured)
    expressed = (cells.counts > 0).sum(axis=0)
    in_group = [expressed[cells.group_V == group].mean() / len(cells.dataset) for group in range(GROUPS)]
    assert max(in_group[: GROUPS // 2]) < 0.6 < 0.75 < min(in_group[GROUPS // 2 :])
    # a shallow file of 7,000 genes, without most ribosomal ones, has half of the groups
    comparable = comparable_groups(cells.group_V, cells.measured)
    assert comparable["card_pdac_sc"].tolist() == [True] * 4 + [False] * 4
    assert all(comparable[name].all() for name in cells.measured if name != "card_pdac_sc")


def test_a_small_vocabulary_fills_the_groups_in_part():
    group_V = choose_groups(np.array([5, 0, 9, 7]), np.array([2, 2, 1, 2]))
    assert group_V.tolist() == [1, -1, 2, 0]  # most data sets first, then most cells; none where no cell has it


def test_prints_do_not_depend_on_the_rest_of_the_vocabulary(cells, prints):
    some = slice(0, 300)
    kept = np.flatnonzero((cells.group_V >= 0) | (np.arange(len(cells.group_V)) % 3 == 0))
    comparable = np.ones((300, GROUPS), bool)
    smaller = fingerprints(batch(cells.counts[some][:, kept]), cells.group_V[kept], comparable)
    assert (smaller == prints[some]).all()


@pytest.mark.parametrize(("genes", "values"), [(np.uint16, np.int32), (np.int64, np.int64), (np.int32, np.uint32)])
def test_any_integers_give_the_same_prints(cells, prints, genes, values):
    counts = cells.counts[:300]
    assert (
        fingerprints(batch(counts, genes, values), cells.group_V, np.ones((300, GROUPS), bool)) == prints[:300]
    ).all()


def test_one_count_changes_one_print(cells, prints):
    for row in (0, 6500, 21000):
        changed = cells.counts[[row]]
        place = np.flatnonzero(cells.group_V[changed.indices] == 5)[0]
        changed.data[place] += 1
        after = fingerprints(batch(changed), cells.group_V, np.ones((1, GROUPS), bool))[0]
        assert np.flatnonzero(after != prints[row]).tolist() == [5]


def test_what_cannot_be_compared_has_no_print(cells, prints):
    expressed = np.stack([(cells.counts[:, cells.group_V == group] > 0).sum(axis=1) for group in range(GROUPS)], axis=1)
    comparable = comparable_groups(cells.group_V, cells.measured)
    comparable_BG = np.stack([comparable[name] for name in cells.dataset])
    assert ((prints > 0) == (comparable_BG & (expressed >= MIN_GENES))).all()
    assert ((prints > 0).sum(axis=1) >= MIN_EQUAL).mean() > 0.997
    less = fingerprints(batch(cells.counts[:10]), cells.group_V, np.zeros((10, GROUPS), bool))
    assert less.shape == (10, GROUPS)
    assert not less.any()


def test_two_studies_copies_agree_and_chance_barcodes_do_not(cells, prints):
    """Of 199 pairs with one barcode 177 are one cell; 22 are other cells that drew the same of 737,280 barcodes."""
    pairs = same_barcode(cells)
    copies = [pair for pair in pairs if genes_that_differ(cells, *pair) <= 3]
    others = [pair for pair in pairs if genes_that_differ(cells, *pair) > 500]
    assert (len(pairs), len(copies), len(others)) == (199, 177, 22)
    for a, b in copies:
        both = (prints[a] > 0) & (prints[b] > 0)
        equal = (prints[a] == prints[b]) & both
        assert equal.sum() >= MIN_EQUAL
        assert equal.sum() >= MIN_SHARE * both.sum()
    for a, b in others:
        assert not ((prints[a] == prints[b]) & (prints[a] > 0)).any()


def test_two_draws_of_one_cell_do_not_agree(cells, prints):
    draws = [prints_of(thinned(cells.counts, seed), cells.group_V, cells.dataset, cells.measured) for seed in (1, 2)]
    assert ((draws[0] > 0).sum(axis=1) >= MIN_EQUAL).mean() > 0.9
    for one, other in ((draws[0], draws[1]), (prints, draws[0]), (prints, draws[1])):
        both = (one > 0) & (other > 0)
        equal = (one == other) & both
        assert not ((equal.sum(axis=1) >= MIN_EQUAL) & (equal.sum(axis=1) >= MIN_SHARE * both.sum(axis=1))).any()
