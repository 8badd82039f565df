"""The bag of genes: its views by hand and by their rates, its terms, readings and imputation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.models.bag import Bag, Sizes
from cellmill.models.base import parameter_counts, total_loss
from cellmill.shards.batch import CellBatch
from cellmill.views import bag as views
from cellmill.views.ragged import hash_genes
from model_cells import assert_cells_are_independent, make_batch, real_statistics, train
from shard_cells import real_cells
from torch.utils.flop_counter import FlopCounterMode

N_GENES = 32_786
TINY = Sizes(width=16, n_layers=2, hidden=24, bottleneck=8)
RATES = {"min_share": 0.1, "max_hidden": 0.5}


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


@pytest.fixture(scope="module")
def model(blood):
    torch.manual_seed(0)
    return Bag(TINY, N_GENES, real_statistics(blood, N_GENES)).eval()


def one_gene(count: int, n_cells: int) -> CellBatch:
    """`n_cells` cells of one gene and count."""
    ones = np.ones(n_cells, np.int64)
    return CellBatch(np.arange(n_cells), np.arange(n_cells + 1), 7 * ones, count * ones, count * ones)


# Views


def test_weights_by_hand():
    out = views.embed(make_batch([{0: 1, 3: 3}, {}, {2: 9}], totals=[1000, 0, 10]))
    values = np.log1p([2500, 7500])  # of the visible counts, not of the total
    np.testing.assert_allclose(out.weights, [*(values / np.sqrt((values**2).sum())), 1], rtol=1e-6)
    assert out.genes.offsets.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("count", [1, 5, 64, 65, 3000])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_thinned_counts_have_the_binomials_moments(count, share):
    n = 20_000
    cells = one_gene(count, n)
    kept = views.thin(cells, np.full(n, share), hash_genes(cells, "test"))
    assert kept.min() >= 0
    assert kept.max() <= count
    spread = np.sqrt(count * share * (1 - share))
    assert abs(kept.mean() - count * share) < 4.5 * spread / np.sqrt(n)
    assert kept.std() == pytest.approx(spread, rel=0.03)


def test_all_molecules_are_kept_at_a_share_of_one(blood):
    cells = blood.slice(0, 20)
    assert np.array_equal(views.thin(cells, np.ones(20), hash_genes(cells, "test")), cells.counts)


def test_the_share_is_log_uniform():
    """Of genes with one molecule as many are left as the share says: its logarithm is uniform from log 0.1 to 0."""
    n, genes = 2000, 800
    ones = np.ones(n * genes, np.int64)
    cells = CellBatch(np.arange(n), genes * np.arange(n + 1), np.tile(np.arange(genes), n), ones, np.full(n, genes))
    out = views.pretrain(cells, min_share=0.1, max_hidden=0.0, view=1, seed=0, step=5)
    log_share = np.log10(np.diff(out.genes.offsets) / genes)
    np.testing.assert_allclose(
        np.quantile(log_share, [0.1, 0.25, 0.5, 0.75, 0.9]), [-0.9, -0.75, -0.5, -0.25, -0.1], atol=0.04
    )
    none = views.pretrain(cells.slice(0, 200), min_share=1.0, max_hidden=0.0, view=1, seed=0, step=5)
    assert len(none.weights) == 200 * genes


def test_rates_over_ten_thousand_cells():
    """Of 500 molecules each gene keeps its cell's share; half of max_hidden are hidden."""
    n, genes = 10_000, 8
    counts = np.full(n * genes, 500)
    cells = CellBatch(
        np.arange(n), genes * np.arange(n + 1), np.tile(np.arange(genes), n), counts, np.full(n, 500 * genes)
    )
    out = views.pretrain(cells, **RATES, view=0, seed=0, step=3)
    hidden = 1 - np.diff(out.genes.offsets) / genes
    assert hidden.mean() == pytest.approx(0.25, abs=0.005)
    assert np.mean(hidden == 0) == pytest.approx(np.mean((1 - np.linspace(0, 0.5, 1000)) ** genes), abs=0.015)
    whole = views.pretrain(cells, min_share=0.1, max_hidden=0.0, view=0, seed=0, step=3)
    assert np.diff(whole.genes.offsets).min() == genes
    hash_N = hash_genes(cells, "test")
    shares = 0.1 ** np.random.default_rng(0).random(n)
    kept = views.thin(cells, shares, hash_N).reshape(n, genes).sum(1) / (500 * genes)
    np.testing.assert_allclose(kept, shares, atol=0.06)


