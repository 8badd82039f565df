"""Each architecture's view on hand-computed cells, its rates on real ones, and its independence of the batch."""

from math import comb

import numpy as np
import pytest
from cellmill.randomness import hash64, unit
from cellmill.shards.batch import CellBatch
from cellmill.views import exceiver, geneformer, scfoundation, scgpt, scmulan
from cellmill.views.ragged import hash_genes
from model_cells import make_batch
from shard_cells import real_cells

N_GENES = 32_786
KEYS = {"seed": 0, "step": 3}
HIDDEN = 40


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


def scmulan_tokens() -> scmulan.Tokens:
    gene_V = np.full(N_GENES, -1, np.int32)
    gene_V[::5] = 1 + np.arange(len(gene_V[::5]))
    return scmulan.Tokens(gene_V, annotate=9000, describe=9001)


def words(cells: CellBatch, n: int, first: int) -> scmulan.Words:
    """Words that depend on the cell alone."""
    tokens = first + (cells.joinids[:, None] * 7 + np.arange(n)) % 50
    return scmulan.Words(n * np.arange(len(cells) + 1), tokens.ravel().astype(np.int32))


def per_cell(offsets: np.ndarray, *arrays: np.ndarray) -> list[tuple]:
    """For each cell the parts of ragged arrays."""
    pairs = zip(offsets[:-1], offsets[1:], strict=True)
    return [tuple(array[start:end].tolist() for array in arrays) for start, end in pairs]


def geneformer_cells(cells: CellBatch) -> list:
    median_V = np.where(np.arange(N_GENES) % 7, 1 + np.arange(N_GENES) % 5, np.nan).astype(np.float32)
    out = geneformer.pretrain(cells, median_V, limit=300, mask_rate=0.15, **KEYS)
    shown = out.ranks.genes.copy()
    shown[out.index_M] = out.shown_M
    ranks = geneformer.embed(cells, median_V, limit=300)
    return list(
        zip(per_cell(out.ranks.offsets, out.ranks.genes, shown), per_cell(ranks.offsets, ranks.genes), strict=True)
    )


def scgpt_cells(cells: CellBatch) -> list:
    out = scgpt.pretrain(cells, n_edges=50, limit=300, **KEYS)
    again = scgpt.embed(cells, n_edges=50, limit=300)
    trained = per_cell(out.genes.offsets, out.genes.genes, out.bins)
    embedded = per_cell(again.genes.offsets, again.genes.genes, again.bins)
    return list(zip(trained, out.perceived_B.tolist(), embedded, strict=True))


def scfoundation_cells(cells: CellBatch) -> list:
    out = scfoundation.pretrain(cells, n_genes=N_GENES, **KEYS)
    again = scfoundation.embed(cells, n_genes=N_GENES)
    masked = [per_cell(part.genes.offsets, part.genes.genes, part.hidden, part.targets) for part in out[1:]]
    encoded = [per_cell(part.genes.offsets, part.genes.genes, part.values) for part in (out.encoded, again)]
    return list(zip(*masked, *encoded, strict=True))


def exceiver_cells(cells: CellBatch) -> list:
    mean_V, std_V = np.linspace(0.1, 2, N_GENES).astype(np.float32), np.full(N_GENES, 0.5, np.float32)
    out = exceiver.pretrain(cells, mean_V, std_V, n_hidden=HIDDEN, **KEYS)
    again = exceiver.embed(cells, mean_V, std_V)
    shown = per_cell(out.shown.genes.offsets, out.shown.genes.genes, out.shown.values)
    embedded = per_cell(again.genes.offsets, again.values)
    return list(zip(shown, out.genes_BH.tolist(), out.targets_BH.tolist(), embedded, strict=True))


def scmulan_cells(cells: CellBatch) -> list:
    metadata, cell_types = words(cells, 4, 8000), words(cells, 2, 8500)
    out = scmulan.pretrain(cells, scmulan_tokens(), cell_types=cell_types, metadata=metadata, limit=100, **KEYS)
    again = scmulan.embed(cells, scmulan_tokens(), limit=100)
    trained, embedded = (per_cell(part.offsets, part.tokens, part.values) for part in (out, again))
    return list(zip(trained, out.targets_B.tolist(), out.task_B.tolist(), embedded, strict=True))


