"""The two compiled loops of curation: counts as the Census stores them in, cells with ascending genes out.

TileDB gives the counts of a range of cells tile by tile (2,048 cells by 2,048 genes), a cell's counts of one tile side
by side. `gather` puts each such run beside the earlier ones of its cell and adds up what quality control asks for;
`take` picks cells and, where genes did not come in the vocabulary's order, sorts them. Each nonzero is touched twice.

Both release the GIL, so that the Census is read on meanwhile, and are compiled once per machine.

Legend: B cells, N stored counts of one table, V_all genes of the Census, V genes of the vocabulary, K cells taken, M
their nonzeros.
"""

import numba
import numpy as np

TOTAL, NNZ, MITO, RIBO, LAST, NEXT, END, STATES = range(8)
"""Columns of a cell's state: its counts and genes so far, those of them in mitochondrial and in ribosomal genes, its
last gene, and where its next pair goes and the room ends."""
PLAIN, MITOCHONDRIAL, RIBOSOMAL = range(3)
"""What kind a gene is."""
LIMIT = 2**31
"""Counts are below it."""

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, np.int64)
"""The position of a 64-bit word's one set bit, by the top six bits of its product with `_DE_BRUIJN`."""
for _bit in range(64):
    _BIT[(int(_DE_BRUIJN) << _bit & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


def new_state(room_B: np.ndarray) -> np.ndarray:
    """int64 [B, STATES], the state of cells without any count yet, with room for `room_B` pairs each."""
    state_BS = np.zeros((len(room_B), STATES), np.int64)
    state_BS[:, LAST] = -1
    state_BS[:, END] = np.cumsum(room_B)
    state_BS[:, NEXT] = state_BS[:, END] - room_B
    return state_BS


@numba.njit(nogil=True, cache=True)
def gather(joinid_N, var_N, count_N, joinid_B, gene_of, kind_of, state_BS, pairs):
    """Add the counts of one table to their cells.

    Parameters
    ----------
    joinid_N, var_N, count_N
        Cell, gene (joinids of obs and var) and count of each stored value, in any order; runs of one cell are quick.
    joinid_B
        The wanted cells, ascending; others are passed over.
    gene_of
        int32 [V_all], id in the vocabulary, -1 outside.
    kind_of
        uint8 [V_all], `PLAIN`, `MITOCHONDRIAL` or `RIBOSOMAL`.
    state_BS
        From `new_state`; changed. A cell with more genes than it has room for loses some, but `NNZ` counts them.
    pairs
        int64, room for gene * 2**32 + count of every nonzero in the vocabulary; filled.

    Returns
    -------
    faulty : int
        Position of a count that is no integer from 0 to 2**31 - 1, where it stopped; -1 if there is none.
    ascend : bool
        Did the genes of every cell ascend, also after those of earlier tables.
    """
    n, row, ascend = len(joinid_N), -1, True
    i = 0
    while i < n:
        joinid = joinid_N[i]
        row = _find(joinid_B, joinid, row + 1)
        if row < 0:
            while i < n and joinid_N[i] == joinid:
                i += 1
            continue
        state = state_BS[row]
        at, end, last = state[NEXT], state[END], state[LAST]
        total = nnz = mito = ribo = 0
        while i < n and joinid_N[i] == joinid:
            stored = count_N[i]
            if not 0 <= stored < LIMIT or np.int32(stored) != stored:
                return i, ascend
            count = np.int32(stored)
            var = var_N[i]
            i += 1
            if count == 0:
                continue
            total += count
            nnz += 1
            kind = kind_of[var]
            mito += count * (kind == MITOCHONDRIAL)  # no branch: which gene comes next cannot be foretold
            ribo += count * (kind == RIBOSOMAL)
            gene = np.int64(gene_of[var])
            if gene >= 0 and at < end:
                ascend &= gene > last
                pairs[at] = gene << 32 | count
                at += 1
                last = gene
        state[NEXT], state[LAST] = at, last
        state[TOTAL] += total
        state[NNZ] += nnz
        state[MITO] += mito
        state[RIBO] += ribo
    return -1, ascend


@numba.njit(nogil=True, cache=True)
def _find(sorted_B, value, guess):
    """Position of `value`, first looked for at `guess`; -1 where it is absent."""
    if guess < len(sorted_B) and sorted_B[guess] == value:
        return guess
    place = np.searchsorted(sorted_B, value)
    return place if place < len(sorted_B) and sorted_B[place] == value else -1


@numba.njit(nogil=True, cache=True)
def take(row_K, first_B, state_BS, pairs, ascend, count_V, genes, counts):
    """The nonzeros of some cells.

    Parameters
    ----------
    row_K
        Positions of the cells to take.
    first_B
        Where each cell's pairs start.
    state_BS, pairs
        As `gather` left them.
    ascend
        Do the genes of every cell ascend; if not, they are sorted.
    count_V
        int32 [V], all 0; room to sort in.
    genes, counts
        uint16 [M] and int32 [M], filled; cells lie one after the other in the order of `row_K`.
    """
    # One cell's counts by gene, and a bit for each gene that has one: reading the bits in turn sorts the genes.
    bits = np.zeros(len(count_V) // 64 + 1, np.uint64)
    one = np.uint64(1)
    at = 0
    for row in row_K:
        if ascend:
            for i in range(first_B[row], state_BS[row, NEXT]):
                genes[at], counts[at] = pairs[i] >> 32, np.int32(pairs[i])
                at += 1
            continue
        for i in range(first_B[row], state_BS[row, NEXT]):
            gene = pairs[i] >> 32
            count_V[gene] = np.int32(pairs[i])
            bits[gene >> 6] |= one << np.uint64(gene & 63)
        for word in range(len(bits)):
            left = bits[word]
            bits[word] = 0
            while left:
                lowest = left & (~left + one)
                left ^= lowest
                gene = word * 64 + _BIT[lowest * _DE_BRUIJN >> np.uint64(58)]
                genes[at], counts[at] = gene, count_V[gene]
                at += 1