def test_views_depend_on_view_seed_and_step_and_not_on_the_batch(blood):
    def weights(cells, **keys):
        keys = {"view": 0, "seed": 0, "step": 1} | keys
        return views.pretrain(cells, **RATES, **keys)

    cells = blood.take([0, 1, 2])
    one = weights(cells)
    assert np.array_equal(one.weights, weights(cells).weights)
    for other in ({"view": 1}, {"seed": 1}, {"step": 2}, {"step": None}):
        assert not np.array_equal(one.genes.genes, weights(cells, **other).genes.genes)
    alone = weights(cells.take([1]))
    span = slice(*one.genes.offsets[1:3])
    assert np.array_equal(alone.genes.genes, one.genes.genes[span])
    assert np.array_equal(alone.weights, one.weights[span])
    assert np.isin(alone.genes.genes, cells.genes[slice(*cells.offsets[1:3])]).all()


# Model


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1), ("small", 10), ("base", 50)])
def test_sizes_on_one_dial(preset, millions):
    with torch.device("meta"):
        counts = parameter_counts(Bag(Bag.presets[preset], 20_000))
    assert counts["without_embeddings"] == pytest.approx(millions * 1e6, rel=0.1)


def test_the_multinomial_term_by_hand(model):
    cells = make_batch([{3: 1, 9: 3}, {}, {5: 2}])
    with torch.inference_mode():
        inputs = model.pretrain_inputs(cells, seed=0, step=None)
        terms = model(inputs)
        z = model.bottleneck(model.trunk(inputs))
        log_share = (z @ model.output_embedding.weight.T + model.output_bias).log_softmax(1)
    expected = -(log_share[0, 3] + 3 * log_share[0, 9]) / 4 - log_share[2, 5]
    assert list(terms) == ["multinomial"]
    assert terms["multinomial"].count == 2
    torch.testing.assert_close(terms["multinomial"].sum, expected, rtol=1e-5, atol=0)


