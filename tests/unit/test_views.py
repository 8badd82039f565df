"""The ragged helpers, on hand-computed cells and against plain numpy on real ones."""

import numpy as np
import pytest
from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch
from cellmill.views import ragged as views
from cellmill.views import scgpt
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
    values, offsets = np.array([4, 5, 6, 7]), np.array([0, 3, 3, 4])
    kept, kept_offsets = views.keep_first(offsets, 2)
    assert values[kept].tolist() == [4, 5, 7]
    assert kept_offsets.tolist() == [0, 2, 2, 3]
    kept, kept_offsets = views.keep_first(offsets, np.array([1, 5, 0]))
    assert values[kept].tolist() == [4]
    assert kept_offsets.tolist() == [0, 1, 1, 1]
    kept, kept_offsets = views.keep_first(offsets, 3)
    assert values[kept].tolist() == values.tolist()
    assert kept_offsets.tolist() == offsets.tolist()
    cells = views.select(make_batch([{1: 5, 4: 2, 6: 1}, {}, {4: 9}]), np.array([False, True, True, True]))
    assert cells.offsets.tolist() == [0, 2, 2, 3]
    assert cells.genes.tolist() == [4, 6, 4]
    assert cells.counts.tolist() == [2, 1, 9]
    assert cells.totals.tolist() == [8, 0, 9]


def test_sums_and_places():
    offsets = np.array([0, 0, 3, 3, 4, 4])
    assert views.sum_within(offsets, np.array([250, 250, 1, 7], np.uint8)).tolist() == [0, 501, 0, 7, 0]
    assert views.sum_within(np.array([0, 0]), np.zeros(0, np.uint8)).tolist() == [0]
    assert views.place_within(offsets).tolist() == [0, 1, 2, 0]


def test_join():
    parts = [np.array([0, 2, 2]), np.array([0, 0, 1]), np.array([0, 1, 2])]
    offsets, places = views.join(parts)
    assert offsets.tolist() == [0, 3, 5]
    assert [place.tolist() for place in places] == [[0, 1], [3], [2, 4]]


def test_hashes_of_genes_are_the_plain_ones(blood):
    """Hashed once per cell and in blocks, a gene has the hash of all its keys."""
    expected = hash64("purpose", 3, 4, blood.joinids[blood.cell_of], blood.genes)
    assert len(expected) > 5 * 2**15
    assert np.array_equal(views.hash_genes(blood, "purpose", 3, 4), expected)
    index = np.array([5, 70_000, 2])
    assert np.array_equal(views.hash_genes(blood, "purpose", 3, 4, index_M=index), expected[index])


def test_log1p_cp10k(blood):
    expected = np.log1p(blood.counts / blood.totals[blood.cell_of] * 1e4)
    np.testing.assert_allclose(views.log1p_cp10k(blood), expected, rtol=3e-6)


def random_order(cells, *keys):
    return views.random_order(cells.offsets, views.hash_genes(cells, *keys))


def test_random_order_is_a_shuffle_that_depends_on_the_cell_alone(blood):
    cells = blood.take(np.arange(40))
    order = random_order(cells, "test", 3)
    assert np.array_equal(cells.cell_of[order], cells.cell_of)
    assert np.array_equal(np.sort(order), np.arange(len(order)))
    alone = cells.take([17])
    start, end = cells.offsets[17:19]
    assert np.array_equal(random_order(alone, "test", 3), order[start:end] - start)
    assert not np.array_equal(random_order(alone, "test", 4), order[start:end] - start)


def test_random_order_is_uniform(blood):
    """Each gene of a cell comes among the first half in half of the draws."""
    cell = blood.take([0])
    half = len(cell.genes) // 2
    hits = np.zeros(len(cell.genes))
    for step in range(400):
        hits[random_order(cell, "test", step)[:half]] += 1
    # a binomial share has a standard error of 0.025; the extreme of about 2,000 stays within 5 of them
    assert np.abs(hits / 400 - half / len(hits)).max() < 0.125


def bins_by_sorting(counts: np.ndarray, n_edges: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges below each count of one cell, and up to it: quantiles times n_edges - 1, which are integers."""
    ordered, steps = np.sort(counts.astype(np.int64)), n_edges - 1
    whole, rest = np.divmod(np.arange(n_edges) * (len(counts) - 1), steps)
    low, high = ordered[whole], ordered[np.minimum(whole + 1, len(counts) - 1)]
    edges = low * steps + (high - low) * rest
    np.testing.assert_allclose(edges / steps, np.quantile(counts, np.linspace(0, 1, n_edges)), rtol=1e-12)
    return np.searchsorted(edges, counts * steps, "left"), np.searchsorted(edges, counts * steps, "right")


@pytest.mark.parametrize("n_edges", [2, 5, 50, 333])
def test_bins_without_sorting_are_those_of_the_quantiles(blood, n_edges):
    """With the lowest and the highest draw a bin is the first after the edges below a count, and the last up to it."""
    scaled = blood.take(np.arange(0, len(blood), 20))
    rng = np.random.default_rng(0)
    deep = scaled.counts * rng.choice([1, 1, 100, 3000], len(scaled.counts)).astype(np.int32)
    for counts in (scaled.counts, deep):
        cells = CellBatch(scaled.joinids, scaled.offsets, scaled.genes, counts, scaled.totals)
        none = np.zeros(len(counts), np.uint64)
        highest, lowest = (scgpt.bin_counts(cells, n_edges, none + np.uint64(h)) for h in (0, 2**32 - 1))
        for cell in range(len(cells)):
            span = slice(*cells.offsets[cell : cell + 2])
            below, upto = bins_by_sorting(counts[span], n_edges)
            assert np.array_equal(highest[span], upto)
            assert np.array_equal(lowest[span], np.minimum(below + 1, upto))
    assert (deep >= 255).mean() > 0.3


def test_bins_of_small_and_empty_cells():
    cells = make_batch([{}, {3: 7}, {}, {1: 300}, {1: 1000, 2: 300, 5: 2}, {}])
    zero = np.zeros(5, np.uint64)
    assert scgpt.bin_counts(cells, 3, zero).tolist() == [3, 3, 3, 2, 1]
    assert scgpt.bin_counts(cells, 3, zero + np.uint64(2**32 - 1)).tolist() == [1, 1, 3, 2, 1]
    assert len(scgpt.bin_counts(make_batch([{}]), 3, zero[:0])) == 0
