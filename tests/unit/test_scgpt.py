"""scGPT's view on hand-computed cells, its attention rule, and its independence of the batch on real cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.scgpt import PAD_VALUE, Scgpt
from model_cells import assert_cells_are_independent, make_batch, train
from shard_cells import real_cells

N_GENES = 32_786
TINY = Scgpt.Sizes(n_layers=2, width=16, n_heads=2, hidden=16, max_length=301, cell_prompt_after=10)


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Scgpt(TINY, N_GENES).eval()


def test_published_parameter_count():
    with torch.device("meta"):
        model = Scgpt(Scgpt.presets["whole-human"], Scgpt.published_genes["whole-human"])
    # the published number counts no flag embedding (2 x 512)
    assert parameter_counts(model)["total"] == 51_856_898 + 1_024


def test_bins_by_hand():
    """Five bins have edges at the quantiles 0, 1/3, 2/3 and 1."""
    model = Scgpt(replace(TINY, n_bins=5), 8)
    # counts 1 2 3 4 are the edges themselves: count k equals edge k only, so its bin is k
    assert model.bin_counts(make_batch([{0: 4, 1: 2, 2: 1, 3: 3}]), 0, 0).tolist() == [4, 2, 1, 3]
    # edges 1 1 1 4: the ones tie with three edges and are drawn from 1, 2, 3; the four lies in bin 4
    drawn = np.array([model.bin_counts(make_batch([{0: 1, 1: 1, 2: 1, 5: 4}]), 0, step) for step in range(600)])
    assert (drawn[:, 3] == 4).all()
    for gene in range(3):
        assert np.bincount(drawn[:, gene], minlength=5)[1:4] / 600 == pytest.approx(np.ones(3) / 3, abs=0.08)
        assert set(drawn[:, gene]) == {1, 2, 3}
    # one gene equals all four edges
    assert {model.bin_counts(make_batch([{3: 7}]), 0, step)[0] for step in range(100)} == {1, 2, 3, 4}


def test_bins_of_real_cells_are_quantiles(model, blood):
    bins = model.bin_counts(blood, 0, 0)
    assert bins.min() == 1
    assert bins.max() == 50
    for cell in range(0, len(blood), 20):
        span = slice(*blood.offsets[cell : cell + 2])
        counts = blood.counts[span]
        edges = np.quantile(counts, np.linspace(0, 1, 50))
        assert (bins[span] <= np.digitize(counts, edges)).all()
        assert (bins[span] >= np.minimum(np.digitize(counts, edges, right=True) + 1, np.digitize(counts, edges))).all()
        # drawing ties makes the bins nearly even: 50 bins, but the top edge is met by the largest count alone
        assert np.bincount(bins[span], minlength=51)[1:50].std() < 0.35 * len(counts) / 49
    assert bins.mean() == pytest.approx(25, abs=0.5)


def test_inputs_of_small_cells(model):
    cells = make_batch([{5: 3}, {}, {1: 1, 9: 2}], totals=[3, 0, 50])
    inputs = model.embed_inputs(cells)
    tokens, values = inputs["tokens"], inputs["values"]
    assert tokens.shape == values.shape == (3, 3)
    assert tokens[0].tolist() == [model.cls, 5, model.pad]
    assert tokens[1].tolist() == [model.cls, model.pad, model.pad]
    assert sorted(tokens[2].tolist()) == [1, 9, model.cls]
    assert (values[:, 0] == PAD_VALUE).all()
    assert (values[tokens == model.pad] == PAD_VALUE).all()
    assert (values[tokens < N_GENES] >= 1).all()
    embedded = model.embed_cells(inputs)
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    # one gene: floor(1 r) = 0 genes are hidden, whatever r
    loss = total_loss(model(model.pretrain_inputs(cells.take([0, 1]), seed=0, step=20), step=20))
    assert loss == 0
    loss.backward()


def test_long_cells_keep_a_random_subset(model, blood):
    cell = blood.take([int(np.argmax(blood.lengths))])
    assert len(cell.genes) > 300
    tokens = model.embed_inputs(cell)["tokens"]
    assert tokens.shape == (1, 301)
    kept = tokens[0, 1:].numpy()
    assert len(set(kept)) == 300
    assert set(kept) <= set(cell.genes)
    assert kept.mean() == pytest.approx(cell.genes.mean(), rel=0.15)
    assert torch.equal(model.embed_inputs(cell)["tokens"], tokens)
    other = model.pretrain_inputs(cell, seed=0, step=1)["tokens"]
    assert len(set(other[0, 1:].numpy()) & set(kept)) < 250


def test_bins_come_before_subsampling(model, blood):
    """A subset keeps the bins that its genes have among all genes of the cell."""
    cell = blood.take([int(np.argmax(blood.lengths))])
    inputs = model.embed_inputs(cell)
    bin_of = dict(zip(cell.genes, model.bin_counts(cell, "embed", 0), strict=True))
    assert inputs["values"][0, 1:].tolist() == [bin_of[gene] for gene in inputs["tokens"][0, 1:].tolist()]


def test_hidden_shares(model, blood):
    shares = []
    for step in range(60):
        inputs = model.pretrain_inputs(blood.take([0, 1, 2]), seed=0, step=step)
        n_genes = (inputs["tokens"] < N_GENES).sum(1)
        rows = torch.bincount(inputs["positions"] // inputs["tokens"].shape[1], minlength=3)
        share = next(r for r in (0.25, 0.5, 0.75) if torch.equal(rows, (n_genes * r).floor().long()))
        shares.append(share)
    assert {shares.count(r) >= 10 for r in (0.25, 0.5, 0.75)} == {True}
    inputs = model.pretrain_inputs(blood.take([0]), seed=0, step=None)
    assert len(inputs["targets"]) == 150


def test_hidden_bins_are_not_in_the_inputs(model, blood):
    inputs = model.pretrain_inputs(blood.take(np.arange(4)), seed=0, step=0)
    assert (inputs["values"].flatten()[inputs["positions"]] == PAD_VALUE).all()
    assert inputs["targets"].min() >= 1
    assert inputs["targets"].max() <= 50


def test_attention_rule(model, blood):
    """Perceived tokens see no hidden one; a hidden token sees the perceived ones and itself, no other hidden one."""
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    tokens = inputs["tokens"]
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden.view(-1)[inputs["positions"]] = True
    torch.manual_seed(1)
    x = torch.randn(*tokens.shape, 16)
    first, second = hidden[0].nonzero().flatten()[[0, 1]]
    perceived = (~hidden[0]).nonzero().flatten()[5]
    with torch.no_grad():
        h = model.encode(x, tokens, hidden)
        changed = (model.encode(x.index_put((torch.tensor(0), first), torch.ones(16)), tokens, hidden) - h).abs().sum(2)
        assert changed[0, first] > 1e-3
        changed[0, first] = 0
        assert changed.max() < 1e-6
        changed = (model.encode(x.index_put((torch.tensor(0), perceived), torch.ones(16)), tokens, hidden) - h).abs()
        assert (changed[0].sum(1) > 1e-6).all()
        assert changed[1].max() < 1e-6
    assert first != second


def test_terms_and_cell_prompt(model, blood):
    cells = blood.take([0, 1])
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    assert list(model(inputs, step=0)) == ["gep", "mvc"]
    assert list(model(inputs, step=9)) == ["gep", "mvc"]
    assert list(model(inputs, step=10)) == ["gep", "mvc", "gep_prompt"]
    assert list(model(inputs, step=None)) == ["gep", "mvc", "gep_prompt"]
    losses = model(inputs)
    assert losses["gep_prompt"].sum != losses["gep"].sum


def test_cell_prompt_gradient_stops_at_the_first_pass(blood):
    """<cls>'s input embedding reaches gep_prompt through the first pass alone, which is detached."""
    torch.manual_seed(0)
    model = Scgpt(TINY, N_GENES)
    losses = model(model.pretrain_inputs(blood.take([0]), seed=0, step=None))
    (gradient,) = torch.autograd.grad(losses["gep_prompt"].sum, model.gene_embedding.weight, retain_graph=True)
    assert gradient[model.cls].abs().sum() == 0
    (gradient,) = torch.autograd.grad(losses["gep"].sum, model.gene_embedding.weight)
    assert gradient[model.cls].abs().sum() > 0


