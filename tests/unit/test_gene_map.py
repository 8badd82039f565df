"""Cells of one vocabulary as a model of another one sees them."""

import numpy as np
import pytest
from cellmill.errors import CellmillError
from cellmill.gene_map import GeneMap
from model_cells import make_batch

IDS = ["ENSG01", "ENSG02", "ENSG03", "ENSG04"]
NAMES = ["TP53", "ACTB", "AC1.2", "ACTB"]


def test_symbols_and_ids_are_matched_and_cells_stay_sorted():
    by_symbol = GeneMap(IDS, NAMES, ["ACTB", "AC1.2", "TP53"])
    assert by_symbol.gene_V.tolist() == [2, 0, 1, -1]
    cells = by_symbol.apply(make_batch([{0: 5, 1: 6, 3: 7}, {}, {2: 8}], totals=[20, 3, 8]))
    assert cells.genes.tolist() == [0, 2, 1]
    assert cells.counts.tolist() == [6, 5, 8]
    assert cells.offsets.tolist() == [0, 2, 2, 3]
    assert cells.totals.tolist() == [20, 3, 8]
    assert GeneMap(IDS, NAMES, ["ENSG02.7", "X", "ENSG04"]).gene_V.tolist() == [-1, 0, -1, 2]


def test_totals_of_all_genes_or_of_known_ones():
    cells = make_batch([{0: 5, 1: 6, 3: 7}, {3: 4}, {}, {2: 8}], totals=[20, 9, 3, 8])
    by_symbol = GeneMap(IDS, NAMES, ["ACTB", "AC1.2", "TP53"])  # the second ACTB is unknown
    assert by_symbol.apply(cells).totals.tolist() == by_symbol.apply(cells, "all").totals.tolist() == [20, 9, 3, 8]
    known = by_symbol.apply(cells, "known")
    assert known.totals.tolist() == [11, 0, 0, 8]
    assert known.genes.tolist() == by_symbol.apply(cells).genes.tolist()
    assert known.counts.tolist() == [6, 5, 8]
    assert GeneMap(IDS, NAMES, IDS).apply(cells, "known").totals.tolist() == [18, 4, 0, 8]


def test_an_order_that_stays_is_kept():
    cells = make_batch([{0: 5, 1: 6, 3: 7}])
    same = GeneMap(IDS, NAMES, IDS).apply(cells)
    np.testing.assert_array_equal(same.genes, cells.genes)
    np.testing.assert_array_equal(same.counts, cells.counts)


def test_a_model_of_other_genes_is_refused():
    with pytest.raises(CellmillError, match="only 0 of the model's 2 genes .*species"):
        GeneMap(IDS, NAMES, ["ENSMUSG01", "ENSMUSG02"])
