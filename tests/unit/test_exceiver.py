"""Exceiver on hand-made and real cells: its sizes, keys, modes of masking, objective, readings and imputation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.models.base import GeneStatistics, parameter_counts, total_loss
from cellmill.models.exceiver import Exceiver, Sizes
from cellmill.models.packing import Packing, uniform
from model_cells import assert_cells_are_independent, make_batch, real_statistics, train
from shard_cells import real_cells

N_GENES = 32_786
TINY = Sizes(width=16, n_latents=4, n_layers=2, n_heads=2, hidden=32)
MODES = ("paper", "released")


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


@pytest.fixture(scope="module")
def statistics(blood):
    return real_statistics(blood, N_GENES)


@pytest.fixture(scope="module", params=MODES)
def model(request, statistics):
    torch.manual_seed(0)
    return Exceiver(replace(TINY, mask_mode=request.param), N_GENES, statistics).eval()


def enough(model, cells):
    """The cells that training takes."""
    return cells.take(np.flatnonzero(cells.lengths >= 2 * int(model.n_hidden)))


def by_hand(mask_mode: str = "paper", median_genes: float = 14.0) -> Exceiver:
    """Five genes, no cell of the corpus expresses the last; two genes are hidden."""
    torch.manual_seed(0)
    nan = torch.full((5,), torch.nan)
    statistics = GeneStatistics(
        nonzero_cells=torch.tensor([5, 5, 5, 5, 0]),
        median_nonzero_cp10k=nan,
        mean_log1p_cp10k=torch.tensor([1.0, 2.0, 0.5, 0.0, torch.nan]),
        std_log1p_cp10k=torch.tensor([2.0, 0.1, 1.0, 0.0, torch.nan]),
        median_genes=torch.tensor(median_genes),
    )
    return Exceiver(replace(TINY, mask_mode=mask_mode), 5, statistics).eval()


def test_published_parameter_count():
    with torch.device("meta"):
        model = Exceiver(Exceiver.presets["published"], Exceiver.published_genes["published"])
    assert parameter_counts(model)["total"] == 243_891
    assert sum(parameter.numel() for parameter in model.prototype.parameters()) == 18_532


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1), ("small", 10), ("base", 50)])
def test_sizes_on_one_dial(preset, millions):
    with torch.device("meta"):
        counts = parameter_counts(Exceiver(Exceiver.presets[preset], 20_000))
    assert counts["without_embeddings"] == pytest.approx(millions * 1e6, rel=0.1)


@pytest.mark.parametrize("name", ["n_heads", "n_cross_heads"])
def test_heads_divide_the_width(name):
    with pytest.raises(CellmillError, match=f"width 16 is no multiple of {name} 3"):
        replace(TINY, **{name: 3})


def test_keys_by_hand():
    cells = make_batch([{0: 10, 1: 90, 3: 1, 4: 7}, {2: 4}, {}], totals=[1000, 1000, 0])
    inputs = by_hand("released").embed_inputs(cells)
    assert inputs["genes"].tolist() == [0, 1, 3, 2]
    assert inputs["layout"].lengths.tolist() == [3, 1, 0]
    expected = [(np.log(101) - 1) / 2 + 1, 11, np.log(11) + 1, np.log(41) - 0.5 + 1]
    np.testing.assert_allclose(inputs["values"], expected, rtol=1e-6)
    assert inputs["undetected"].int().tolist() == [[0, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1] * 5]
    assert "undetected" not in by_hand("paper").embed_inputs(cells)


def test_hidden_genes_by_hand():
    model = by_hand("released")
    assert model.n_hidden == 2
    cells = make_batch([{0: 10, 1: 20, 2: 3, 3: 1}, {0: 1, 1: 1, 2: 5}])  # the second has fewer than four genes
    inputs = model.pretrain_inputs(cells, seed=0, step=1)
    assert len(inputs["layout_asked"]) == 1
    assert inputs["asked"].shape == inputs["targets"].shape == (2,)
    asked = inputs["asked"].tolist()
    assert len(set(asked)) == 2
    assert sorted(inputs["genes"].tolist()) == sorted({0, 1, 2, 3} - set(asked)) + [5, 5]
    assert inputs["layout"].lengths.tolist() == [4]
    assert (inputs["values"][inputs["genes"] == 5] == 1).all()
    assert inputs["undetected"].tolist() == [[False] * 4 + [True]]  # hidden genes are detected ones
    whole = model.embed_inputs(cells.take([0]))["values"]
    assert torch.equal(inputs["targets"], whole[inputs["asked"]])


def test_genes_of_few_cells_are_not_read():
    rest = torch.ones(3)
    statistics = GeneStatistics(
        nonzero_cells=torch.tensor([60, 59, 100]),
        median_nonzero_cp10k=rest,
        mean_log1p_cp10k=torch.tensor([1.0, 0.5, 2.0]),
        std_log1p_cp10k=rest,
        median_genes=torch.tensor(14.0),
    )
    sizes = Sizes(width=4, n_latents=2, n_layers=1, n_heads=2, hidden=8, min_cells=60)
    model = Exceiver(sizes, 3, statistics).eval()
    cells = make_batch([{0: 3, 1: 5, 2: 1}])
    with pytest.raises(CellmillError, match="reads no gene: none is expressed by min_cells 101 training cells"):
        Exceiver(replace(sizes, min_cells=101), 3, statistics).embed_inputs(cells)
    assert model.embed_inputs(cells)["genes"].tolist() == [0, 2]
    with torch.inference_mode():
        asked = model.impute(model.impute_inputs(make_batch([{0: 3}]), np.array([[1, 2]])))
    assert float(asked.values_BQ[0, 0]) == 0.5  # its mean
    assert float(asked.values_BQ[0, 1]) != 2.0


@pytest.mark.parametrize("mask_mode", MODES)
def test_the_encoder_by_the_formula(mask_mode):
    """Each latent's attention over keys, one at a time and head by head; undetected genes as the mode says."""
    model = by_hand(mask_mode)
    cells = make_batch([{0: 10, 2: 3}])
    with torch.inference_mode():
        inputs = model.embed_inputs(cells)
        keys = [(gene, value, 0.0) for gene, value in zip(inputs["genes"], inputs["values"], strict=True)]
        if mask_mode == "released":
            zeros = {1: max(-1000.0, (0 - 2) / 0.1 + 1), 3: 1.0, 4: 1.0}
            keys += [(torch.tensor(gene), value, 1.0) for gene, value in zeros.items()]
        block, (heads, kept) = model.encoder, (4, 4)  # twice as many heads as the layers of the latents
        x = block.keys_norm(torch.stack([value * model.gene_embedding.weight[gene] for gene, value, _ in keys]))
        added = torch.tensor([added for _, _, added in keys])
        weight, bias = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3)
        q = (block.queries_norm(model.latents) @ weight[0].T + bias[0]).view(-1, heads, kept)
        k, v = ((x @ weight[i].T + bias[i]).view(-1, heads, kept) for i in (1, 2))
        attended = [
            torch.cat([(q[m, h] @ k[:, h].T / kept**0.5 + added).softmax(0) @ v[:, h] for h in range(heads)])
            for m in range(4)
        ]
        latents = model.latents + block.attention.out(torch.stack(attended))
        latents = latents + block.mlp(latents)
        for layer in model.layers:
            latents = layer(latents, uniform(1, 4))
        torch.testing.assert_close(model.encode(inputs), latents, atol=1e-5, rtol=1e-5)