VIEWS = [geneformer_cells, scgpt_cells, scfoundation_cells, exceiver_cells, scmulan_cells]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__.partition("_")[0])
def test_a_cell_is_seen_the_same_alone_in_a_batch_and_in_any_order(view, blood):
    cells = blood.take(np.concatenate([np.arange(30), [np.argmax(blood.lengths), np.argmin(blood.lengths)]]))
    together = view(cells)
    assert len(together) == len(cells)
    backwards = np.arange(len(cells))[::-1]
    assert view(cells.take(backwards)) == together[::-1]
    for row in (0, 7, 30, 31):
        assert view(cells.take([row])) == [together[row]]
    assert view(cells.slice(3, 9)) == together[3:9]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__.partition("_")[0])
def test_cells_without_genes(view, blood):
    """Among others and alone, an empty cell and one of one gene are seen without an error."""
    tiny = make_batch([{}, {5: 2}, {}], totals=[0, 2, 3])
    mixed = CellBatch.concatenate([tiny, blood.slice(0, 2)])
    if view is exceiver_cells:  # leaves out cells of few genes
        mean_V = np.ones(N_GENES, np.float32)
        out = exceiver.pretrain(mixed, mean_V, mean_V, n_hidden=HIDDEN, **KEYS)
        assert out.shown.genes.joinids.tolist() == mixed.joinids[3:].tolist()
        assert exceiver.pretrain(tiny, mean_V, mean_V, n_hidden=HIDDEN, **KEYS).index_BH.shape == (0, HIDDEN)
        return
    assert view(mixed)[3:] == view(blood.slice(0, 2))
    assert view(mixed)[:3] == view(tiny)


# scFoundation


def test_scfoundation_embed_by_hand():
    cells = make_batch([{1: 10, 4: 90}, {}], totals=[1000, 0])
    out = scfoundation.embed(cells, n_genes=6)
    assert out.genes.genes.tolist() == [1, 4, 6, 7, 6, 7]
    assert out.genes.offsets.tolist() == [0, 4, 6]
    np.testing.assert_allclose(out.values, [np.log(101), np.log(901), 3, 3, 0, 0], rtol=1e-6)
    out = scfoundation.embed(cells, n_genes=6, target_counts=np.array([10_000, 100]))
    np.testing.assert_allclose(out.values[[2, 3, 4, 5]], [4, 3, 2, 0], rtol=1e-6)


def many_draws(cell: CellBatch, n: int) -> CellBatch:
    """One cell under `n` joinids, each with draws of its own."""
    cells = cell.take(np.zeros(n, np.int64))
    return CellBatch(np.arange(n), cells.offsets, cells.genes, cells.counts, cells.totals)


def thin(cells: CellBatch, *keys: int) -> tuple[np.ndarray, np.ndarray]:
    """As `scfoundation.pretrain` thins them."""
    own = hash64("scfoundation", *keys, cells.joinids[:, None], 2**16 + np.arange(5))
    return scfoundation.thin(cells, hash_genes(cells, "scfoundation", *keys), own)


def test_binomial_numbers_are_binomial():
    """Mean, variance and single probabilities, for every way in which counts are handled."""
    rng = np.random.default_rng(0)
    for count, share, draws in [
        *[(1, 0.3, 40_000), (2, 0.5, 40_000), (4, 0.25, 40_000), (5, 0.99, 40_000), (8, 1 / 257, 40_000)],
        *[(9, 0.5, 40_000), (64, 0.1, 20_000), (1000, 1 / 3, 4000), (200_000, 0.7, 200), (70_000, 0.01, 200)],
    ]:
        hashes = rng.integers(0, 2**64, draws, np.uint64)
        shares = np.array([int(share * 2**64)], np.uint64)
        kept = scfoundation.binomial(np.full(draws, count), hashes, np.array([0, draws]), shares)
        assert kept.min() >= 0
        assert kept.max() <= count
        variance = count * share * (1 - share)
        assert kept.mean() == pytest.approx(count * share, abs=4.5 * np.sqrt(variance / draws))
        assert kept.var() == pytest.approx(variance, rel=4.5 * np.sqrt(2 / draws) + 3 / (variance * draws) ** 0.5)
        assert (kept == 0).mean() == pytest.approx((1 - share) ** count, abs=0.01)
        assert (kept == count).mean() == pytest.approx(share**count, abs=0.01)
    counts = np.array([0, 1, 5, 9, 100, 100_000_000])
    keys = rng.integers(0, 2**64, 6, np.uint64)
    none, nearly_all, half = (
        scfoundation.binomial(counts, keys, np.array([0, 6]), np.array([share], np.uint64))
        for share in (0, 2**64 - 1, 2**63)
    )
    assert none.tolist() == [0] * 6
    assert nearly_all.tolist() == counts.tolist()
    assert half[5] == pytest.approx(5e7, abs=4.5 * 5000)


