"""scFoundation's view: log1p(CP10k) of a cell's nonzero genes and two depth tokens; thinned counts, masked positions.

The encoder reads the nonzero values that are not hidden, and last the tokens T (target depth) and S (source depth):
log10 of total counts. The decoder has a position for every gene; it is told which are hidden, and predicts the raw
cell's value at all masked ones. A gene that stands in neither list is a zero that is seen.

Read-depth-aware training: half of the cells are thinned. Every molecule is kept with a probability b, one per cell,
from Beta(2, 2), so a count becomes a binomial number; S is the thinned cell's depth, T and the targets are the raw
cell's. Counts outside the vocabulary are thinned with the others, so that S is a depth over all measured genes as T is.

Masked are 30 % of the input's nonzeros and 3 % of its zeros. Of these 80 % are hidden, 10 % show a random value (drawn
from all genes of the same cell's input, hidden ones included, since nothing more is published), 10 % are left as they
are.

One hash a gene serves all: as a number it says whether and how the gene is masked, and its lower half, digits that
matter there in one case of 2^32, thins.

Token ids: gene g is g; then T is V, S is V + 1.

Legend: B cells, V genes, N nonzeros, M masked positions, R of them that show a random value (Z among zeros), K draws
per cell, W words of two draws for its zeros, A counts in thinning, G groups of one probability.
"""

from typing import NamedTuple

import numpy as np

from cellmill.randomness import below, hash64, mixed_keys, next_key, next_mixed
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_within, join, log1p_cp10k, offsets_of, place_within, spread, sum_within

