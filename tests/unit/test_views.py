"""The ragged helpers, on hand-computed cells and against plain numpy on real ones."""

import numpy as np
import pytest
from cellmill import views
from model_cells import make_batch
from shard_cells import real_cells


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


def test_argsort_breaks_ties_by_place_and_keeps_cells_apart():
    offsets = np.array([0, 4, 4, 5, 8])  # the second cell is empty, the third has one gene
    keys = np.array([7, 3, 7, 3, 9, 2, 1, 2], dtype=np.uint32)
    assert views.argsort_within(offsets, keys).tolist() == [1, 3, 0, 2, 4, 6, 5, 7]


def test_argsort_of_nothing():
    assert views.argsort_within(np.array([0]), np.empty(0, np.uint32)).tolist() == []
    assert views.argsort_within(np.array([0, 0, 0]), np.empty(0, np.uint32)).tolist() == []


def test_argsort_is_the_same_packed_and_by_lexsort(blood):
    keys = views.descending(blood.counts)
    expected = np.lexsort((keys, blood.cell_of))
    assert np.array_equal(views.argsort_within(blood.offsets, keys), expected)
    # one long cell among very many empty ones does not fit 64 bits, and takes the other path
    long_offsets = np.concatenate([np.zeros(1 << 17, np.int64), [70_000]])
    keys = (np.arange(70_000) * 7919 % 1000).astype(np.uint32)
    assert np.array_equal(views.argsort_within(long_offsets, keys), np.argsort(keys, kind="stable"))


def test_descending_orders_from_large_to_small():
    values = np.array([0.0, 1e-30, 0.5, 1.0, 3.0, 1e30])
    keys = views.descending(values)
    assert keys.dtype == np.uint32
    assert np.array_equal(np.argsort(keys), np.arange(6)[::-1])
    assert views.descending(np.array([-0.0]))[0] == views.descending(np.array([0.0]))[0]


def test_keep_first_and_select():
    kept, offsets = views.keep_first(np.array([0, 3, 3, 4]), 2)
    assert kept.tolist() == [True, True, False, True]
    assert offsets.tolist() == [0, 2, 2, 3]
    cells = views.select(make_batch([{1: 5, 4: 2, 6: 1}, {}, {4: 9}]), np.array([False, True, True, True]))
    assert cells.offsets.tolist() == [0, 2, 2, 3]
    assert cells.genes.tolist() == [4, 6, 4]
    assert cells.counts.tolist() == [2, 1, 9]
    assert cells.totals.tolist() == [8, 0, 9]


def test_pad():
    offsets = np.array([0, 2, 2, 3])
    values = np.array([7, 8, 9])
    assert views.pad(offsets, values, -1).tolist() == [[7, 8], [-1, -1], [9, -1]]
    assert views.pad(offsets, values, 0, before=1, after=1).tolist() == [[0, 7, 8, 0], [0, 0, 0, 0], [0, 9, 0, 0]]
    assert views.pad(np.array([0, 0]), np.empty(0, np.int64), 5).tolist() == [[5]]
    assert views.padded_index(offsets, 4, before=1).tolist() == [1, 2, 9]


def test_random_order_is_a_shuffle_that_depends_on_the_cell_alone(blood):
    cells = blood.take(np.arange(40))
    order = views.random_order(cells, "test", 3)
    assert np.array_equal(cells.cell_of[order], cells.cell_of)
    assert np.array_equal(np.sort(order), np.arange(len(order)))
    alone = cells.take([17])
    start, end = cells.offsets[17:19]
    assert np.array_equal(views.random_order(alone, "test", 3), order[start:end] - start)
    assert not np.array_equal(views.random_order(alone, "test", 4), order[start:end] - start)


def test_random_order_is_uniform(blood):
    """Each gene of a cell comes among the first half in half of the draws."""
    cell = blood.take([0])
    half = len(cell.genes) // 2
    hits = np.zeros(len(cell.genes))
    for step in range(400):
        hits[views.random_order(cell, "test", step)[:half]] += 1
    # a binomial share has a standard error of 0.025; the extreme of about 2,000 stays within 5 of them
    assert np.abs(hits / 400 - half / len(hits)).max() < 0.125


def test_quantiles_by_hand():
    # sorted 1 1 2 5: positions 0, 1.5 and 3 of three edges; a cell of one value; an empty cell
    edges = views.scaled_quantiles(np.array([0, 4, 5, 5]), np.array([5, 1, 2, 1, 4]), 3)
    assert edges.tolist() == [[2, 3, 10], [8, 8, 8], [0, 0, 0]]


def test_quantiles_are_numpys(blood):
    edges = views.scaled_quantiles(blood.offsets, blood.counts, 50)
    for cell in range(0, len(blood), 50):
        counts = blood.counts[blood.offsets[cell] : blood.offsets[cell + 1]]
        np.testing.assert_allclose(edges[cell] / 49, np.quantile(counts, np.linspace(0, 1, 50)), rtol=1e-12)


def test_digitise_by_hand():
    offsets = np.array([0, 3, 4])
    below, upto = views.digitise(offsets, np.array([2, 3, 9, 4]), np.array([[2, 3, 3], [4, 4, 5]]))
    assert below.tolist() == [0, 1, 3, 0]
    assert upto.tolist() == [1, 3, 3, 2]


def test_digitise_is_searchsorted(blood):
    edges = views.scaled_quantiles(blood.offsets, blood.counts, 50)
    below, upto = views.digitise(blood.offsets, blood.counts * 49, edges)
    for cell in range(0, len(blood), 50):
        span = slice(*blood.offsets[cell : cell + 2])
        assert np.array_equal(below[span], np.searchsorted(edges[cell], blood.counts[span] * 49, "left"))
        assert np.array_equal(upto[span], np.searchsorted(edges[cell], blood.counts[span] * 49, "right"))
