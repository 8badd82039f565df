"""The cells of all real files over one vocabulary, their fingerprints, and which of them are known to be one cell."""

import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from cellmill.census.genes import map_genes, read_gene_table
from cellmill.census.h5ad import find_h5ads, open_h5ad, read_chunks
from cellmill.fingerprints import choose_groups, comparable_groups, fingerprints
from cellmill.shards.batch import CellBatch


@dataclass(frozen=True)
class RealCells:
    """All cells of ``cells/*.h5ad`` over the protein-coding genes, sorted by id.

    `counts` is a CSR matrix [B, V]; `dataset` [B] and `name` [B] say which cell a row is; `measured` has the genes
    (bool [V]) of each data set.
    """

    counts: sp.csr_array
    dataset: np.ndarray
    name: np.ndarray
    measured: dict[str, np.ndarray]

    @functools.cached_property
    def group_V(self) -> np.ndarray:
        return choose_groups((self.counts > 0).sum(axis=0), np.sum(list(self.measured.values()), axis=0))


@functools.cache
def real_cells(data: Path) -> RealCells:
    table = read_gene_table(data / "genes" / "genes_homo_sapiens.csv.gz")
    coding = table.genes["feature_type"] == "protein_coding"
    ids = np.sort(table.genes.index[coding].to_numpy(str))
    blocks, dataset, names, measured = [], [], [], {}
    for path in find_h5ads(data / "cells"):
        h5ad = open_h5ad(path)
        mapping = map_genes(h5ad.var, table, path.name)
        mapping = mapping[mapping["feature_id"].isin(ids)]
        to_vocabulary = sp.csr_array(
            (np.ones(len(mapping)), (mapping.index, np.searchsorted(ids, mapping["feature_id"].to_numpy(str)))),
            shape=(len(h5ad.var), len(ids)),
        )
        measured[path.stem] = to_vocabulary.sum(axis=0) > 0
        blocks += [sp.csr_array(counts_DG) @ to_vocabulary for _, counts_DG in read_chunks(h5ad)]
        dataset += [path.stem] * len(h5ad.obs)
        names += h5ad.obs.index.tolist()
    counts = sp.csr_array(sp.vstack(blocks), dtype=np.int32)
    counts.sort_indices()
    return RealCells(counts, np.array(dataset), np.array(names), measured)


def batch(counts: sp.csr_array, genes=np.int32, values=np.int32) -> CellBatch:
    """The rows of a matrix as a batch, with integers of these types."""
    return CellBatch(
        joinids=np.arange(counts.shape[0]),
        offsets=counts.indptr.astype(np.int64),
        genes=counts.indices.astype(genes),
        counts=counts.data.astype(values),
        totals=counts.sum(axis=1).astype(np.int64),
    )


def prints_of(counts: sp.csr_array, group_V: np.ndarray, dataset: np.ndarray, measured: dict) -> np.ndarray:
    """uint64 [B, GROUPS], as curation calls for them."""
    comparable = comparable_groups(group_V, measured)
    return fingerprints(batch(counts), group_V, np.stack([comparable[name] for name in dataset]))


def thinned(counts: sp.csr_array, seed: int) -> sp.csr_array:
    """Another draw of half of the molecules of every cell."""
    draw = counts.copy()
    draw.data = np.random.default_rng(seed).binomial(counts.data, 0.5).astype(counts.data.dtype)
    draw.eliminate_zeros()
    return draw


def same_barcode(cells: RealCells) -> list[tuple[int, int]]:
    """Cells of the two studies of sorted blood cells with the same 14 bases, and that the counts tell apart."""
    rows = defaultdict(list)
    for row in np.flatnonzero(cells.dataset == "fasttopics_pbmc_facs"):
        rows[cells.name[row][:14]].append(row)
    ours = np.flatnonzero(cells.dataset == "scminer_pbmc14k_recovered")
    return [(int(a), int(b)) for b in ours for a in rows[cells.name[b][:14]]]


def genes_that_differ(cells: RealCells, a: int, b: int) -> int:
    """Of the genes that both data sets measured, those whose counts differ in two cells."""
    both = cells.measured[cells.dataset[a]] & cells.measured[cells.dataset[b]]
    return int((cells.counts[[a]].toarray() != cells.counts[[b]].toarray())[0, both].sum())
