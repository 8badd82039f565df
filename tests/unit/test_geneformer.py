"""Geneformer's view on hand-computed cells, its masking rates and its independence of the batch on real ones."""

import numpy as np
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.geneformer import CLS, EOS, MASK, PAD, Geneformer
from model_cells import assert_cells_are_independent, make_batch, real_statistics, statistics_of_medians, train
from shard_cells import real_cells

N_GENES = 32_786
TINY = {"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 32}


def tiny(version: str, max_length: int, medians) -> Geneformer:
    sizes = Geneformer.Sizes(version=version, max_length=max_length, **TINY)
    return Geneformer(sizes, len(medians), statistics_of_medians(medians)).eval()


@pytest.fixture(scope="module")
def blood(data):
    return real_cells(data, "celltypist_sample")[0]


@pytest.fixture(scope="module", params=["V1", "V2"])
def model(request, blood):
    torch.manual_seed(0)
    sizes = Geneformer.Sizes(version=request.param, max_length=512, **TINY)
    return Geneformer(sizes, N_GENES, real_statistics(blood, N_GENES))


@pytest.mark.parametrize(
    ("preset", "millions"), [("v1-10m", 10.29), ("v2-104m", 104.39), ("v2-316m", 316.35)], ids=lambda value: str(value)
)
def test_published_parameter_counts(preset, millions):
    with torch.device("meta"):
        model = Geneformer(Geneformer.presets[preset], Geneformer.published_genes[preset])
    assert round(parameter_counts(model)["total"] / 1e6, 2) == millions


def test_ranks_by_hand():
    # gene:      0    1    2    3    4 (no median: no cell of the corpus expresses it, so it is no token)
    medians = [1.0, 2.0, 0.5, 4.0, np.nan]
    cells = make_batch(
        [
            {0: 3, 1: 8, 2: 2, 3: 4, 4: 99},  # values 3, 4, 4, 1: genes 1 and 2 tie and go by id
            {3: 1},  # one gene
            {},  # total 0
            {4: 1},  # total 1, no gene in the vocabulary
        ]
    )
    v1 = tiny("V1", 8, medians).embed_inputs(cells)["tokens"]
    assert v1.tolist() == [[3, 4, 2, 5], [5, PAD, PAD, PAD], [PAD] * 4, [PAD] * 4]
    v2 = tiny("V2", 8, medians).embed_inputs(cells)["tokens"]
    assert v2.tolist() == [
        [CLS, 5, 6, 4, 7, EOS],
        [CLS, 7, EOS, PAD, PAD, PAD],
        [CLS, EOS, PAD, PAD, PAD, PAD],
        [CLS, EOS, PAD, PAD, PAD, PAD],
    ]


def test_truncation_keeps_the_highest_ranks():
    medians = [1.0] * 6
    cells = make_batch([{gene: 10 + gene for gene in range(6)}])
    assert tiny("V1", 4, medians).embed_inputs(cells)["tokens"].tolist() == [[7, 6, 5, 4]]
    assert tiny("V2", 4, medians).embed_inputs(cells)["tokens"].tolist() == [[CLS, 9, 8, EOS]]


def test_medians_are_asked_for():
    sizes = Geneformer.Sizes(version="V1", max_length=8, **TINY)
    with pytest.raises(CellmillError, match="no gene medians; build it with the corpus statistics"):
        Geneformer(sizes, 3).embed_inputs(make_batch([{0: 1}]))
    with pytest.raises(CellmillError, match="of 2 genes and the vocabulary has 3"):
        Geneformer(sizes, 3, statistics_of_medians([1.0, 1.0]))


def test_medians_come_back_with_the_weights():
    model = tiny("V1", 8, [1.0, 2.0, np.nan])
    again = Geneformer(model.sizes, 3)
    again.load_state_dict(model.state_dict())
    cells = make_batch([{0: 1, 1: 3, 2: 5}])
    assert torch.equal(again.embed_inputs(cells)["tokens"], model.embed_inputs(cells)["tokens"])


def test_the_total_of_unmeasured_genes_does_not_change_the_order():
    cells = [{0: 3, 1: 8, 2: 2, 3: 4}]
    model = tiny("V1", 8, [1.0, 2.0, 0.5, 4.0])
    a, b = (model.embed_inputs(make_batch(cells, totals))["tokens"] for totals in ([17], [100_003]))
    assert torch.equal(a, b)


def test_an_empty_cell_has_a_zero_embedding_in_v1_and_cls_in_v2():
    cells = make_batch([{}, {0: 1}])
    v1 = tiny("V1", 8, [1.0, 1.0])
    embedded = v1.embed_cells(v1.embed_inputs(cells))
    assert torch.equal(embedded[0], torch.zeros(16))
    assert embedded[1].abs().sum() > 0
    v2 = tiny("V2", 8, [1.0, 1.0])
    embedded = v2.embed_cells(v2.embed_inputs(cells))
    assert embedded.isfinite().all()
    assert embedded[0].abs().sum() > 0
    for model in (v1, v2):
        loss = total_loss(model(model.pretrain_inputs(cells.take([0]), seed=0, step=0)))
        loss.backward()
        assert loss == 0


def test_ranks_of_real_cells_are_those_of_the_formula(model, blood):
    """Count over total over median, as the paper writes it, sorted cell by cell."""
    tokens = model.embed_inputs(blood.take(np.arange(20)))["tokens"].numpy()
    medians = model.medians.numpy()
    first = 1 if model.sizes.version == "V2" else 0
    for row in range(20):
        span = slice(*blood.offsets[row : row + 2])
        genes = blood.genes[span]
        value = (blood.counts[span] / medians[genes]).astype(np.float32)
        expected = genes[np.argsort(-value, kind="stable")][: 512 - 2 * first]
        assert np.array_equal(tokens[row, first : first + len(expected)], expected + model.n_specials)


def test_masking_rates_on_real_cells(model, blood):
    clean = model.embed_inputs(blood)["tokens"]
    inputs = model.pretrain_inputs(blood, seed=0, step=5)
    n_genes = (clean >= model.n_specials).sum().item()
    assert n_genes > 200_000
    shown, true = inputs["tokens"].flatten()[inputs["positions"]], inputs["targets"]
    assert torch.equal(true, clean.flatten()[inputs["positions"]])
    assert (true >= model.n_specials).all()
    assert len(true) / n_genes == pytest.approx(0.15, abs=0.003)
    assert (shown == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (shown == true).float().mean().item() == pytest.approx(0.1, abs=0.01)
    random = shown[(shown != MASK) & (shown != true)]
    assert len(random) / len(true) == pytest.approx(0.1, abs=0.01)
    assert random.min() >= model.n_specials
    assert random.double().mean().item() == pytest.approx(model.n_specials + N_GENES / 2, rel=0.03)
    # nothing but the chosen positions changed
    restored = inputs["tokens"].flatten().index_copy(0, inputs["positions"], inputs["targets"])
    assert torch.equal(restored, clean.flatten())


def test_masks_depend_on_seed_and_step_and_not_on_the_batch(model, blood):
    cells = blood.take(np.arange(6))
    one = model.pretrain_inputs(cells, seed=0, step=1)
    assert torch.equal(one["targets"], model.pretrain_inputs(cells, seed=0, step=1)["targets"])
    for other in ({"seed": 1, "step": 1}, {"seed": 0, "step": 2}, {"seed": 0, "step": None}):
        assert not torch.equal(one["targets"][:50], model.pretrain_inputs(cells, **other)["targets"][:50])
    alone = model.pretrain_inputs(blood.take([3]), seed=0, step=1)["tokens"]
    assert torch.equal(alone[0], one["tokens"][3, : alone.shape[1]])


def test_a_cell_does_not_depend_on_its_batch(model, blood):
    shortest, longest = np.argsort(blood.lengths)[[0, -1]]
    assert_cells_are_independent(model, blood.take([shortest, longest, *range(5)]), 4)


def test_embedding_is_read_before_the_last_layer(model, blood):
    inputs = model.embed_inputs(blood.take([0, 1]))
    with torch.no_grad():
        before = model.eval().embed_cells(inputs)
        kept = model.layers[-1].output.weight.clone()
        model.layers[-1].output.weight.zero_()
        assert torch.equal(model.embed_cells(inputs), before)
        model.layers[-1].output.weight.copy_(kept)


def test_poolings(model, blood):
    inputs = model.embed_inputs(blood.take([0]))
    if model.sizes.version == "V2":
        assert model.poolings[0] == "cls"
        assert not torch.equal(model.embed_cells(inputs, "mean"), model.embed_cells(inputs))
    else:
        assert model.poolings == ("mean",)
        with pytest.raises(CellmillError, match="no pooling 'cls'.*one of mean"):
            model.embed_cells(inputs, "cls")


def test_gene_embeddings(model):
    assert model.embed_genes().shape == (N_GENES, 16)
    assert torch.equal(model.embed_genes()[0], model.word_embeddings.weight[model.n_specials])


def test_trivial_baseline_by_hand():
    model = tiny("V1", 8, [1.0, 1.0, 1.0])
    batch = {"tokens": torch.tensor([[2, 1, 0]]), "positions": torch.tensor([1]), "targets": torch.tensor([3])}
    trivial = model.fit_trivial([make_batch([{0: 2, 1: 1}, {0: 7}])])  # genes 0, 1, 0, and one more of each
    torch.testing.assert_close(trivial.exp(), torch.tensor([3.0, 2.0, 1.0]) / 6)
    term = model.trivial_losses(batch, trivial)["mlm"]
    assert term.sum.item() == pytest.approx(np.log(3))
    assert term.count == 1


def test_learns_below_the_trivial_baseline(blood):
    torch.manual_seed(0)
    cells = blood.take(np.arange(8))
    model = Geneformer(Geneformer.Sizes(version="V1", max_length=64, **TINY), N_GENES, real_statistics(blood, N_GENES))
    trivial = model.fit_trivial([cells])
    baseline = total_loss(model.trivial_losses(model.pretrain_inputs(cells, seed=0, step=None), trivial))
    assert train(model, cells, steps=60, learning_rate=1e-2) < baseline.item()
