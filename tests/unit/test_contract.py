"""What holds for every architecture: `cellmill.models.base.CellModel` is a promise to pretraining, embedding and tasks.

Cells are real ones of the pancreas, in a vocabulary of 3,000 genes with a cell type for each.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from cellmill.checkpoints import build_model, load_checkpoint, save_checkpoint
from cellmill.models import architectures, load_architecture
from cellmill.models.attention import attention_backend
from cellmill.models.base import CellModel, parameter_counts, total_loss
from cellmill.models.packing import Layout, Packing
from cellmill.recipes import ModelRecipe
from cellmill.shards.batch import CellBatch
from cellmill.shards.statistics import compute_statistics
from small_runs import META, N_GENES, make_corpus
from torch.utils.flop_counter import FlopCounterMode

PUBLISHED = {
    ("scgpt", "whole-human"): 51_856_898,
    ("scfoundation", "published"): 119_252_285,
    ("geneformer", "v1-10m"): 10_288_722,
    ("geneformer", "v2-104m"): 104_386_867,
    ("geneformer", "v2-316m"): 316_354_867,
    ("exceiver", "published"): 243_891,
    ("scmulan", "published"): 368_800_320,
}
DIAL = {"tiny": 1e6, "small": 10e6, "base": 50e6}
ASKED = 40
STEPS = (None, 3, 10**6)
"""Validation, and training before and after scGPT's second pass joins."""
PACKINGS = {"padded": Packing("padded"), "grain": Packing(grain=256)}


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


@pytest.fixture(scope="module")
def cells(corpus, statistics) -> CellBatch:
    """Cells of many lengths, among them the longest and the shortest."""
    cells = next(corpus.batches("train", 200, categories=statistics.categories))
    rows = np.unique(np.r_[:8, np.argmax(cells.lengths), np.argmin(cells.lengths)])
    return cells.take(rows)


@pytest.fixture(scope="module", params=architectures())
def model(request, statistics):
    return build_model(ModelRecipe(architecture=request.param), N_GENES, statistics, seed=1).eval()


def hidden(cells: CellBatch) -> tuple[CellBatch, np.ndarray]:
    """The cells without every fifth of their genes, and `ASKED` genes of each that they then do not show."""
    hidden_N = np.arange(len(cells.genes)) % 5 == 0
    lengths_B = np.bincount(cells.cell_of[~hidden_N], minlength=len(cells))
    offsets = np.concatenate([[0], np.cumsum(lengths_B)])
    shown = CellBatch(
        cells.joinids, offsets, cells.genes[~hidden_N], cells.counts[~hidden_N], cells.totals, cells.codes
    )
    asked = []
    for row in range(len(cells)):
        visible = shown.genes[offsets[row] : offsets[row + 1]]
        asked.append(np.setdiff1d(np.arange(N_GENES), visible)[:: N_GENES // 100][:ASKED])
    return shown, np.stack(asked)


@contextmanager
def packed_by(model: CellModel, packing: Packing) -> Iterator[None]:
    """Lay out cells in another way."""
    usual, model.packing = model.packing, packing
    try:
        yield
    finally:
        model.packing = usual


def losses_and_gradient(model: CellModel, cells: CellBatch, step: int | None) -> tuple[dict, torch.Tensor]:
    """Sums of a step's terms, and one vector of the gradients of all parameters."""
    model.zero_grad()
    terms = model(model.pretrain_inputs(cells, seed=1, step=step), step=step)
    total_loss(terms).backward()
    gradient = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()]
    )
    model.zero_grad()
    return {name: float(term.sum.detach()) for name, term in terms.items()}, gradient


def test_published_parameter_counts():
    for (name, preset), expected in PUBLISHED.items():
        model_class = load_architecture(name)
        with torch.device("meta"):
            model = model_class(
                model_class.presets[preset],
                model_class.published_genes[preset],
                categories=model_class.published_categories.get(preset),
            )
        assert parameter_counts(model)["total"] == expected, (name, preset)


@pytest.mark.parametrize("name", architectures())
def test_one_dial_of_sizes(name):
    """Tiny, small and base have the same number of parameters beside embeddings in every architecture."""
    model_class = load_architecture(name)
    for preset, expected in DIAL.items():
        with torch.device("meta"):
            counts = parameter_counts(model_class(model_class.presets[preset], 20_000))
        assert counts["without_embeddings"] == pytest.approx(expected, rel=0.1), (name, preset)


@pytest.mark.parametrize("name", ["geneformer", "scfoundation", "scgpt"])
def test_dropout_of_attention_weights(name):
    """The dial's sizes drop none, the published ones as they did; sizes that do not say it drop as other states."""
    model_class = load_architecture(name)
    for preset, sizes in model_class.presets.items():
        assert sizes.dropout_of_attention == (0.0 if preset in DIAL else sizes.dropout)
    kept = asdict(model_class.presets["demo"]) | {"dropout": 0.3}  # of a checkpoint
    for said, expected in ({"attention_dropout": 0.2}, 0.2), ({}, 0.3):
        sizes = model_class.Sizes(**{key: x for key, x in kept.items() if key != "attention_dropout"} | said)
        model = model_class(sizes, 50)
        dropouts = {layer.attention.dropout for layer in model.blocks() if layer.attention.dropout}
        assert dropouts == {expected}