def test_the_modes_differ_where_genes_are_undetected(statistics, blood):
    torch.manual_seed(0)
    paper = Exceiver(TINY, N_GENES, statistics).eval()
    released = Exceiver(replace(TINY, mask_mode="released"), N_GENES, statistics).eval()
    released.load_state_dict(paper.state_dict())
    cells = blood.take([0])
    a, b = (model.embed_cells(model.embed_inputs(cells)) for model in (paper, released))
    assert (a - b).abs().max() > 1e-3


def test_a_cell_does_not_depend_on_its_batch(model, blood):
    cells = enough(model, blood).take(np.arange(5))
    longest = blood.take([np.argmax(blood.lengths)])
    assert_cells_are_independent(model, type(blood).concatenate([cells, longest]), 3)


@pytest.mark.parametrize("packing", [Packing("padded"), Packing(grain=64)])
def test_layouts_agree_also_for_cells_without_keys(model, blood, packing):
    """Losses, gradients, latents and what is imputed; in the released mode every gene is a key."""
    few = make_batch([{}, {7: 1}])
    cells = type(blood).concatenate([few, enough(model, blood).take(np.arange(2))])
    asked_BQ = np.tile(np.arange(30), (4, 1))
    found = []
    for model.packing in (Packing(), packing):
        model.zero_grad()
        total_loss(model(model.pretrain_inputs(cells, seed=0, step=1), step=1)).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        with torch.inference_mode():
            embedded = model.embed_cells(model.embed_inputs(cells))
            found.append([embedded, model.impute(model.impute_inputs(cells, asked_BQ)).detection_BQ, *gradients])
    model.packing = Packing()
    model.zero_grad()
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_every_cell_has_an_embedding(model, blood):
    few = make_batch([{}, {7: 1}, {int(np.flatnonzero(~np.isfinite(model.mean.numpy()))[0]): 3}])
    embedded = model.embed_cells(model.embed_inputs(few))
    assert embedded.shape == (3, 64)
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded[0], embedded[2], atol=1e-5, rtol=1e-5)  # of an unknown gene nothing is read
    inputs = model.pretrain_inputs(few, seed=0, step=0)
    loss = total_loss(model(inputs))
    loss.backward()
    assert loss == 0
    model.zero_grad()