def test_mvc_is_the_inner_product_of_the_paper(model, blood):
    """<W sigmoid(A e_j + b), h_cls>, written out for one cell."""
    inputs = model.pretrain_inputs(blood.take([0]), seed=0, step=None)
    hidden = torch.zeros_like(inputs["tokens"], dtype=torch.bool)
    hidden.view(-1)[inputs["positions"]] = True
    with torch.no_grad():
        genes = model.gene_norm(model.gene_embedding(inputs["tokens"]))
        flags = model.flag_embedding(torch.ones_like(inputs["tokens"]))
        x = genes + torch.where(hidden[..., None], flags, model.value_encoder(inputs["values"]))
        cls = model.encode(x, inputs["tokens"], hidden)[0, 0]
        query = model.mvc_weight(torch.sigmoid(model.mvc_query(genes[0][hidden[0]])))
        expected = ((query @ cls - inputs["targets"]) ** 2).sum()
        torch.testing.assert_close(model(inputs)["mvc"].sum, expected, rtol=1e-5, atol=0)


def test_released_gen_stream_skips_the_projection_of_hidden_genes(model, blood):
    quirk = Scgpt(replace(TINY, released_gen_stream=True), N_GENES).eval()
    quirk.load_state_dict(model.state_dict())
    inputs = model.pretrain_inputs(blood.take([0]), seed=0, step=None)
    a, b = model(inputs), quirk(inputs)
    assert a["gep"].sum != b["gep"].sum
    torch.testing.assert_close(a["mvc"].sum, b["mvc"].sum)  # <cls> sees perceived genes only
    inputs = model.embed_inputs(blood.take([0]))
    assert torch.equal(model.embed_cells(inputs), quirk.embed_cells(inputs))