def test_scfoundation_thins_half_of_the_deep_cells(blood):
    deep = blood.take([int(np.argmax(blood.totals))])
    cells = many_draws(deep, 4000)
    counts, totals = thin(cells, 0, 1)
    share = totals / cells.totals
    thinned = share < 1
    assert thinned.mean() == pytest.approx(0.5, abs=0.04)
    # Beta(2, 2): mean 1/2, variance 1/20, and a fifth of all below 0.287
    assert share[thinned].mean() == pytest.approx(0.5, abs=0.025)
    assert share[thinned].var() == pytest.approx(0.05, abs=0.006)
    assert (share[thinned] < 0.2871).mean() == pytest.approx(0.2, abs=0.045)
    # every gene loses the same share, and counts outside the vocabulary do, too
    largest = int(np.argmax(deep.counts))
    of_gene = counts[cells.offsets[:-1] + largest] / deep.counts[largest]
    assert np.corrcoef(of_gene[thinned], share[thinned])[0, 1] > 0.95
    outside = CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, cells.totals + 5000)
    counts, totals = thin(outside, 0, 1)
    rest = (totals - np.add.reduceat(counts, cells.offsets[:-1], dtype=np.int64)) / 5000
    np.testing.assert_allclose(rest[thinned], share[thinned], atol=0.06)
    shallow = CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, np.full(4000, 999))
    assert thin(shallow, 0, 1)[0] is shallow.counts


def test_scfoundation_thins_every_gene_by_a_binomial_number_of_its_own(blood):
    """On real counts, small and large: mean and variance given the cell's share; independent of genes and of masks."""
    cells = blood.take(np.flatnonzero(blood.totals >= scfoundation.MIN_COUNTS)[:1500])
    hash_N = hash_genes(cells, "scfoundation", *KEYS.values())
    own = hash64("scfoundation", *KEYS.values(), cells.joinids[:, None], 2**16 + np.arange(5))
    kept, totals = scfoundation.thin(cells, hash_N, own)
    thinned = (totals < cells.totals)[cells.cell_of]
    assert np.array_equal(kept[~thinned], cells.counts[~thinned])
    share = (np.median(own[:, 1:4].astype(np.float64), axis=1) / 2**64)[cells.cell_of]
    fair = thinned & (share > 0.1) & (share < 0.9)
    counts, share = cells.counts, share[fair]
    residual = (kept[fair] - counts[fair] * share) / np.sqrt(counts[fair] * share * (1 - share))
    masked = unit(hash_N[fair]) < scfoundation.NONZERO_RATE
    classes = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 64), (65, 10**6)]
    for low, high in classes:
        of_class = (counts[fair] >= low) & (counts[fair] <= high)
        n = of_class.sum()
        assert n > 300
        assert abs(residual[of_class].mean()) * np.sqrt(n) < 4.5
        # a binomial number's fourth moment over its variance squared is at most 3 + 1 / variance
        assert abs(np.square(residual[of_class]).mean() - 1) * np.sqrt(n) < 4.5 * np.sqrt(2 + 1 / (0.09 * low))
        assert abs(residual[of_class & masked].mean()) * np.sqrt((of_class & masked).sum()) < 4.5
    neighbours = residual[1:] * residual[:-1]
    assert abs(neighbours.mean()) * np.sqrt(len(neighbours)) < 4.5
    for count in (1, 2, 3, 4, 5, 9):  # whole distributions, of shares between 0.3 and 0.7
        of_count = (counts[fair] == count) & (share > 0.3) & (share < 0.7)
        seen = np.bincount(kept[fair][of_count], minlength=count + 1)
        p = share[of_count]
        for k in range(count + 1):
            chance = comb(count, k) * p**k * (1 - p) ** (count - k)
            assert abs(seen[k] - chance.sum()) < 4.5 * np.sqrt((chance * (1 - chance)).sum()) + 1