def test_counts_are_predicted_in_float32(model, blood):
    with torch.inference_mode():
        z = model.bottleneck(model.trunk(model.embed_inputs(blood.take([0, 1]))))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model._logits(z)
            from_bfloat16 = model._logits(z.bfloat16())
        weight, bias = model.output_embedding.weight, model.output_bias
        torch.testing.assert_close(logits, z @ weight.T + bias, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(from_bfloat16, z.bfloat16().float() @ weight.T + bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [None, 0])
def test_no_cells(model, step):
    cells, asked = make_batch([]), np.zeros((0, 3), np.int64)
    assert total_loss(model(model.pretrain_inputs(cells, seed=0, step=step), step=step)) == 0
    assert model.embed_cells(model.embed_inputs(cells)).shape == (0, 16)
    assert model.impute(model.impute_inputs(cells, asked)).values_BQ.shape == (0, 3)


def test_the_contrast_by_hand(model, blood):
    cells = blood.take([0, 1, 2])
    with torch.no_grad():
        inputs = model.pretrain_inputs(cells, seed=0, step=0)
        terms = model(inputs, step=0)
        z = model.bottleneck(model.trunk(inputs)).double()
        z = z / z.norm(dim=1, keepdim=True)
    expected = 0
    for a, b in ((z[:3], z[3:]), (z[3:], z[:3])):
        for i in range(3):
            similar = (b @ a[i] / 0.1).exp()
            expected -= (similar[i] / similar.sum()).log()
    assert terms["contrast"].count == terms["multinomial"].count == 6
    torch.testing.assert_close(terms["contrast"].sum.double(), expected, rtol=1e-4, atol=0)
    half = Bag(replace(TINY, contrast_weight=0.5), N_GENES).eval()
    half.load_state_dict(model.state_dict())
    torch.testing.assert_close(half(inputs)["contrast"].sum * 2, terms["contrast"].sum)
    assert list(Bag(replace(TINY, contrast_weight=0.0), N_GENES)(inputs)) == ["multinomial"]


def test_what_the_engine_asks(model, blood):
    """Counts as forward's, products by torch's own counter, usual batches in one micro batch."""
    cells = blood.take(np.arange(5))
    for step in (None, 0):
        inputs = model.pretrain_inputs(cells, seed=0, step=step)
        counts, terms = model.loss_counts(inputs, step=step), model(inputs, step=step)
        assert {name: int(count) for name, count in counts.items()} == {n: int(t.count) for n, t in terms.items()}
    with FlopCounterMode(display=False) as counter:
        model.bottleneck(model.trunk(inputs))
    assert model.body_flops(inputs, step=0) == counter.get_total_flops() > 0
    with torch.device("meta"):
        usual = Bag(Bag.presets["base"], 60_000)
    assert usual.token_lengths(blood.slice(0, 256)).sum() <= 16_384


def test_the_contrast_alone_depends_on_the_cut(model, blood):
    """Two micro batches of two cells: the multinomial adds, the contrast names a cell among two instead of four."""
    with torch.no_grad():
        whole, *halves = (
            model(model.pretrain_inputs(blood.take(rows), seed=0, step=0), step=0)
            for rows in ([0, 1, 2, 3], [0, 1], [2, 3])
        )
    sums = {name: float(sum(half[name].sum for half in halves)) for name in whole}
    assert sums["multinomial"] == pytest.approx(float(whole["multinomial"].sum), rel=1e-5)
    assert sums["contrast"] < float(whole["contrast"].sum) - 1


def test_the_state_is_the_weighted_sum(model, blood):
    inputs = model.embed_inputs(blood.take([0]))
    whole = (inputs["weights"][:, None] * model.gene_embedding(inputs["genes"])).sum(0)
    expected = torch.nn.functional.gelu(model.state_norm(whole))
    torch.testing.assert_close(model.embed_cells(inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_cell_does_not_depend_on_its_batch(model, blood):
    shortest, longest = np.argsort(blood.lengths)[[0, -1]]
    assert_cells_are_independent(model, blood.take([shortest, longest, *range(5)]), 4)


def test_an_empty_cell(model):
    cells = make_batch([{}])
    assert torch.equal(model.embed_cells(model.embed_inputs(cells)), torch.zeros(1, 16))
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    assert inputs["starts"].tolist() == [0, 0]
    assert total_loss({"multinomial": model(inputs)["multinomial"]}) == 0


def test_poolings(model, blood):
    inputs = model.embed_inputs(blood.take([0, 1]))
    state, trunk, bottleneck = (model.embed_cells(inputs, pooling) for pooling in model.poolings)
    assert torch.equal(state, model.embed_cells(inputs))
    assert state.shape == trunk.shape == (2, 16)
    assert bottleneck.shape == (2, 8)
    assert not torch.equal(state, trunk)
    with pytest.raises(CellmillError, match="no pooling 'cls'.*state, trunk, bottleneck"):
        model.embed_cells(inputs, "cls")


def test_genes_static_and_by_their_value(model, blood):
    genes = model.embed_genes()
    assert genes.shape == (N_GENES, 16)
    cells = blood.take([4, 2])
    states = model.gene_states(model.embed_inputs(cells))
    assert states.genes_N.tolist() == cells.genes.tolist()
    assert states.cells_N.tolist() == cells.cell_of.tolist()
    weights = torch.from_numpy(views.embed(cells).weights)
    torch.testing.assert_close(states.states_ND, weights[:, None] * genes[states.genes_N])


def test_imputation_by_hand(model, blood):
    cells = replace(blood.take([0, 1]), totals=np.array([500, 40_000]))
    asked = np.array([[1, 2, 30_000], [4, 2, 31_000]])
    with torch.inference_mode():
        inputs = model.impute_inputs(cells, asked)
        imputed = model.impute(inputs)
        share = model._logits(model.bottleneck(model.trunk(inputs))).softmax(1).double()
        alone = model.impute(model.impute_inputs(cells.take([1]), asked[1:]))
    for row, total in enumerate((500, 40_000)):
        for place, gene in enumerate(asked[row]):
            count = share[row, gene].item() * total
            mean = count / (1 - np.exp(-count))  # of a Poisson number, where it is not zero
            assert imputed.values_BQ[row, place].item() == pytest.approx(np.log1p(mean / total * 1e4), rel=1e-3)
            assert imputed.detection_BQ[row, place].item() == pytest.approx(np.log(count), abs=1e-3)
    torch.testing.assert_close(alone.values_BQ[0], imputed.values_BQ[1], atol=1e-5, rtol=1e-5)


def test_the_output_starts_at_the_corpus(blood):
    statistics = real_statistics(blood, N_GENES)
    bias = Bag(TINY, N_GENES, statistics).output_bias
    assert bias.isfinite().all()
    seen = statistics.nonzero_cells > 0
    assert bias[seen].min() > bias[~seen].max()


def test_trivial_baseline_by_hand():
    model = Bag(TINY, 4)
    trivial = model.fit_trivial([make_batch([{0: 1, 1: 3}, {}]), make_batch([{0: 7}])])
    torch.testing.assert_close(trivial.exp(), torch.tensor([1.5, 1.0, 0.25, 0.25]) / 3)
    inputs = model.pretrain_inputs(make_batch([{1: 1, 2: 3}, {0: 2}]), seed=0, step=None)
    term = model.trivial_losses(inputs, trivial)["multinomial"]
    assert term.sum.item() == pytest.approx(-(np.log(1 / 3) / 4 + 0.75 * np.log(1 / 12)) - np.log(0.5))
    assert term.count == 2


def test_learns_below_the_trivial_baseline(blood):
    torch.manual_seed(0)
    cells = blood.take(np.arange(8))
    model = Bag(TINY, N_GENES, real_statistics(blood, N_GENES))
    baseline = total_loss(
        model.trivial_losses(model.pretrain_inputs(cells, seed=0, step=None), model.fit_trivial([cells]))
    )
    assert train(model, cells, steps=40, learning_rate=1e-2) < baseline.item() - 0.1