def test_hidden_genes_do_not_show(model, blood):
    """The latents are the same whatever the counts of the hidden genes."""
    cells = enough(model, blood).take([0])
    inputs = model.pretrain_inputs(cells, seed=0, step=None)
    hidden_N = np.isin(cells.genes, inputs["asked"].numpy())
    other = replace(cells, counts=np.where(hidden_N, cells.counts + 5, cells.counts))
    again = model.pretrain_inputs(other, seed=0, step=None)
    assert not torch.equal(inputs["targets"], again["targets"])
    assert torch.equal(model.encode(inputs), model.encode(again))


def test_poolings(model, blood):
    inputs = model.embed_inputs(blood.take([0, 1]))
    latents = model.encode(inputs)
    assert torch.equal(model.embed_cells(inputs), latents.reshape(2, 64))
    assert torch.equal(model.embed_cells(inputs, "mean"), latents.view(2, 4, 16).mean(1))
    with pytest.raises(CellmillError, match="no pooling 'cls'.*latents, mean"):
        model.embed_cells(inputs, "cls")


def test_genes_static_and_in_context(model, blood):
    assert model.embed_genes().shape == (N_GENES, 16)
    cells = blood.take([3, 5])
    with torch.inference_mode():
        inputs = model.embed_inputs(cells)
        states = model.gene_states(inputs)
        known = ~np.isnan(model.mean.numpy()[cells.genes])
        assert states.genes_N.tolist() == cells.genes[known].tolist()
        assert states.cells_N.tolist() == cells.cell_of[known].tolist()
        one = model.decode(inputs, states.genes_N[:1].repeat(2), uniform(2, 1))[0]
    torch.testing.assert_close(states.states_ND[0], one, atol=1e-5, rtol=1e-5)
    shared = np.intersect1d(*(cells.genes[slice(*cells.offsets[b : b + 2])] for b in (0, 1)))[0]
    of_shared = states.states_ND[states.genes_N == shared]
    assert (of_shared[0] - of_shared[1]).abs().max() > 1e-5