def test_scfoundation_masks_at_the_published_rates(blood):
    cells = CellBatch.concatenate([blood.slice(0, 400)])
    n_genes = 20_000
    kept = cells.genes < n_genes
    offsets = np.concatenate([[0], np.cumsum(kept)])[cells.offsets]
    cells = CellBatch(cells.joinids, offsets, cells.genes[kept], cells.counts[kept], cells.totals)
    out = scfoundation.pretrain(cells, n_genes=n_genes, **KEYS)
    counts, totals = thin(cells, *KEYS.values())
    nonzeros, zeros = np.count_nonzero(counts), len(cells) * n_genes - np.count_nonzero(counts)
    assert len(out.nonzeros.hidden) / nonzeros == pytest.approx(0.3, abs=0.005)
    assert len(out.zeros.hidden) / zeros == pytest.approx(0.03, abs=0.0005)
    for part in out[1:]:
        assert part.hidden.mean() == pytest.approx(0.8, abs=0.01)
    for row, (encoded, nonzero, zero) in enumerate(
        zip(
            per_cell(out.encoded.genes.offsets, out.encoded.genes.genes, out.encoded.values),
            *(per_cell(part.genes.offsets, part.genes.genes, part.hidden, part.targets) for part in out[1:]),
            strict=True,
        )
    ):
        span = slice(*cells.offsets[row : row + 2])
        raw = dict(zip(cells.genes[span].tolist(), np.log1p(cells.counts[span] / cells.totals[row] * 1e4), strict=True))
        left = counts[span] > 0
        scale = 1e4 / totals[row]
        seen = dict(zip(cells.genes[span][left].tolist(), np.log1p(counts[span][left] * scale), strict=True))
        shown = dict(zip(*encoded, strict=True))
        assert encoded[0][-2:] == [n_genes, n_genes + 1]
        assert len(shown) == len(encoded[0])
        assert encoded[1][-2:] == pytest.approx([np.log10(cells.totals[row]), np.log10(totals[row])], rel=1e-6)
        masked = {gene: hide for part in (nonzero, zero) for gene, hide in zip(*part[:2], strict=True)}
        assert set(nonzero[0]) <= set(seen)
        assert not set(zero[0]) & set(seen)
        for part in (nonzero, zero):
            assert part[2] == pytest.approx([raw.get(gene, 0.0) for gene in part[0]], rel=1e-5)
        # unmasked nonzeros show themselves; hidden ones are not there; the others show a value of the cell
        values = np.array(sorted(seen.values()))
        for gene, value in seen.items():
            if gene not in masked:
                assert shown[gene] == pytest.approx(value, rel=1e-5)
            assert (gene in shown) == (not masked.get(gene, False))
        for gene in set(shown) - set(seen) - {n_genes, n_genes + 1}:
            assert masked[gene] is False
            assert np.abs(values - shown[gene]).min() < 1e-4
    others = ~out.zeros.hidden
    random_zeros = len(out.encoded.values) - 2 * len(cells) - (nonzeros - out.nonzeros.hidden.sum())
    assert random_zeros / others.sum() == pytest.approx(0.5, abs=0.03)
    assert (out.zeros.targets > 0).sum() > 100  # what thinning took away is asked for


# Exceiver


def test_exceiver_values_by_hand():
    cells = make_batch([{0: 10, 1: 90, 2: 5, 3: 1}], totals=[1000])
    mean_V, std_V = np.array([1, 2, np.nan, 0], np.float32), np.array([2, 0.1, np.nan, 0], np.float32)
    out = exceiver.embed(cells, mean_V, std_V)
    assert out.genes.genes.tolist() == [0, 1, 3]  # no training cell expresses gene 2
    np.testing.assert_allclose(out.values, [(np.log(101) - 1) / 2 + 1, 11, np.log(11) + 1], rtol=1e-6)
    assert exceiver.hidden_genes(1803.0) == 270


