"""The two compiled loops of curation: counts as the Census stores them in, packed cells out.

TileDB gives the counts of a range of cells tile by tile (2,048 cells by 2,048 genes), a cell's counts of one tile side
by side. `gather` puts each such run beside the earlier ones of its cell and adds up what quality control asks for;
`pack` turns the cells that stay into bytes of the shard format, and adds up their fingerprints. Each nonzero is touched
twice.

Both release the GIL, so that the Census is read on meanwhile, and are compiled once per machine. What they call is in
this file, too: numba would not notice a change of another one.

Legend: B cells, N stored counts of one table, V_all genes of the Census, V genes of the vocabulary, K cells packed, M
their nonzeros, G groups of fingerprints.
"""

import numba
import numpy as np

from cellmill.shards.format import OVERFLOWN

TOTAL, NNZ, MITO, RIBO, NEXT, END, STATES = range(7)
"""Columns of a cell's state: its counts and genes so far, those of them in mitochondrial and in ribosomal genes, and
where its next pair goes and the room ends."""
PLAIN, MITOCHONDRIAL, RIBOSOMAL = range(3)
"""What kind a gene is."""
LIMIT = np.float32(2**31)
"""Counts are below it."""
_OUTSIDE, _MITO, _RIBO = 16, 17, 18
"""Bits of a gene's code that say: not in the vocabulary, mitochondrial, ribosomal. Its id is in the 16 bits below."""

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, np.int64)
"""The position of a 64-bit word's one set bit, by the top six bits of its product with `_DE_BRUIJN`."""
for _bit in range(64):
    _BIT[(int(_DE_BRUIJN) << _bit & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


def new_state(room_B: np.ndarray) -> np.ndarray:
    """int64 [B, STATES], the state of cells without any count yet, with room for `room_B` pairs each."""
    state_BS = np.zeros((len(room_B), STATES), np.int64)
    state_BS[:, END] = np.cumsum(room_B)
    state_BS[:, NEXT] = state_BS[:, END] - room_B
    return state_BS


def codes(gene_of: np.ndarray, kind_of: np.ndarray) -> np.ndarray:
    """What `gather` asks of a gene in one number: int32 [V_all], of ids in the vocabulary (-1 outside) and kinds."""
    outside, mito, ribo = gene_of < 0, kind_of == MITOCHONDRIAL, kind_of == RIBOSOMAL
    bits = outside.astype(np.int32) << _OUTSIDE | mito.astype(np.int32) << _MITO | ribo.astype(np.int32) << _RIBO
    return bits | np.where(outside, 0, gene_of).astype(np.int32)


@numba.njit(nogil=True, cache=True)
def gather(joinid_N, var_N, count_N, joinid_B, code_of, state_BS, pairs):
    """Add the counts of one table to their cells.

    Parameters
    ----------
    joinid_N, var_N, count_N
        Cell, gene (joinids of obs and var) and count of each stored value, in any order; runs of one cell are quick.
    joinid_B
        The wanted cells, ascending; others are passed over.
    code_of
        int32 [V_all], from `codes`.
    state_BS
        From `new_state`; changed. A cell with more genes than it has room for loses some, but `NNZ` counts them.
    pairs
        int64, room for gene * 2**32 + count of every nonzero in the vocabulary; filled.

    Returns
    -------
    int
        Position of a count that is no integer from 0 to 2**31 - 1, where it stopped; -1 if there is none.
    """
    n, row, i = len(joinid_N), -1, 0
    while i < n:
        joinid = joinid_N[i]
        row = _find(joinid_B, joinid, row + 1)
        if row < 0:
            while i < n and joinid_N[i] == joinid:
                i += 1
            continue
        at, end = state_BS[row, NEXT], state_BS[row, END]
        total = nnz = mito = ribo = 0
        while i < n and joinid_N[i] == joinid:
            stored = count_N[i]
            if not np.float32(0) <= stored < LIMIT:
                return i
            count = np.int32(stored)
            if np.float32(count) != stored:
                return i
            code = np.int64(code_of[np.uint64(var_N[i])])
            i += 1
            if count == 0:
                continue
            # No branches: which gene comes next cannot be foretold. A pair outside the vocabulary is written over.
            total += count
            nnz += 1
            mito += count & -(code >> _MITO & 1)
            ribo += count & -(code >> _RIBO & 1)
            if at < end:
                pairs[np.uint64(at)] = (code & 0xFFFF) << 32 | count
                at += 1 - (code >> _OUTSIDE & 1)
        state_BS[row, NEXT] = at
        state_BS[row, TOTAL] += total
        state_BS[row, NNZ] += nnz
        state_BS[row, MITO] += mito
        state_BS[row, RIBO] += ribo
    return -1


def load() -> None:
    """Compile `gather` and `pack`, or read them from the cache, for the types that a Census has.

    This starts numba, which takes as long as many imports do: curation does it with its imports.
    """
    a_1, a_2 = (lambda kind, frozen=False: numba.types.Array(kind, 1, "C", frozen)), lambda kind: kind[:, ::1]
    i4, i8, u8 = numba.int32, numba.int64, numba.uint64
    stored = [a_1(i8, True), a_1(i8, True), a_1(numba.float32, True)]
    gather.compile((*stored, a_1(i8, True), a_1(i4), a_2(i8), a_1(i8)))
    room = [a_1(numba.uint8), a_1(numba.uint16), a_1(numba.uint8), a_1(numba.uint32)]
    pack.compile(
        (a_1(i8), a_1(i8), a_2(i8), a_1(i8), a_1(i4), a_1(numba.int8, True), a_1(u8), *room, a_2(i4), a_2(u8), a_2(i4))
    )


@numba.njit(nogil=True, cache=True)
def _find(sorted_B, value, guess):
    """Position of `value`, first looked for at `guess`; -1 where it is absent."""
    if guess < len(sorted_B) and sorted_B[guess] == value:
        return guess
    place = np.searchsorted(sorted_B, value)
    return place if place < len(sorted_B) and sorted_B[place] == value else -1


@numba.njit(nogil=True, cache=True)
def pack(
    row_K, first_B, state_BS, pairs, count_V, group_V, key_V, genes, far, counts, many, ends, print_KG, members_KG
):
    """Pack some cells as `cellmill.shards.format.encode_cells` does, and add up their fingerprints.

    Parameters
    ----------
    row_K
        Positions of the cells to pack.
    first_B
        Where each cell's pairs start.
    state_BS, pairs
        As `gather` left them; the pairs of a cell whose genes do not ascend are sorted.
    count_V
        int32 [V], all 0; room to sort in.
    group_V, key_V
        int8 [V], the group that a gene's count is hashed in, -1 for none, and uint64 [V], under which key.
    genes, counts
        uint8 [M], filled; cells lie one after the other in the order of `row_K`.
    far, many
        uint16 and uint32, filled: the overflow of `genes` and of `counts`; a cell has at most V // 255 of the first
        kind and `TOTAL` // 255 of the second.
    ends
        int32 [4, K + 1], all 0; filled: where a cell's bytes end in `genes`, `far`, `counts` and `many`.
    print_KG, members_KG
        uint64 and int32 [K, G], all 0; filled: the sum of each group's hashes, and how many they are.

    Returns
    -------
    int
        One more than the largest gene id.
    """
    bits = np.zeros(len(count_V) // 64 + 1, np.uint64)
    grouped = np.empty(len(count_V) + 1, np.int64)
    at = n_far = n_many = n_genes = 0
    for k, row in enumerate(row_K):
        mine = pairs[first_B[row] : state_BS[row, NEXT]]
        ascend = True
        for i in range(1, len(mine)):
            ascend &= mine[i - 1] < mine[i]
        if not ascend:
            _sort(mine, count_V, bits)
        if _to_bytes(mine, genes[at : at + len(mine)], counts[at : at + len(mine)]):
            last = np.int64(0)
            for pair in mine:
                gene, count = pair >> 32, pair & 0xFFFFFFFF
                if gene - last >= OVERFLOWN:
                    far[n_far] = gene - last
                    n_far += 1
                if count >= OVERFLOWN:
                    many[n_many] = count
                    n_many += 1
                last = gene
        # First the few genes that are in a group, again without branches.
        n_grouped = 0
        for pair in mine:
            grouped[np.uint64(n_grouped)] = pair
            n_grouped += group_V[np.uint64(pair >> 32)] >= 0
        for pair in grouped[:n_grouped]:
            gene = np.uint64(pair >> 32)
            # a sum, so that the order of genes does not matter
            print_KG[k, group_V[gene]] += _mixed(key_V[gene], pair & 0xFFFFFFFF)
            members_KG[k, group_V[gene]] += 1
        if len(mine):
            n_genes = max(n_genes, (mine[-1] >> 32) + 1)
        at += len(mine)
        ends[0, k + 1] = ends[2, k + 1] = at
        ends[1, k + 1], ends[3, k + 1] = 2 * n_far, 4 * n_many
    return n_genes


@numba.njit(nogil=True, cache=True)
def _to_bytes(pairs, genes, counts):
    """Fill the bytes of one cell; says whether any overflows. The loops are so plain that they become vector code."""
    overflows = False
    for i in range(len(pairs)):
        step = (pairs[i] >> 32) - (pairs[i - 1] >> 32 if i else 0)
        overflows |= step >= OVERFLOWN
        genes[i] = min(step, OVERFLOWN)
    for i in range(len(pairs)):
        count = pairs[i] & 0xFFFFFFFF
        overflows |= count >= OVERFLOWN
        counts[i] = min(count, OVERFLOWN)
    return overflows


@numba.njit(nogil=True, cache=True)
def _sort(pairs, count_V, bits):
    """Sort one cell's pairs by gene, with zeroed room for one cell's counts by gene and a bit for each gene."""
    one = np.uint64(1)
    for pair in pairs:
        gene = pair >> 32
        count_V[gene] = np.int32(pair)
        bits[gene >> 6] |= one << np.uint64(gene & 63)
    at = 0
    for word in range(len(bits)):  # reading the bits in turn sorts the genes
        left = bits[word]
        bits[word] = 0
        while left:
            lowest = left & (~left + one)
            left ^= lowest
            gene = word * 64 + _BIT[lowest * _DE_BRUIJN >> np.uint64(58)]
            pairs[at] = gene << 32 | np.int64(count_V[gene])
            at += 1


@numba.njit(nogil=True, cache=True)
def add_prints(offsets_B1, gene_M, count_M, group_V, key_V, print_BG, members_BG):
    """Add the genes of ragged cells to the sums of their groups, as `pack` does."""
    for b in range(len(offsets_B1) - 1):
        for n in range(offsets_B1[b], offsets_B1[b + 1]):
            gene = gene_M[n]
            group = group_V[gene]
            if group >= 0:
                print_BG[b, group] += _mixed(key_V[gene], count_M[n])
                members_BG[b, group] += 1


@numba.njit(nogil=True, cache=True)
def _mixed(key, count):
    x = key ^ (np.uint64(count) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