def test_embeddings_do_not_depend_on_other_cells(model, cells):
    for pooling in model.poolings:
        with torch.inference_mode():
            together = model.embed_cells(model.embed_inputs(cells), pooling)
            backwards = model.embed_cells(model.embed_inputs(cells.take(np.arange(len(cells))[::-1])), pooling)
            torch.testing.assert_close(together, backwards.flip(0), atol=1e-5, rtol=1e-5)
            for row in range(len(cells)):
                alone = model.embed_cells(model.embed_inputs(cells.take([row])), pooling)
                torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
        assert together.dtype == torch.float32
        assert together.isfinite().all()
        assert together.std(0).max() > 0


def test_the_loss_is_a_sum_over_cells(model, cells):
    with torch.inference_mode():
        together = model(model.pretrain_inputs(cells, seed=1, step=None))
        alone = [model(model.pretrain_inputs(cells.take([row]), seed=1, step=None)) for row in range(len(cells))]
    for name, term in together.items():
        assert sum(float(terms[name].count) for terms in alone) == float(term.count) > 0
        summed = sum(float(terms[name].sum) for terms in alone)
        assert summed == pytest.approx(float(term.sum), rel=1e-5), name


def test_training_and_validation_draw_what_they_should(model, cells):
    """A step's inputs are a function of seed and step; another step hides other genes."""
    first, again, other = (model.pretrain_inputs(cells, seed=1, step=step) for step in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def same(one: dict, other: dict) -> bool:
    """Whether inputs are equal to the bit."""
    for name, value in one.items():
        if isinstance(value, Layout):
            equal = np.array_equal(value.lengths, other[name].lengths)
        else:
            equal = torch.equal(value, other[name])
        if not equal:
            return False
    return one.keys() == other.keys()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_layouts_give_the_same_losses_and_gradients(model, cells, packing, step):
    losses, gradient = losses_and_gradient(model, cells, step)
    with packed_by(model, packing):
        again, gradient_again = losses_and_gradient(model, cells, step)
    assert again == pytest.approx(losses, rel=1e-5)
    assert float((gradient - gradient_again).norm()) < 1e-5 * float(gradient.norm())


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_layouts_give_the_same_readings(model, cells, packing):
    shown, asked_BQ = hidden(cells)
    found = []
    for each in (model.packing, packing):
        with packed_by(model, each), torch.inference_mode():
            inputs = model.embed_inputs(cells)
            states = model.gene_states(inputs)
            found.append([model.embed_cells(inputs, pooling) for pooling in model.poolings])
            found[-1] += [*model.impute(model.impute_inputs(shown, asked_BQ)), *states]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [Packing(), *PACKINGS.values()], ids=["packed", *PACKINGS])
def test_views_of_no_cells(model, cells, packing):
    """A rank may be left without cells: losses are zero, of count zero, with gradients; readings are empty."""
    none, asked_BQ = cells.take([]), np.empty((0, ASKED), np.int64)
    with packed_by(model, packing):
        for step in STEPS:
            inputs = model.pretrain_inputs(none, seed=1, step=step)
            terms = model(inputs, step=step)
            total_loss(terms).backward()
            counts = model.loss_counts(inputs, step=step)
            for name, term in terms.items():
                assert float(term.sum.detach()) == float(term.count) == float(counts[name]) == 0
            assert model.body_flops(inputs, step=step) == 0
        with torch.inference_mode():
            inputs = model.embed_inputs(none)
            width = model.embed_cells(model.embed_inputs(cells.take([0]))).shape[1]
            for pooling in model.poolings:
                assert len(model.embed_cells(inputs, pooling)) == 0
            assert model.embed_cells(inputs).shape == (0, width)
            assert len(model.gene_states(inputs).states_ND) == 0
            for answers_BQ in model.impute(model.impute_inputs(none, asked_BQ)):
                assert answers_BQ.shape == asked_BQ.shape
    assert len(model.token_lengths(none)) == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients)
    model.zero_grad()


@pytest.mark.parametrize("step", STEPS)
def test_counts_are_known_before_the_loss(model, cells, step):
    inputs = model.pretrain_inputs(cells, seed=1, step=step)
    with torch.inference_mode():
        terms = model(inputs, step=step)
    counts = model.loss_counts(inputs, step=step)
    assert {name: float(count) for name, count in counts.items()} == {n: float(t.count) for n, t in terms.items()}


@pytest.mark.parametrize("step", STEPS)
def test_no_cell_takes_more_tokens_than_said(model, cells, step):
    """Of every layout that a cell's tokens pass the body in; what a cell is asked for passes its end alone."""
    lengths_B = model.token_lengths(cells)
    assert lengths_B.dtype == np.int64
    assert lengths_B.shape == (len(cells),)
    for row, length in enumerate(lengths_B):
        inputs = model.pretrain_inputs(cells.take([row]), seed=1, step=step)
        assert 0 < (inputs["layout"].n_tokens if "layout" in inputs else 1) <= length


