"""scFoundation's view: log1p(CP10k) of a cell's nonzero genes and two depth tokens; thinned counts, masked positions.

The encoder reads the nonzero values that are not hidden, in gene order, and last the tokens T (target depth) and S
(source depth): log10 of total counts. The decoder has a position for every gene; it is told which are hidden, and
predicts the raw cell's value at all masked ones. A gene that stands in neither list is a zero that is seen.

Read-depth-aware training: half of the cells are thinned. Every molecule is kept with a probability b, one per cell,
from Beta(2, 2), so a count becomes a binomial number; S is the thinned cell's depth, T and the targets are the raw
cell's. Counts outside the vocabulary are thinned with the others, so that S is a depth over all measured genes as T is.

Masked are 30 % of the input's nonzeros and 3 % of its zeros. Of these 80 % are hidden, 10 % show a random value (of
another gene of the same cell's input, since nothing more is published), 10 % are left as they are.

Token ids: gene g is g; then T is V, S is V + 1.

Legend: B cells, V genes, N nonzeros, M masked positions, K candidates for masked zeros per cell, A counts in thinning.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import below, hash64, next_key, unit
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_genes, log1p_cp10k, offsets_of, place_within, select, spread, sum_within

NONZERO_RATE, ZERO_RATE = 0.3, 0.03
HIDDEN_SHARE, RANDOM_SHARE = 0.8, 0.1
THINNED_SHARE = 0.5
MIN_COUNTS = 1000
"""Cells with fewer counts are never thinned."""
_MASKED, _RAW, _NONZERO = 1, 2, 4
"""What is known of a gene of a cell: it is masked, has a count in the raw cell, has one in the input."""


class Encoded(NamedTuple):
    """What the encoder reads."""

    genes: Genes
    """Ascending; the last two of each cell are T and S."""
    values: np.ndarray
    """float32 [N]."""


class MaskedCells(NamedTuple):
    """The encoder's input, and the masked positions of the decoder."""

    encoded: Encoded
    masked: Genes
    """Ascending, M in all."""
    hidden_M: np.ndarray
    """bool [M], where the decoder sees the mask; elsewhere it sees what the encoder made of the position, or a zero."""
    targets_M: np.ndarray
    """float32 [M], log1p(CP10k) of the raw cell."""


def embed(cells: CellBatch, *, n_genes: int, target_counts: np.ndarray | None = None) -> Encoded:
    """All nonzero values and the depth tokens.

    Parameters
    ----------
    cells
        B cells.
    n_genes
        V.
    target_counts
        [B], the depth that T asks for; by default the cell's own.
    """
    target_counts = cells.totals if target_counts is None else target_counts
    genes = Genes(cells.joinids, cells.offsets, cells.genes)
    return _with_depths(genes, log1p_cp10k(cells), n_genes, target_counts, cells.totals)


def pretrain(cells: CellBatch, *, n_genes: int, seed: int, step: int | None) -> MaskedCells:
    """Thinned and masked cells with their targets. `step` is None in validation."""
    keys = (seed, -1 if step is None else step)
    seen = thin(cells, *keys)
    values_N = log1p_cp10k(seen)
    masked_N = below(hash_genes(seen, "scfoundation nonzero", *keys), NONZERO_RATE)

    # one byte for each gene of each cell: positions are sorted wherever they are read from it
    state = np.zeros(len(cells) * n_genes, np.uint8)
    position_N, raw_positions = _positions(seen, n_genes), _positions(cells, n_genes)
    state[_zero_candidates(cells.joinids, n_genes, *keys)] = _MASKED
    state[raw_positions] |= _RAW
    state[position_N] = _RAW | _NONZERO | masked_N
    position_M = np.flatnonzero(state & _MASKED)
    state_M = state[position_M]
    cell_M = position_M // n_genes
    masked = Genes(
        cells.joinids,
        np.searchsorted(position_M, np.arange(len(cells) + 1) * n_genes),
        (position_M - cell_M * n_genes).astype(np.int32),
    )
    targets_M = np.zeros(len(position_M), np.float32)
    targets_M[state_M & _RAW > 0] = log1p_cp10k(cells)[state[raw_positions] & _MASKED > 0]

    how_M = unit(hash_genes(masked, "scfoundation show", *keys))
    hidden_M = (how_M < HIDDEN_SHARE) | (seen.lengths == 0)[cell_M]  # an empty cell has no random value to show
    random_R = np.flatnonzero(~hidden_M & (how_M < HIDDEN_SHARE + RANDOM_SHARE))
    hash_R = hash_genes(masked, "scfoundation value", *keys, index_M=random_R)
    cell_R = cell_M[random_R]
    value_R = values_N[seen.offsets[cell_R] + (hash_R % seen.lengths[cell_R].astype(np.uint64)).view(np.int64)]

    # masked nonzeros are the same in the order of M and of N
    nonzero_M = state_M & _NONZERO > 0
    shown_M = np.zeros(len(position_M), np.float32)
    shown_M[nonzero_M] = values_N[masked_N]
    shown_M[random_R] = value_R
    values_N[masked_N] = shown_M[nonzero_M]
    left_N = ~masked_N
    left_N[masked_N] = ~hidden_M[nonzero_M]
    left = np.flatnonzero(left_N)
    zeros_shown = random_R[~nonzero_M[random_R]]
    at = np.searchsorted(position_N[left], position_M[zeros_shown])
    positions = np.insert(position_N[left], at, position_M[zeros_shown])
    offsets = np.searchsorted(positions, np.arange(len(cells) + 1) * n_genes)
    genes = Genes(
        cells.joinids, offsets, (positions - spread(np.arange(len(cells)) * n_genes, offsets)).astype(np.int32)
    )
    values = np.insert(values_N[left], at, shown_M[zeros_shown])
    return MaskedCells(_with_depths(genes, values, n_genes, cells.totals, seen.totals), masked, hidden_M, targets_M)