def test_exceiver_hides_a_fixed_number_of_detected_genes(blood):
    mean_V, std_V = np.ones(N_GENES, np.float32), np.ones(N_GENES, np.float32)
    whole = exceiver.embed(blood, mean_V, std_V)
    enough = blood.lengths >= 2 * 400
    assert 0 < enough.sum() < len(blood)
    out = exceiver.pretrain(blood, mean_V, std_V, n_hidden=400, **KEYS)
    assert out.shown.genes.joinids.tolist() == blood.joinids[enough].tolist()
    hidden = np.zeros(len(out.shown.values), bool)
    hidden[out.index_BH] = True
    assert hidden.sum() == 400 * enough.sum()
    assert (out.shown.genes.genes[hidden] == N_GENES).all()
    assert (out.shown.values[hidden] == 1).all()
    kept = blood.take(np.flatnonzero(enough))
    assert np.array_equal(out.shown.genes.genes[~hidden], kept.genes[~hidden])
    assert np.array_equal(out.genes_BH, kept.genes[out.index_BH])
    values = dict(zip(zip(blood.joinids[blood.cell_of], blood.genes, strict=True), whole.values, strict=True))
    assert out.targets_BH[0].tolist() == [values[kept.joinids[0], gene] for gene in out.genes_BH[0]]
    first_half = (out.index_BH - kept.offsets[:-1, None]) * 2 < kept.lengths[:, None]
    assert first_half.mean() == pytest.approx(0.5, abs=0.01)


# scMulan


def test_scmulan_bins_by_hand():
    # log1p(CP10k) of 9, 99, 999 and 9,999 per 10,000 are 1, 2, 3 and 4 times ln(10): shares 1/4 to 1 of the largest
    cells = make_batch([{0: 9, 1: 99, 2: 999, 3: 9999}, {}, {2: 5}], totals=[10_000, 0, 10])
    assert scmulan.bin_values(cells).tolist() == [3, 5, 8, 10, 10]


def test_scmulan_sentences_by_hand():
    tokens = scmulan.Tokens(np.array([3, -1, 1, 2], np.int32), end=0, annotate=90, describe=91)
    cells = make_batch([{0: 7, 1: 50, 2: 3, 3: 99}])
    out = scmulan.embed(cells, tokens)
    assert out.tokens.tolist() == [3, 2, 1, 90]
    assert out.values.tolist()[1] == 10
    assert out.values.tolist()[3] == 0
    assert scmulan.embed(cells, tokens, limit=3).tokens.tolist() == [3, 2, 90]
    metadata = scmulan.Words(np.array([0, 2]), np.array([70, 71], np.int32))
    cell_types = scmulan.Words(np.array([0, 1]), np.array([80], np.int32))
    seen = set()
    for step in range(30):
        out = scmulan.pretrain(cells, tokens, cell_types=cell_types, metadata=metadata, seed=0, step=step)
        task, said = int(out.task_B[0]), out.tokens.tolist()
        genes = said[3:6] if task == scmulan.GENERATE else said[:3]
        assert sorted(genes) == [1, 2, 3]
        rest = [token for token in said if token not in genes]
        assert rest == {0: [70, 71, 80, 0], 1: [90, 80, 0], 2: [91, 70, 71, 0]}[task]
        assert out.targets_B.tolist() == [{0: 4, 1: 2, 2: 3}[task]]
        assert dict(zip(said, out.values.tolist(), strict=True))[2] == 10
        assert all(out.values[said.index(token)] == 0 for token in rest)
        seen.add((task, tuple(genes)))
    assert {task for task, _ in seen} == {0, 1, 2}
    assert len(seen) > 10


def test_scmulan_sentences_of_real_cells(blood):
    metadata, cell_types = words(blood, 4, 8000), words(blood, 2, 8500)
    out = scmulan.pretrain(blood, scmulan_tokens(), cell_types=cell_types, metadata=metadata, limit=120, **KEYS)
    assert np.diff(out.offsets).max() == 120
    assert (np.bincount(out.task_B, minlength=3) / len(blood)).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert (out.tokens[out.offsets[1:] - 1] == 0).all()
    genes = out.tokens < 8000
    genes[out.offsets[1:] - 1] = False
    assert (out.values[genes] >= 1).all()
    assert (out.values[~genes] == 0).all()
