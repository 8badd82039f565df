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

from cellmill.randomness import below, hash64, next_key
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_genes, log1p_cp10k, offsets_of, place_within, spread, sum_within

NONZERO_RATE, ZERO_RATE = 0.3, 0.03
HIDDEN_SHARE, RANDOM_SHARE = 0.8, 0.1
THINNED_SHARE = 0.5
MIN_COUNTS = 1000
"""Cells with fewer counts are never thinned."""
_LANES = np.array([0x0101010101010101 >> 8 * (8 - n) if n else 0 for n in range(9)] + [0], np.uint64)
_NONZERO, _GONE = 1, 2
"""A gene of a cell that the input has, and one of which thinning took all molecules."""


class Encoded(NamedTuple):
    """What the encoder reads."""

    genes: Genes
    """Ascending; the last two of each cell are T and S."""
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
    genes = Genes(cells.joinids, cells.offsets, cells.genes)
    return _with_depths(genes, log1p_cp10k(cells), n_genes, target_counts, cells.totals)


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
    at = np.searchsorted(position_N[shown], position_M[random_R])
    extra_B = np.bincount(np.searchsorted(offsets, random_R, side="right") - 1, minlength=len(cells))
    offsets = np.searchsorted(shown, seen.offsets) + offsets_of(extra_B)
    genes = Genes(cells.joinids, offsets, np.insert(seen.genes[shown], at, genes.genes[random_R]))
    values_N = np.insert(values_N[shown], at, value_R)
    return MaskedCells(_with_depths(genes, values_N, n_genes, cells.totals, totals_B), nonzeros, zeros)


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
    gene_BK = (hash_BK % np.uint64(n_genes)).astype(np.uint16)  # ids are 16 bits wide, and short integers sort fast
    gene_BK.sort(axis=1)
    is_new_BK = np.ones(gene_BK.shape, bool)
    is_new_BK[:, 1:] = gene_BK[:, 1:] > gene_BK[:, :-1]
    return (gene_BK + np.arange(len(joinids_B))[:, None] * n_genes).ravel()[np.flatnonzero(is_new_BK)]


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

    A molecule is kept if a random number is below the share, and both are compared from the front. Up to 8 molecules
    compare 8 binary digits each in one go. Then, and where there are more molecules, digit by digit: of n molecules
    that are still undecided as many are decided by the next digit as n random bits have ones, or zeros.

    Parameters
    ----------
    counts_A
        Non-negative integers.
    share_A
        uint64, the probabilities times 2^64.
    hash_A
        uint64, the keys of the draws.
    """
    lanes_A = _LANES[np.minimum(counts_A, 9)]  # one byte for each molecule
    bytes_A8 = hash_A.view(np.uint8).reshape(-1, 8)
    front_A1 = (share_A >> np.uint64(56)).astype(np.uint8)[:, None]
    kept_A = np.bitwise_count((bytes_A8 < front_A1).view(np.uint64)[:, 0] & lanes_A).astype(np.int64)
    equal_A = np.bitwise_count((bytes_A8 == front_A1).view(np.uint64)[:, 0] & lanes_A)
    many_A = counts_A > 8
    active = np.flatnonzero(many_A | (equal_A > 0))
    many, hashes = many_A[active], hash_A[active]
    n = np.where(many, counts_A[active], equal_A[active]).astype(np.int64)
    share = np.where(many, share_A[active], share_A[active] << np.uint64(8))
    for digit in range(64):
        if not len(active):
            break
        ones = _random_ones(n, next_key(hashes, np.array([digit])))
        is_one = (share << np.uint64(digit)).view(np.int64) < 0
        zeros = n - ones
        kept_A[active] += np.where(is_one, zeros, 0)
        n = np.where(is_one, ones, zeros)
        left = np.flatnonzero(n)
        active, n, share, hashes = active[left], n[left], share[left], hashes[left]
    return kept_A


def _random_ones(n_A: np.ndarray, hash_A: np.ndarray) -> np.ndarray:
    """int64 [A], ones among `n_A` (at least 1) random bits."""
    ones_A = np.bitwise_count(hash_A >> np.maximum(64 - n_A, 0).view(np.uint64)).astype(np.int64)
    large = np.flatnonzero(n_A > 64)
    if len(large):  # further words of 64 bits
        rest = n_A[large] - 64
        offsets = offsets_of((rest + 63) // 64)
        word = place_within(offsets)
        unused = np.maximum((word + 1) * 64 - spread(rest, offsets), 0).view(np.uint64)
        ones_A[large] += sum_within(offsets, np.bitwise_count(next_key(spread(hash_A[large], offsets), word) >> unused))
    return ones_A