def _positions(cells: CellBatch, n_genes: int) -> np.ndarray:
    """int64 [N], places in a flat [B * V]; ascending."""
    return cells.genes + spread(np.arange(len(cells)) * n_genes, cells.offsets)


def _zero_candidates(joinids_B: np.ndarray, n_genes: int, *keys) -> np.ndarray:
    """int64 [B * K], places in a flat [B * V], so many that each place is among them with probability `ZERO_RATE`."""
    n_draws = round(np.log1p(-ZERO_RATE) / np.log1p(-1 / n_genes)) if n_genes > 1 else 1
    hash_BK = hash64("scfoundation zero", *keys, joinids_B[:, None], np.arange(n_draws))
    gene_BK = (hash_BK % np.uint64(n_genes)).view(np.int64)
    return (gene_BK + np.arange(len(joinids_B))[:, None] * n_genes).ravel()


def _with_depths(
    genes: Genes, values_N: np.ndarray, n_genes: int, target_B: np.ndarray, source_B: np.ndarray
) -> Encoded:
    """Append T and S to every cell, whatever their values."""
    offsets = genes.offsets + 2 * np.arange(len(genes.offsets))
    place_N = np.arange(len(values_N)) + spread(2 * np.arange(len(genes.joinids)), genes.offsets)
    out_genes, out_values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    out_genes[place_N], out_values[place_N] = genes.genes, values_N
    for behind, token, counts_B in ((2, n_genes, target_B), (1, n_genes + 1, source_B)):
        out_genes[offsets[1:] - behind] = token
        out_values[offsets[1:] - behind] = np.log10(np.maximum(counts_B, 1))
    return Encoded(Genes(genes.joinids, offsets, out_genes), out_values)


def thin(cells: CellBatch, *keys) -> CellBatch:
    """Half of the cells of at least `MIN_COUNTS` counts with some of their molecules, the others as they are.

    Parameters
    ----------
    cells
        B cells.
    *keys
        Seed and step.
    """
    chosen_B = below(hash64("scfoundation thinned", *keys, cells.joinids), THINNED_SHARE) & (cells.totals >= MIN_COUNTS)
    rows = np.flatnonzero(chosen_B)
    if not len(rows):
        return cells
    # the second of three uniform numbers has the distribution Beta(2, 2); as 64 binary digits
    kept_B = np.sort(hash64("scfoundation kept share", *keys, cells.joinids[:, None], np.arange(3)), axis=1)[:, 1]
    chosen = np.flatnonzero(spread(chosen_B, cells.offsets))
    hash_A = hash_genes(cells, "scfoundation thin", *keys, index_M=chosen)
    counts_N = cells.counts.copy()
    counts_N[chosen] = binomial(cells.counts[chosen], spread(kept_B, cells.offsets)[chosen], hash_A)
    others_B = cells.totals - sum_within(cells.offsets, cells.counts)
    hash_rows = hash64("scfoundation thin others", *keys, cells.joinids[rows])
    others_B[rows] = binomial(others_B[rows], kept_B[rows], hash_rows)
    totals_B = others_B + sum_within(cells.offsets, counts_N)
    return select(CellBatch(cells.joinids, cells.offsets, cells.genes, counts_N, totals_B), counts_N > 0)


def binomial(counts_A: np.ndarray, share_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """How many of `counts_A` molecules are kept, each with its probability: exact binomial numbers, int64 [A].

    A molecule is kept if a random number is below the share, and both are compared digit by digit from the front: of n
    molecules that are still undecided as many are decided by the next digit as n random bits have ones, or zeros.

    Parameters
    ----------
    counts_A
        Non-negative integers.
    share_A
        uint64, the probabilities times 2^64.
    hash_A
        uint64, the keys of the draws.
    """
    kept_A = np.zeros(len(counts_A), np.int64)
    single = np.flatnonzero(counts_A == 1)
    kept_A[single] = hash_A[single] < share_A[single]
    active = np.flatnonzero(counts_A > 1)
    n, share, hashes = counts_A[active].astype(np.int64), share_A[active], hash_A[active]
    for digit in range(64):
        if not len(active):
            break
        ones = _random_ones(n, hashes, digit)
        is_one = (share >> np.uint64(63 - digit) & np.uint64(1)).astype(bool)
        kept_A[active] += np.where(is_one, n - ones, 0)
        n = np.where(is_one, ones, n - ones)
        left = np.flatnonzero(n)
        active, n, share, hashes = active[left], n[left], share[left], hashes[left]
    return kept_A


def _random_ones(n_A: np.ndarray, hash_A: np.ndarray, digit: int) -> np.ndarray:
    """int64 [A], ones among `n_A` (at least 1) random bits."""
    offsets = offsets_of((n_A + 63) // 64)
    word = place_within(offsets)
    bits = next_key(next_key(spread(hash_A, offsets), np.array([digit])), word)
    unused = np.maximum((word + 1) * 64 - spread(n_A, offsets), 0)
    return sum_within(offsets, np.bitwise_count(bits >> unused.astype(np.uint64)))
