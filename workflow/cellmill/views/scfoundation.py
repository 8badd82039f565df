"""scFoundation's view: log1p(CP10k) of a cell's nonzero genes and two depth tokens; thinned counts, masked positions.

The encoder reads the nonzero values that are not hidden, and last the tokens T (target depth) and S (source depth):
log10 of total counts. The decoder has a position for every gene; it is told which are hidden, and predicts the raw
cell's value at all masked ones. A gene that stands in neither list is a zero that is seen.

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

from cellmill.randomness import below, hash64, next_key
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_genes, join, log1p_cp10k, offsets_of, place_within, spread, sum_within

NONZERO_RATE, ZERO_RATE = 0.3, 0.03
HIDDEN_SHARE, RANDOM_SHARE = 0.8, 0.1
THINNED_SHARE = 0.5
MIN_COUNTS = 1000
"""Cells with fewer counts are never thinned."""
_LANES = np.array([0x0101010101010101 % 256**n for n in range(9)], np.uint64)
"""n bytes of 1."""
_NONZERO, _GONE = 1, 2
"""A gene of a cell that the input has, and one of which thinning took all molecules."""


class Encoded(NamedTuple):
    """What the encoder reads."""

    genes: Genes
    """Ascending, then zeros that show a value, if any; the last two of each cell are T and S."""
    values: np.ndarray
    """float32 [N]."""


class Masked(NamedTuple):
    """Positions that the decoder predicts."""

    genes: Genes
    """Ascending, M in all."""
    hidden: np.ndarray
    """bool [M], where the decoder sees the mask; elsewhere it sees what the encoder made of the position, or a zero."""
    targets: np.ndarray
    """float32 [M], log1p(CP10k) of the raw cell."""


class MaskedCells(NamedTuple):
    """The encoder's input and the decoder's masked positions, apart for nonzeros and zeros of the input."""

    encoded: Encoded
    nonzeros: Masked
    zeros: Masked


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
    offsets, (at_genes, at_depths) = join([cells.offsets, 2 * np.arange(len(cells) + 1)])
    genes_N, values_N = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    genes_N[at_genes], values_N[at_genes] = cells.genes, log1p_cp10k(cells)
    genes_N[at_depths], values_N[at_depths] = _depths(n_genes, target_counts, cells.totals)
    return Encoded(Genes(cells.joinids, offsets, genes_N), values_N)


def pretrain(cells: CellBatch, *, n_genes: int, seed: int, step: int | None) -> MaskedCells:
    """Thinned and masked cells with their targets. `step` is None in validation."""
    keys = (seed, -1 if step is None else step)
    counts_N, totals_B = thin(cells, *keys)
    raw_N, raw_positions = log1p_cp10k(cells), _positions(cells, n_genes)
    left, gone = np.flatnonzero(counts_N), np.flatnonzero(counts_N == 0)
    seen = CellBatch(cells.joinids, np.searchsorted(left, cells.offsets), cells.genes[left], counts_N[left], totals_B)
    values_N = log1p_cp10k(seen)

    index_M = np.flatnonzero(below(hash_genes(seen, "scfoundation nonzero", *keys), NONZERO_RATE))
    genes = Genes(cells.joinids, np.searchsorted(index_M, seen.offsets), seen.genes[index_M])
    hidden_M, random_R, value_R = _show(genes, seen, values_N, keys)
    nonzeros = Masked(genes, hidden_M, raw_N[left[index_M]])

    values_N[index_M[random_R]] = value_R
    shown = np.ones(len(values_N), bool)
    shown[index_M[hidden_M]] = False
    shown = np.flatnonzero(shown)
    state = np.zeros(len(cells) * n_genes, np.uint8)
    position_N = raw_positions[left]
    state[position_N] = _NONZERO
    state[raw_positions[gone]] = _GONE
    places = np.arange(len(cells) + 1) * n_genes
    position_M = _zero_draws(cells.joinids, n_genes, *keys)
    state_M = state[position_M]
    position_M, state_M = position_M[state_M != _NONZERO], state_M[state_M != _NONZERO]
    offsets = np.searchsorted(position_M, places)
    genes = Genes(cells.joinids, offsets, (position_M - spread(places[:-1], offsets)).astype(np.int32))
    targets_M = np.zeros(len(position_M), np.float32)
    gone_M = np.flatnonzero(state_M == _GONE)
    targets_M[gone_M] = raw_N[np.searchsorted(raw_positions, position_M[gone_M])]
    hidden_M, random_R, value_R = _show(genes, seen, values_N, keys)
    zeros = Masked(genes, hidden_M, targets_M)

    # a zero that shows a random value is read by the encoder like a nonzero
    shown_offsets = np.searchsorted(shown, seen.offsets)
    zero_offsets = np.searchsorted(random_R, offsets)
    offsets, (at_nonzeros, at_zeros, at_depths) = join([shown_offsets, zero_offsets, 2 * np.arange(len(cells) + 1)])
    genes_N, out_N = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    genes_N[at_nonzeros], out_N[at_nonzeros] = seen.genes[shown], values_N[shown]
    genes_N[at_zeros], out_N[at_zeros] = genes.genes[random_R], value_R
    genes_N[at_depths], out_N[at_depths] = _depths(n_genes, cells.totals, totals_B)
    return MaskedCells(Encoded(Genes(cells.joinids, offsets, genes_N), out_N), nonzeros, zeros)


def _show(
    masked: Genes, seen: CellBatch, values_N: np.ndarray, keys: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which masked positions are hidden, and which show a random value of their cell, and that value."""
    how_M = hash_genes(masked, "scfoundation show", *keys)
    empty_B = seen.lengths == 0  # has no random value to show
    hidden_M = below(how_M, HIDDEN_SHARE) | spread(empty_B, masked.offsets)
    random_R = np.flatnonzero(~hidden_M & below(how_M, HIDDEN_SHARE + RANDOM_SHARE))
    cell_R = spread(np.arange(len(seen)), masked.offsets)[random_R]
    hash_R = hash_genes(masked, "scfoundation value", *keys, index_M=random_R)
    place_R = (hash_R % seen.lengths[cell_R].astype(np.uint64)).view(np.int64)
    return hidden_M, random_R, values_N[seen.offsets[cell_R] + place_R]