def test_imputation_is_the_objectives_answer(model, blood):
    """Asked for the genes that training hid, imputation gives the prediction that training made of them."""
    cells = enough(model, blood).take([0, 1, 2])
    inputs = model.pretrain_inputs(cells, seed=0, step=None)
    asked_BH = inputs["asked"].view(3, -1).numpy()
    hidden_N = (cells.genes[:, None] == asked_BH[cells.cell_of]).any(axis=1)
    offsets = np.concatenate([[0], np.cumsum(~hidden_N)])[cells.offsets]
    visible = replace(cells, offsets=offsets, genes=cells.genes[~hidden_N], counts=cells.counts[~hidden_N])
    with torch.inference_mode():
        error = model(inputs)["mse"].sum
        imputed = model.impute(model.impute_inputs(visible, asked_BH))
        std = torch.where(model.std == 0, 1.0, model.std)[inputs["asked"]]
        z = (imputed.detection_BQ.flatten() - model.mean[inputs["asked"]]) / std + 1
        alone = model.impute(model.impute_inputs(visible.take([1]), asked_BH[1:2]))
    torch.testing.assert_close((z - inputs["targets"]).square().sum(), error, rtol=1e-4, atol=0)
    torch.testing.assert_close(alone.values_BQ[0], imputed.values_BQ[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(imputed.values_BQ, imputed.detection_BQ.clamp(min=0))


def test_answers_are_exact_in_bfloat16(model, blood):
    """They hardly repeat, though bfloat16 has few numbers so near each other, and lie near those of float32."""
    asked_BQ = np.tile(np.arange(0, N_GENES, 200), (8, 1))
    inputs = model.impute_inputs(blood.take(np.arange(8)), asked_BQ)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        answers_Q = model._predict(inputs)
    with torch.inference_mode():
        exact_Q = model._predict(inputs)
    assert answers_Q.dtype == torch.float32
    torch.testing.assert_close(answers_Q, exact_Q, atol=0.05, rtol=0)
    assert len(answers_Q.unique()) > 0.9 * len(exact_Q.unique())


def test_statistics_are_asked_for():
    cells = make_batch([{0: 1}])
    with pytest.raises(CellmillError, match="no mean and standard deviation of genes"):
        Exceiver(TINY, 5).embed_inputs(cells)
    for median in (6.0, torch.nan):
        with pytest.raises(CellmillError, match="does not know how many genes to hide"):
            by_hand(median_genes=median).pretrain_inputs(cells, seed=0, step=0)


def test_statistics_come_back_with_the_weights():
    model, again = by_hand(), Exceiver(TINY, 5)
    again.load_state_dict(model.state_dict())
    cells = make_batch([{0: 10, 1: 20, 2: 3, 3: 1}])
    for name in ("values", "asked"):
        one, other = (m.pretrain_inputs(cells, seed=0, step=0)[name] for m in (model, again))
        assert torch.equal(one, other)


def test_trivial_baseline_by_hand():
    model = by_hand()
    counts = [{0: 10, 1: 20, 2: 3, 3: 1}, {0: 30, 1: 2, 2: 3, 3: 9}, {0: 1, 1: 1, 2: 5}]  # the last has too few genes
    values = model.embed_inputs(make_batch(counts[:2]))["values"].view(2, 4)
    trivial = model.fit_trivial([make_batch(counts)])
    overall = values.mean()
    torch.testing.assert_close(trivial[:4], (values.sum(0) + overall) / 3)
    torch.testing.assert_close(trivial[4], overall)
    inputs = {"asked": torch.tensor([0, 3]), "targets": trivial[[0, 3]] + torch.tensor([1.0, 2.0])}
    term = model.trivial_losses(inputs, trivial)["mse"]
    assert (term.sum.item(), term.count) == (pytest.approx(5), 2)


def test_learns_below_the_trivial_baseline(blood, statistics):
    torch.manual_seed(0)
    model = Exceiver(TINY, N_GENES, statistics)
    cells = enough(model, blood).take(np.arange(8))
    baseline = total_loss(
        model.trivial_losses(model.pretrain_inputs(cells, seed=0, step=None), model.fit_trivial([blood]))
    )
    assert train(model, cells, steps=120, learning_rate=1e-2) < 0.75 * baseline.item()