def test_a_cell_does_not_depend_on_its_batch(model, blood):
    shortest, longest = np.argsort(blood.lengths)[[0, -1]]
    short = make_batch([{7: 2, 11: 1, 500: 1, 3000: 4}])
    cells = type(blood).concatenate([short, blood.take([shortest, longest, *range(4)])])
    assert_cells_are_independent(model, cells, 4)


def test_dropout_in_training_only(blood):
    torch.manual_seed(0)
    model = Scgpt(replace(TINY, dropout=0.2), N_GENES)
    inputs = model.embed_inputs(blood.take([0]))
    assert not torch.equal(model.train().embed_cells(inputs), model.embed_cells(inputs))
    assert torch.equal(model.eval().embed_cells(inputs), model.embed_cells(inputs))


def test_gene_embeddings(model):
    genes = model.embed_genes()
    assert genes.shape == (N_GENES, 16)
    torch.testing.assert_close(genes.mean(dim=1), torch.zeros(N_GENES), atol=1e-5, rtol=0)


def test_trivial_baseline_by_hand(model):
    # three different counts lie at the lowest, the middle and the highest edge: bins 1, 25 or 26, and 50
    cells = make_batch([{3: 1, 4: 5, 5: 9}, {3: 9, 6: 1, 5: 5}])
    bins_N = model.bin_counts(cells, "trivial")
    trivial = model.fit_trivial([cells])
    assert trivial[3] == (bins_N[0] + bins_N[3]) / 2
    assert trivial[4] == bins_N[1]
    assert trivial[7] == pytest.approx(bins_N.mean())  # no cell expresses gene 7
    batch = {
        "tokens": torch.tensor([[model.cls, 3, 4], [model.cls, 3, 5]]),
        "positions": torch.tensor([1, 4, 5]),
        "targets": trivial[[3, 3, 5]] + torch.tensor([1.0, 2.0, 3.0]),
    }
    losses = model.trivial_losses(batch, trivial)
    assert {name: (term.sum.item(), term.count.item()) for name, term in losses.items()} == dict.fromkeys(
        ("gep", "mvc", "gep_prompt"), (14, 3)
    )


def test_learns_below_the_trivial_baseline(blood):
    torch.manual_seed(0)
    cells = blood.take(np.arange(8))
    model = Scgpt(replace(TINY, dropout=0.0, max_length=101), N_GENES)
    validation = model.pretrain_inputs(cells, seed=0, step=None)
    untrained = total_loss(model(validation)).item()
    bins = validation["targets"]
    constant = 3 * (bins - bins.mean()).square().mean().item()
    assert train(model, cells, steps=100, learning_rate=1e-2) < constant < untrained