def product_flops(*shapes, out_shape=None, **kwargs) -> int:
    """The operations of a product (its factors are the last two), 0 where its columns are the vocabulary."""
    return 0 if out_shape[-1] >= N_GENES else 2 * math.prod(out_shape) * shapes[-1][0]


@pytest.mark.parametrize("name", architectures())
def test_operations_of_the_body(name, cells, statistics):
    """Within 20 % of torch's count of a forward pass of the preset "small", cell by cell and without padding."""
    model = build_model(ModelRecipe(architecture=name, preset="small"), N_GENES, statistics, seed=1).eval()
    model.requires_grad_(False)
    mapping = dict.fromkeys((torch.ops.aten.mm, torch.ops.aten.addmm), product_flops)
    inputs = model.pretrain_inputs(cells.take(np.arange(2)), seed=1, step=10**6)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), attention_backend("reference"), counter:
        model(inputs, step=10**6)
    assert model.body_flops(inputs, step=10**6) == pytest.approx(counter.get_total_flops(), rel=0.2)


def test_bfloat16_gives_nearly_the_same_loss(model, cells):
    inputs = model.pretrain_inputs(cells, seed=1, step=3)
    with torch.inference_mode():
        exact = model(inputs, step=3)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(inputs, step=3)
    for name, term in exact.items():
        assert rounded[name].sum.dtype == torch.float32
        assert float(rounded[name].sum) == pytest.approx(float(term.sum), rel=0.02), name


def test_every_parameter_of_the_objective_learns(model, cells):
    model.zero_grad()
    model.train()
    total_loss(model(model.pretrain_inputs(cells, seed=1, step=10**6), step=10**6)).backward()
    model.eval()
    learning = sum(p.numel() for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0)
    model.zero_grad()
    assert learning > 0.5 * sum(p.numel() for p in model.parameters())


def test_hidden_genes_are_imputed_cell_by_cell(model, cells):
    shown, asked_BQ = hidden(cells)
    with torch.inference_mode():
        together = model.impute(model.impute_inputs(shown, asked_BQ))
        assert together.values_BQ.shape == together.detection_BQ.shape == asked_BQ.shape
        assert together.values_BQ.isfinite().all()
        assert together.detection_BQ.isfinite().all()
        for row in range(len(cells)):
            alone = model.impute(model.impute_inputs(shown.take([row]), asked_BQ[row : row + 1]))
            torch.testing.assert_close(alone.values_BQ[0], together.values_BQ[row], atol=1e-4, rtol=1e-4)
        padded_BQ = np.concatenate([asked_BQ, np.repeat(asked_BQ[:, :1], 5, axis=1)], axis=1)
        padded = model.impute(model.impute_inputs(shown, padded_BQ))
        for answers, same in zip(padded, together, strict=True):  # a gene asked twice is the same gene
            torch.testing.assert_close(answers[:, :ASKED], same, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(answers[:, -1], same[:, 0], atol=1e-4, rtol=1e-4)


def test_gene_embeddings(model, cells):
    static_VD = model.embed_genes()
    assert static_VD.shape[0] == N_GENES
    assert static_VD.dtype == torch.float32
    with torch.inference_mode():
        states = model.gene_states(model.embed_inputs(cells))
    assert len(states.cells_N) == len(states.genes_N) == len(states.states_ND) > 0
    assert states.states_ND.dtype == torch.float32
    assert states.states_ND.isfinite().all()
    expressed = set(zip(cells.cell_of.tolist(), cells.genes.tolist(), strict=True))
    assert set(zip(states.cells_N.tolist(), states.genes_N.tolist(), strict=True)) <= expressed


def test_the_trivial_baseline_answers_at_the_same_positions(model, corpus, cells, statistics):
    trivial = model.fit_trivial(corpus.batches("train", 100, categories=statistics.categories))
    inputs = model.pretrain_inputs(cells, seed=1, step=None)
    with torch.inference_mode():
        terms, trivial_terms = model(inputs, step=None), model.trivial_losses(inputs, trivial)
    assert terms.keys() == trivial_terms.keys()
    for name in terms:
        assert float(terms[name].count) == float(trivial_terms[name].count)
        assert math.isfinite(float(trivial_terms[name].sum))


def test_a_checkpoint_is_complete_without_the_corpus(model, cells, tmp_path):
    name = type(model).__module__.rpartition(".")[2]
    save_checkpoint(tmp_path, model, {"recipe": {"architecture": name}, "feature_ids": META["feature_ids"]})
    loaded, _ = load_checkpoint(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.embed_cells(loaded.embed_inputs(cells)), model.embed_cells(model.embed_inputs(cells)), atol=0, rtol=0
        )
        loss, again = (total_loss(m(m.pretrain_inputs(cells, seed=1, step=None))) for m in (model, loaded))
    assert float(loss) == float(again)
