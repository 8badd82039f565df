"""Fingerprints of cells, by which copies of one cell are found whatever data sets they stand in.

Two copies of a cell seldom have the same genes: one data set filtered them, another used an older annotation. So a cell
has not one fingerprint but `GROUPS` of them, each a hash of its counts in one small group of genes that many data sets
measure. A group is compared where both data sets measured all its genes. The groups of the first half hold the genes
that most data sets measure; those of the second half the genes that most cells express, which tell shallow cells apart.

Legend: B cells, N nonzeros of all cells together, V genes in the vocabulary.
"""

import numpy as np
import pyarrow as pa

from cellmill.randomness import hash64
from cellmill.shards import kernels
from cellmill.shards.batch import CellBatch

GROUPS = 8
GENES_PER_GROUP = 32
MIN_GENES = 8
"""Genes of a group that a cell must express for the group to be compared: with fewer, two cells agree by chance."""
PRINTS = tuple(f"p{group}" for group in range(GROUPS))
PRINTS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.dictionary(pa.int32(), pa.string())),
        ("observation_joinid", pa.string()),
        *((name, pa.uint64()) for name in PRINTS),
    ]
)
"""One row a cell; p0 to p7 are its fingerprints, 0 where the group cannot be compared."""
MIN_EQUAL = 2
MIN_SHARE = 0.75
"""Two cells are copies if they agree in at least `MIN_EQUAL` groups and in this share of the groups that both have.

Not in all: two data sets may count a gene otherwise (read-through genes, a symbol of two ids), which spoils its group.
"""
_POOLS = (1024, 256)
"""Genes, by the number of cells that express them, of which the first and the second half of the groups are chosen."""


def choose_groups(nnz_V: np.ndarray, datasets_V: np.ndarray) -> np.ndarray:
    """Deal genes of a vocabulary to the groups.

    For the first half of the groups, of the 1,024 genes that most cells express those that most data sets measured; for
    the second half the same of the next 256 genes. Within a half genes are dealt in turn, so that its groups are alike.

    Parameters
    ----------
    nnz_V
        int64 [V], cells with a count of the gene.
    datasets_V
        int64 [V], data sets that measured it.

    Returns
    -------
    np.ndarray
        int8 [V], 0 to `GROUPS` - 1, and -1 for the genes of none. A vocabulary of few genes fills the groups in part.
    """
    group_V = np.full(len(nnz_V), -1, np.int8)
    half = GROUPS // 2
    for first, pool in zip((0, half), _POOLS, strict=True):
        open_ = np.flatnonzero((group_V < 0) & (nnz_V > 0))
        expressed = open_[np.argsort(-nnz_V[open_], kind="stable")][:pool]
        measured = expressed[np.argsort(-datasets_V[expressed], kind="stable")][: half * GENES_PER_GROUP]
        group_V[measured] = first + np.arange(len(measured)) % half
    return group_V


def comparable_groups(group_V: np.ndarray, measured: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The groups of which a data set measured every gene.

    Parameters
    ----------
    group_V
        int8 [V], as `choose_groups` gives them.
    measured
        For each data set bool [V], the genes that it measured (presence matrix).

    Returns
    -------
    dict
        For each data set bool [GROUPS].
    """
    members = [np.flatnonzero(group_V == group) for group in range(GROUPS)]
    return {
        dataset_id: np.array([measured_V[genes].all() for genes in members])
        for dataset_id, measured_V in measured.items()
    }


def fingerprints(cells: CellBatch, group_V: np.ndarray, comparable_BG: np.ndarray) -> np.ndarray:
    """The fingerprints of cells.

    A fingerprint hashes the counts of a group's genes, each under the gene's rank (by `feature_id`) among the genes of
    all groups: it depends on what the groups hold, not on the rest of the vocabulary. Genes without a count need no
    mention.

    Parameters
    ----------
    cells
        B cells; genes and counts of any integer type.
    group_V
        int8 [V], as `choose_groups` gives them.
    comparable_BG
        bool [B, GROUPS]: did the cell's data set measure every gene of the group (`comparable_groups`).

    Returns
    -------
    np.ndarray
        uint64 [B, GROUPS]; 0 where the group is not comparable or the cell expresses fewer than `MIN_GENES` of its
        genes.
    """
    print_BG, members_BG = np.zeros((len(cells), GROUPS), np.uint64), np.zeros((len(cells), GROUPS), np.int32)
    group_V = np.ascontiguousarray(group_V, np.int8)
    kernels.add_prints(cells.offsets, cells.genes, cells.counts, group_V, gene_keys(group_V), print_BG, members_BG)
    return comparable_prints(print_BG, members_BG, comparable_BG)


def gene_keys(group_V: np.ndarray) -> np.ndarray:
    """uint64 [V], under which key a gene's counts are hashed."""
    return hash64("fingerprint", np.cumsum(group_V >= 0))


def comparable_prints(print_BG: np.ndarray, members_BG: np.ndarray, comparable_BG: np.ndarray) -> np.ndarray:
    """uint64 [B, GROUPS], the sums, 0 where too few genes are expressed (`members_BG`) or some were not measured."""
    return np.where(comparable_BG & (members_BG >= MIN_GENES), print_BG, np.uint64(0))