NONZERO_RATE, ZERO_RATE = 0.3, 0.03
HIDDEN_SHARE, RANDOM_SHARE = 0.8, 0.1
THINNED_SHARE = 0.5
MIN_COUNTS = 1000
"""Cells with fewer counts are never thinned."""
_LANES = np.array([0x0101010101010101 % 256**n for n in range(9)], np.uint64)
_FOUR_LANES = np.array([0x01010101 % 256**n for n in range(5)] + [0], np.uint32)
"""n bytes of 1."""
_GONE = 1
"""A gene of a cell of which thinning took all molecules; one more is a gene that the input has."""
_MANY = 2**16
"""Molecules of one gene that are too many to be compared one by one."""
_OWN = 5
"""Draws of a cell itself, in front of those of its zeros; they are hashed with numbers that no gene has."""
_VALUE, _REST = hash64("scfoundation value"), hash64("scfoundation rest")
"""What a gene's hash is hashed with for a random value, and for molecules that it does not decide."""


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
    hash_B = hash64("scfoundation", seed, -1 if step is None else step, cells.joinids)
    draws_BK = next_mixed(hash_B[:, None], mixed_keys(2**17)[2**16 :][: _OWN + (_n_draws(n_genes) + 1) // 2])
    hash_N = hash_within(hash_B, cells)
    counts_N, totals_B = thin(cells, hash_N, draws_BK)
    seen_N = counts_N > 0
    left = np.flatnonzero(seen_N)
    left_offsets = np.searchsorted(left, cells.offsets)
    values_N = log1p_cp10k(CellBatch(cells.joinids, cells.offsets, cells.genes, counts_N, totals_B))

    index_M = np.flatnonzero(seen_N & below(hash_N, NONZERO_RATE))
    genes = Genes(cells.joinids, np.searchsorted(index_M, cells.offsets), cells.genes.take(index_M))
    hidden_M, random_R, place_R = _show(genes.offsets, hash_N.take(index_M), NONZERO_RATE, left_offsets)
    nonzeros = Masked(genes, hidden_M, _raw_values(cells, genes.offsets, index_M))
    value_R = values_N[left[place_R]]

    genes, targets_M = _masked_zeros(cells, seen_N, n_genes, draws_BK[:, _OWN:])
    hidden_M, random_Z, place_Z = _show(genes.offsets, hash_within(hash_B, genes), 1, left_offsets)
    zeros, value_Z = Masked(genes, hidden_M, targets_M), values_N[left[place_Z]]

    # a zero that shows a random value is read by the encoder like a nonzero
    values_N[index_M[random_R]] = value_R
    shown = np.flatnonzero(seen_N & ~below(hash_N, NONZERO_RATE * HIDDEN_SHARE))
    parts = [np.searchsorted(shown, cells.offsets), np.searchsorted(random_Z, genes.offsets)]
    offsets, (at_nonzeros, at_zeros, at_depths) = join([*parts, 2 * np.arange(len(cells) + 1)])
    genes_N, out_N = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    genes_N[at_nonzeros], out_N[at_nonzeros] = cells.genes.take(shown), values_N.take(shown)
    genes_N[at_zeros], out_N[at_zeros] = genes.genes[random_Z], value_Z
    genes_N[at_depths], out_N[at_depths] = _depths(n_genes, cells.totals, totals_B)
    return MaskedCells(Encoded(Genes(cells.joinids, offsets, genes_N), out_N), nonzeros, zeros)


def _show(
    offsets: np.ndarray, hash_M: np.ndarray, rate: float, left_offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How masked positions are shown.

    Parameters
    ----------
    offsets
        Of the masked positions.
    hash_M
        Their hashes, all below `rate`.
    left_offsets
        Of the genes that the cells have.

    Returns
    -------
    bool [M], which are hidden; the places in M of those that show a random value, and the places of these values.
    """
    hidden_M = below(hash_M, rate * HIDDEN_SHARE)
    lengths_B = left_offsets[1:] - left_offsets[:-1]
    if not lengths_B.all():
        hidden_M |= spread(lengths_B == 0, offsets)  # there is no random value to show
    random_R = np.flatnonzero(~hidden_M & below(hash_M, rate * (HIDDEN_SHARE + RANDOM_SHARE)))
    cell_R = np.searchsorted(offsets, random_R, "right") - 1
    hash_R = next_mixed(hash_M[random_R], _VALUE)
    return hidden_M, random_R, left_offsets[cell_R] + (hash_R % lengths_B[cell_R].astype(np.uint64)).view(np.int64)


def _raw_values(cells: CellBatch, offsets: np.ndarray, index_M: np.ndarray) -> np.ndarray:
    """float32 [M], log1p(CP10k) at ascending places in the cells, whose offsets are `offsets`."""
    return log1p_cp10k(CellBatch(cells.joinids, offsets, cells.genes, cells.counts.take(index_M), cells.totals))


def _masked_zeros(cells: CellBatch, seen_N: np.ndarray, n_genes: int, draws_BW: np.ndarray) -> tuple[Genes, np.ndarray]:
    """Each gene that a cell does not have, or no more, with probability `ZERO_RATE`; its raw log1p(CP10k)."""
    first_B = np.arange(len(cells)) * n_genes
    position_N = cells.genes + spread(first_B, cells.offsets)  # in a flat [B * V]; ascending
    state = np.zeros(len(cells) * n_genes, np.uint8)
    state[position_N] = seen_N.view(np.uint8) + np.uint8(_GONE)
    offsets, genes_M = _zero_draws(draws_BW, n_genes)
    position_M = genes_M + spread(first_B, offsets)
    state_M = state.take(position_M)
    zero, gone = np.flatnonzero(state_M <= _GONE), np.flatnonzero(state_M == _GONE)
    targets_M = np.zeros(len(zero), np.float32)
    index = np.searchsorted(position_N, position_M[gone])
    targets_M[np.searchsorted(zero, gone)] = _raw_values(cells, np.searchsorted(gone, offsets), index)
    return Genes(cells.joinids, np.searchsorted(zero, offsets), genes_M.take(zero)), targets_M


def _n_draws(n_genes: int) -> int:
    """So many genes are drawn, with replacement, that each is drawn with probability `ZERO_RATE`."""
    return round(np.log1p(-ZERO_RATE) / np.log1p(-1 / n_genes)) if n_genes > 1 else 1


def _zero_draws(draws_BW: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and ids of genes, each of V in each cell with probability `ZERO_RATE`; ascending. Others cost nothing.

    `draws_BW` is uint64, random, two draws a number.
    """
    n_draws = _n_draws(n_genes)
    gene_BK = np.ascontiguousarray(draws_BW).view(np.uint32)[:, :n_draws].astype(np.uint64)
    gene_BK *= np.uint64(n_genes)
    gene_BK >>= np.uint64(32)
    gene_BK = gene_BK.astype(np.uint16)  # ids are 16 bits wide, and short integers sort fast
    gene_BK.sort(axis=1)
    is_new_BK = np.ones(gene_BK.shape, bool)
    np.greater(gene_BK[:, 1:], gene_BK[:, :-1], out=is_new_BK[:, 1:])
    new = np.flatnonzero(is_new_BK)
    return np.searchsorted(new, np.arange(len(draws_BW) + 1) * n_draws), gene_BK.ravel().take(new).astype(np.int32)


def _depths(n_genes: int, target_B: np.ndarray, source_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2 B], the tokens T and S of every cell, and their values."""
    tokens_B2, counts_B2 = np.empty((len(target_B), 2), np.int64), np.empty((len(target_B), 2))
    tokens_B2[:] = n_genes, n_genes + 1
    counts_B2[:, 0], counts_B2[:, 1] = target_B, source_B
    return tokens_B2.ravel(), np.log10(np.maximum(counts_B2, 1)).ravel()


def thin(cells: CellBatch, hash_N: np.ndarray, draws_BK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half of the cells of at least `MIN_COUNTS` counts lose molecules, the others none.

    Parameters
    ----------
    cells
        B cells.
    hash_N
        uint64 [N], the genes' hashes.
    draws_BK
        uint64, random: whether a cell is thinned, three for its share, one for its counts outside the vocabulary.

    Returns
    -------
    int32 [N], the counts that are left, some of them 0; int64 [B], the total counts that are left.
    """
    rows = np.flatnonzero(below(draws_BK[:, 0], THINNED_SHARE) & (cells.totals >= MIN_COUNTS))
    if not len(rows):
        return cells.counts, cells.totals
    offsets = offsets_of(cells.lengths[rows])
    # the second of three uniform numbers has the distribution Beta(2, 2); as 64 binary digits
    share = np.sort(draws_BK[rows, 1:4], axis=1)[:, 1]
    chosen = np.arange(offsets[-1]) + spread(cells.offsets[rows] - offsets[:-1], offsets)
    counts = cells.counts.take(chosen)
    outside = cells.totals[rows] - sum_within(offsets, counts)  # in genes outside the vocabulary
    left = binomial(
        np.concatenate([counts, outside]),
        np.concatenate([hash_N.take(chosen), draws_BK[rows, 4]]),
        np.concatenate([offsets, offsets[-1] + 1 + np.arange(len(rows))]),
        np.concatenate([share, share]),
    )
    counts_N, totals_B = cells.counts.copy(), cells.totals.copy()
    counts_N[chosen] = left[: len(chosen)]
    totals_B[rows] = left[len(chosen) :] + sum_within(offsets, left[: len(chosen)])
    return counts_N, totals_B


def binomial(counts_A: np.ndarray, hash_A: np.ndarray, offsets: np.ndarray, share_G: np.ndarray) -> np.ndarray:
    """How many of `counts_A` molecules are kept, each with its group's probability: exact binomial numbers, int64 [A].

    A molecule is kept if a random number is below the share. First only 8 binary digits of the two are compared, for
    several molecules in one word: up to four, as most genes have, with the lower half of the gene's hash. Molecules
    whose digits are equal to the share's get further ones, so probabilities are exact to 2^-64.

    Parameters
    ----------
    counts_A
        Non-negative integers.
    hash_A
        uint64, the keys of the draws; only the lower halves need be random.
    offsets
        int64 [G + 1], where the groups of one probability start.
    share_G
        uint64, the probabilities times 2^64.
    """
    lanes = _FOUR_LANES.take(counts_A, mode="clip")  # one byte for each molecule; none where they are more than four
    bytes_4A = hash_A.astype(np.uint32).view(np.uint8)
    fronts_4A = spread((share_G >> np.uint64(56)).astype(np.uint32) * _FOUR_LANES[4], offsets).view(np.uint8)
    kept_A = np.bitwise_count((bytes_4A < fronts_4A).view(np.uint32) & lanes).astype(np.int64)
    undecided_A = (bytes_4A == fronts_4A).view(np.uint32) & lanes
    rest = np.flatnonzero((undecided_A > 0) | (counts_A > 4))
    n, is_many = counts_A.take(rest), lanes.take(rest) == 0
    share = spread(share_G, np.searchsorted(rest, offsets))
    n = np.where(is_many, n, np.bitwise_count(undecided_A.take(rest)))
    share = np.where(is_many, share, share << np.uint64(8))
    kept_A[rest] += _binomial_of_many(n, share, next_mixed(hash_A.take(rest), _REST))
    return kept_A


def _binomial_of_many(n_A: np.ndarray, share_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """`binomial` of int64 `n_A`, most of them more than four; `share_A` is overwritten, and `n_A`.

    Of more than `_MANY` molecules as many are decided by one digit as random bits have ones, or zeros, until few are
    undecided.
    """
    kept_A = np.zeros(len(n_A), np.int64)
    many = np.flatnonzero(n_A > _MANY)
    for digit in range(64):
        if not len(many):
            break
        ones = _random_ones(n_A[many], next_key(hash_A[many], np.array([digit])))
        zeros, is_one = n_A[many] - ones, share_A[many] >> np.uint64(63) > 0
        kept_A[many] += np.where(is_one, zeros, 0)
        n_A[many] = np.where(is_one, ones, zeros)
        share_A[many] <<= np.uint64(1)
        many = many[n_A[many] > _MANY]
    n_A[many] = 0  # equal to the share in all of its digits, and so not below it

    # the others by words of eight molecules
    offsets = offsets_of((n_A + 7) >> 3)
    owner = spread(np.arange(len(n_A)), offsets)
    word = np.arange(offsets[-1]) - offsets.take(owner)
    left, share = np.minimum(n_A.take(owner) - 8 * word, 8), share_A.take(owner)
    hashes = next_mixed(hash_A.take(owner), mixed_keys(2**16).take(word + 64))
    lanes, bytes_8 = _LANES.take(left), hashes.view(np.uint8)
    fronts_8 = ((share >> np.uint64(56)) * _LANES[8]).view(np.uint8)
    kept = np.bitwise_count((bytes_8 < fronts_8).view(np.uint64) & lanes).astype(np.int64)
    undecided = np.bitwise_count((bytes_8 == fronts_8).view(np.uint64) & lanes)
    again = np.flatnonzero(undecided > 0)
    kept[again] += _kept(undecided[again], share[again] << np.uint64(8), hashes[again])
    return kept_A + sum_within(offsets, kept)


def _kept(n_A: np.ndarray, share_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """`binomial` of few molecules: each has a hash of its own."""
    offsets = offsets_of(n_A)
    hashes = next_key(spread(hash_A, offsets), place_within(offsets))
    return sum_within(offsets, hashes < spread(share_A, offsets))


def _random_ones(n_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """int64 [A], ones among `n_A` random bits, at least 64."""
    offsets = offsets_of((n_A + 63) // 64)
    word = place_within(offsets)
    unused = np.maximum((word + 1) * 64 - spread(n_A, offsets), 0).view(np.uint64)
    return sum_within(offsets, np.bitwise_count(next_key(spread(hash_A, offsets), word) >> unused))