def _positions(cells: CellBatch, n_genes: int) -> np.ndarray:
    """int64 [N], places in a flat [B * V]; ascending."""
    return cells.genes + spread(np.arange(len(cells)) * n_genes, cells.offsets)


def _zero_draws(joinids_B: np.ndarray, n_genes: int, *keys) -> np.ndarray:
    """int64, ascending places in a flat [B * V], each with probability `ZERO_RATE`.

    So many are drawn, with replacement, that each gene is drawn with that probability; the other genes cost nothing.
    """
    n_draws = round(np.log1p(-ZERO_RATE) / np.log1p(-1 / n_genes)) if n_genes > 1 else 1
    hash_BK = hash64("scfoundation zero", *keys, joinids_B[:, None], np.arange(n_draws))
    gene_BK = (hash_BK >> np.uint64(32)) * np.uint64(n_genes) >> np.uint64(32)
    gene_BK = gene_BK.astype(np.uint16)  # ids are 16 bits wide, and short integers sort fast
    gene_BK.sort(axis=1)
    is_new_BK = np.ones(gene_BK.shape, bool)
    is_new_BK[:, 1:] = gene_BK[:, 1:] > gene_BK[:, :-1]
    return (gene_BK + np.arange(len(joinids_B))[:, None] * n_genes).ravel()[np.flatnonzero(is_new_BK)]


def _depths(n_genes: int, target_B: np.ndarray, source_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2 B], the tokens T and S of every cell, and their values."""
    counts_B2 = np.stack([target_B, source_B], axis=1)
    return np.tile([n_genes, n_genes + 1], len(counts_B2)), np.log10(np.maximum(counts_B2, 1)).ravel()


def thin(cells: CellBatch, *keys) -> tuple[np.ndarray, np.ndarray]:
    """Half of the cells of at least `MIN_COUNTS` counts lose molecules, the others none.

    Parameters
    ----------
    cells
        B cells.
    *keys
        Seed and step.

    Returns
    -------
    int32 [N], the counts that are left, some of them 0; int64 [B], the total counts that are left.
    """
    chosen_B = below(hash64("scfoundation thinned", *keys, cells.joinids), THINNED_SHARE) & (cells.totals >= MIN_COUNTS)
    rows = np.flatnonzero(chosen_B)
    if not len(rows):
        return cells.counts, cells.totals
    # the second of three uniform numbers has the distribution Beta(2, 2); as 64 binary digits
    share_B = np.sort(hash64("scfoundation kept share", *keys, cells.joinids[:, None], np.arange(3)), axis=1)[:, 1]
    chosen = np.flatnonzero(spread(chosen_B, cells.offsets))
    others_B = cells.totals - sum_within(cells.offsets, cells.counts)  # in genes outside the vocabulary
    left = binomial(
        np.concatenate([cells.counts[chosen], others_B[rows]]),
        np.concatenate([spread(share_B, cells.offsets)[chosen], share_B[rows]]),
        np.concatenate(
            [
                hash_genes(cells, "scfoundation thin", *keys, index_M=chosen),
                hash64("scfoundation thin others", *keys, cells.joinids[rows]),
            ]
        ),
    )
    counts_N = cells.counts.copy()
    counts_N[chosen] = left[: len(chosen)]
    others_B[rows] = left[len(chosen) :]
    return counts_N, others_B + sum_within(cells.offsets, counts_N)


def binomial(counts_A: np.ndarray, share_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """How many of `counts_A` molecules are kept, each with its probability: exact binomial numbers, int64 [A].

    A molecule is kept if a random number is below the share; the two are compared from the front, 8 binary digits at a
    time, for 8 molecules in one word. Of more than 64 molecules as many are decided by one digit as random bits have
    ones, or zeros, until few are undecided.

    Parameters
    ----------
    counts_A
        Non-negative integers.
    share_A
        uint64, the probabilities times 2^64.
    hash_A
        uint64, the keys of the draws.
    """
    n_A, share_A, kept_A = counts_A.astype(np.int64), share_A.copy(), np.zeros(len(counts_A), np.int64)
    many = np.flatnonzero(n_A > 64)
    for digit in range(64):
        if not len(many):
            break
        ones = _random_ones(n_A[many], next_key(hash_A[many], np.array([digit])))
        zeros, is_one = n_A[many] - ones, share_A[many] >> np.uint64(63) > 0
        kept_A[many] += np.where(is_one, zeros, 0)
        n_A[many] = np.where(is_one, ones, zeros)
        share_A[many] <<= np.uint64(1)
        many = many[n_A[many] > 64]
    n_A[many] = 0  # equal to the share in all of its digits, and so not below it

    several = np.flatnonzero(n_A > 8)
    offsets = offsets_of((n_A[several] + 7) // 8)
    word = place_within(offsets)
    hashes = next_key(spread(hash_A[several], offsets), word + 64)
    left = np.minimum(spread(n_A[several], offsets) - 8 * word, 8)
    kept_A[several] += sum_within(offsets, _kept_of_eight(left, spread(share_A[several], offsets), hashes))
    n_A[several] = 0
    return kept_A + _kept_of_eight(n_A, share_A, hash_A)


def _kept_of_eight(n_A: np.ndarray, share_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """int64 [A], how many of at most 8 molecules are kept."""
    kept_A = np.zeros(len(n_A), np.int64)
    active, n, share, hashes = slice(None), n_A, share_A, hash_A
    for eight in range(8):
        lanes = _LANES[n]  # one byte for each molecule
        bytes_8A, fronts_8A = hashes.view(np.uint8), ((share >> np.uint64(56)) * _LANES[8]).view(np.uint8)
        kept_A[active] += np.bitwise_count((bytes_8A < fronts_8A).view(np.uint64) & lanes)
        undecided = np.bitwise_count((bytes_8A == fronts_8A).view(np.uint64) & lanes)
        left = np.flatnonzero(undecided)
        if not len(left):
            break
        n, share, hashes = undecided[left], share[left] << np.uint64(8), next_key(hashes[left], np.array([eight]))
        active = left if isinstance(active, slice) else active[left]
    return kept_A


def _random_ones(n_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """int64 [A], ones among `n_A` random bits, at least 64."""
    offsets = offsets_of((n_A + 63) // 64)
    word = place_within(offsets)
    unused = np.maximum((word + 1) * 64 - spread(n_A, offsets), 0).view(np.uint64)
    return sum_within(offsets, np.bitwise_count(next_key(spread(hash_A, offsets), word) >> unused))
