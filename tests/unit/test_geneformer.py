"""Geneformer's view on hand-computed cells, its masking rates and its independence of the batch on real ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cellmill.errors import CellmillError
from cellmill.models import geneformer
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.geneformer import CLS, EOS, MASK, PAD, Geneformer
from cellmill.models.packing import PACKED, Packing
from cellmill.models.vocabulary_head import vocabulary_loss
from cellmill.randomness import unit
from cellmill.shards.batch import CellBatch
from cellmill.views import geneformer as views
from cellmill.views.ragged import hash_genes, log1p_cp10k, place_within, select
from model_cells import assert_cells_are_independent, make_batch, real_statistics, statistics_of_medians, train
from shard_cells import real_cells
from torch.utils._python_dispatch import TorchDispatchMode

N_GENES = 32_786
TINY = {"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 32}


def tiny(version: str, max_length: int, medians) -> Geneformer:
    sizes = Geneformer.Sizes(version=version, max_length=max_length, **TINY)
    return Geneformer(sizes, len(medians), statistics_of_medians(medians)).eval()


def rows_of(inputs) -> torch.Tensor:
    """[B, L], the tokens of each cell in a row of its own."""
    return inputs["layout"].to_matrix(inputs["tokens"])


def of_lists(cells: list[list[int]]) -> dict:
    """Inputs from the tokens of each cell."""
    tokens = torch.tensor([token for cell in cells for token in cell])
    return {"tokens": tokens, "layout": PACKED.layout(np.array([len(cell) for cell in cells]))}


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
    v1 = tiny("V1", 8, medians).embed_inputs(cells)
    assert v1["tokens"].tolist() == [3, 4, 2, 5, 5]
    assert v1["layout"].lengths.tolist() == [4, 1, 0, 0]
    v2 = tiny("V2", 8, medians)
    inputs = v2.embed_inputs(cells)
    assert inputs["tokens"].tolist() == [CLS, 5, 6, 4, 7, EOS, CLS, 7, EOS, CLS, EOS, CLS, EOS]
    v2.packing = Packing("padded")
    assert v2.embed_inputs(cells)["tokens"].view(4, 6).tolist() == rows_of(inputs).tolist()
    assert rows_of(inputs).tolist() == [
        [CLS, 5, 6, 4, 7, EOS],
        [CLS, 7, EOS, PAD, PAD, PAD],
        [CLS, EOS, PAD, PAD, PAD, PAD],
        [CLS, EOS, PAD, PAD, PAD, PAD],
    ]


def test_truncation_keeps_the_highest_ranks():
    medians = [1.0] * 6
    cells = make_batch([{gene: 10 + gene for gene in range(6)}])
    assert tiny("V1", 4, medians).embed_inputs(cells)["tokens"].tolist() == [7, 6, 5, 4]
    assert tiny("V2", 4, medians).embed_inputs(cells)["tokens"].tolist() == [CLS, 9, 8, EOS]


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
    tokens = rows_of(model.embed_inputs(blood.take(np.arange(20)))).numpy()
    medians = model.medians.numpy()
    first = 1 if model.sizes.version == "V2" else 0
    for row in range(20):
        span = slice(*blood.offsets[row : row + 2])
        genes = blood.genes[span]
        value = (blood.counts[span] / medians[genes]).astype(np.float32)
        expected = genes[np.argsort(-value, kind="stable")][: 512 - 2 * first]
        assert np.array_equal(tokens[row, first : first + len(expected)], expected + model.n_specials)


def test_masking_rates_over_ten_thousand_cells(blood):
    """Real cells, drawn again under other joinids."""
    cells = blood.take(np.arange(10_000) % len(blood))
    cells = CellBatch(np.arange(10_000), cells.offsets, cells.genes, cells.counts, cells.totals)
    median_V = real_statistics(blood, N_GENES).median_nonzero_cp10k.numpy()
    out = views.pretrain(cells, median_V, limit=100, mask_rate=0.15, seed=0, step=1)
    n, true_M = len(out.ranks.genes), out.ranks.genes[out.index_M]
    assert n == 1_000_000
    # standard errors: 0.00036 of the rate, 0.001 of the shares
    assert len(true_M) / n == pytest.approx(0.15, abs=0.0018)
    masked, same = out.shown_M == views.MASKED, out.shown_M == true_M
    assert masked.mean() == pytest.approx(0.8, abs=0.005)
    assert same.mean() == pytest.approx(0.1, abs=0.005)
    assert (~masked & ~same).mean() == pytest.approx(0.1, abs=0.005)
    # a target's chance depends neither on its rank nor on its cell
    first, per_cell = place_within(out.ranks.offsets)[out.index_M], np.bincount(out.index_M // 100, minlength=10_000)
    assert (first < 50).mean() == pytest.approx(0.5, abs=0.007)
    assert per_cell.std() == pytest.approx(np.sqrt(100 * 0.15 * 0.85), rel=0.05)


@pytest.mark.parametrize("rows", [2, 1024])
def test_objective_by_hand(rows, monkeypatch):
    """Cross-entropy at the masked positions alone, loss and gradients, however few logits are held at once."""
    monkeypatch.setattr(geneformer, "LOGIT_ROWS", rows)
    model = tiny("V1", 8, [1.0] * 5)
    torch.nn.init.normal_(model.head_bias)
    torch.nn.init.normal_(model.word_embeddings.weight)
    inputs = of_lists([[2, 1, 4, 6, 1]])
    inputs |= {"positions": torch.tensor([1, 2, 4]), "targets": torch.tensor([3, 4, 6])}
    inputs["layout_asked"] = PACKED.layout([3])
    term = model(inputs)["mlm"]
    logits_NT = model.name(model.encode(inputs["tokens"], inputs["layout"], 2)).double()
    expected = sum(
        torch.log(torch.exp(logits_NT[slot]).sum()) - logits_NT[slot, target]
        for slot, target in ((1, 3), (2, 4), (4, 6))
    )
    assert term.sum.item() == pytest.approx(expected.item())
    assert term.count == 3
    found, wanted = (torch.autograd.grad(3 * loss, list(model.parameters())) for loss in (term.sum, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert model(inputs)["mlm"].sum.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_vocabulary_loss_by_all_logits(bias, weighted, asked, rows):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias_T = (torch.randn(*shape, generator=generator) for shape in ((10, 6), (21, 6), (21,)))
    targets = torch.randint(21, (10,), generator=generator) if asked else None
    weights = torch.rand(10, generator=generator) if weighted else None
    given = [tensor.requires_grad_() for tensor in ((x, weight, bias_T) if bias else (x, weight))]
    logits = F.linear(*(tensor.double() for tensor in given))
    loss_M = logits.logsumexp(1) if targets is None else F.cross_entropy(logits, targets, reduction="none")
    expected = (loss_M if weights is None else loss_M * weights).sum()
    loss = vocabulary_loss(*given, targets_M=targets, weights_M=weights, n_rows=rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    scale = torch.tensor(2.0, requires_grad=True)
    found, wanted = (torch.autograd.grad(scale * each, given, create_graph=True) for each in (loss, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found[0].sum().backward()


class Shapes(TorchDispatchMode):
    """Shapes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.seen.add(tuple(out.shape))
        return out


def test_vocabulary_loss_makes_gradients_only_where_they_are_asked_for():
    given = torch.randn(10, 6, requires_grad=True), torch.randn(21, 6, requires_grad=True)
    for learns in (False, True):
        with torch.set_grad_enabled(learns), Shapes() as shapes:
            vocabulary_loss(*given, n_rows=4)
        assert ((21, 6) in shapes.seen) == ((10, 6) in shapes.seen) == learns


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1), ("small", 10), ("base", 50)])
def test_the_dial(preset, millions):
    with torch.device("meta"):
        model = Geneformer(Geneformer.presets[preset], 20_000)
    assert parameter_counts(model)["without_embeddings"] == pytest.approx(millions * 1e6, rel=0.1)
    assert model.sizes.max_length == 1024


def test_masking_rates_on_real_cells(model, blood):
    clean = model.embed_inputs(blood)["tokens"]
    assert len(clean) == model.token_lengths(blood).sum()
    inputs = model.pretrain_inputs(blood, seed=0, step=5)
    n_genes = (clean >= model.n_specials).sum().item()
    assert n_genes > 200_000
    shown, true = inputs["tokens"][inputs["positions"]], inputs["targets"]
    assert torch.equal(true, clean[inputs["positions"]])
    assert (true >= model.n_specials).all()
    assert len(true) / n_genes == pytest.approx(0.15, abs=0.003)
    assert (shown == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (shown == true).float().mean().item() == pytest.approx(0.1, abs=0.01)
    random = shown[(shown != MASK) & (shown != true)]
    assert len(random) / len(true) == pytest.approx(0.1, abs=0.01)
    assert random.min() >= model.n_specials
    assert random.double().mean().item() == pytest.approx(model.n_specials + N_GENES / 2, rel=0.03)
    # nothing but the chosen positions changed
    restored = inputs["tokens"].index_copy(0, inputs["positions"], inputs["targets"])
    assert torch.equal(restored, clean)
    # each cell is asked at its own tokens
    asked, rows_N = inputs["layout_asked"], inputs["layout"].rows_N
    assert torch.equal(rows_N[inputs["positions"]], asked.rows_N)


def test_masks_depend_on_seed_and_step_and_not_on_the_batch(model, blood):
    cells = blood.take(np.arange(6))
    one = model.pretrain_inputs(cells, seed=0, step=1)
    assert torch.equal(one["targets"], model.pretrain_inputs(cells, seed=0, step=1)["targets"])
    for other in ({"seed": 1, "step": 1}, {"seed": 0, "step": 2}, {"seed": 0, "step": None}):
        assert not torch.equal(one["targets"][:50], model.pretrain_inputs(cells, **other)["targets"][:50])
    alone = model.pretrain_inputs(blood.take([3]), seed=0, step=1)["tokens"]
    assert torch.equal(alone, one["tokens"][one["layout"].rows_N == 3])


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
        assert model.poolings == ("mean", "mean_last")
        with pytest.raises(CellmillError, match="no pooling 'cls'.*one of mean"):
            model.embed_cells(inputs, "cls")


def test_poolings_by_hand(model, blood):
    """Each pooling of a cell beside others, from the states of its layer."""
    model.eval()
    shortest, longest = np.argsort(blood.lengths)[[0, -1]]
    inputs = model.embed_inputs(blood.take([longest, shortest]))
    mine = inputs["layout"].rows_N == 1
    row = inputs["tokens"][mine]
    for pooling in model.poolings:
        layer = 2 if pooling.endswith("_last") else 1
        with torch.no_grad():
            x_LD = model.encode(inputs["tokens"], inputs["layout"], layer)[mine]
            embedded = model.embed_cells(inputs, pooling)[1]
        expected = x_LD[0] if pooling.startswith("cls") else x_LD[row >= model.n_specials].mean(0)
        torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=1e-6)


def test_gene_states(model, blood):
    model.eval()
    cells = blood.take([2, 0, 1])
    inputs = model.embed_inputs(cells)
    with torch.no_grad():
        states = model.gene_states(inputs)
        x_ND = model.encode(inputs["tokens"], inputs["layout"], 1)
    first, layout = model.n_around, inputs["layout"]
    assert states.states_ND.shape == ((inputs["tokens"] >= model.n_specials).sum(), 16)
    for row in range(3):
        mine, span = states.cells_N == row, slice(layout.starts[row] + first, layout.ends[row] - first)
        assert torch.equal(states.genes_N[mine], inputs["tokens"][span] - model.n_specials)
        assert torch.equal(states.states_ND[mine], x_ND[span])
        assert set(states.genes_N[mine].tolist()) <= set(cells.genes[cells.cell_of == row].tolist())


def test_questions_by_hand():
    #                gene: 0 1 2 3 4 5 6 7, and 8 that has no median; falling values, so ranks are gene ids
    median_V = np.array([1.0] * 8 + [np.nan], np.float32)
    counts = [800, 700, 600, 500, 400, 300, 200, 100]
    cells = make_batch([dict(enumerate([*counts, 5])), {}, {3: 2}], totals=[10_000, 0, 40_000])
    m = views.MASKED
    out = views.impute(cells, median_V, limit=100, mask_rate=0.25)
    assert out.ranks.genes.tolist() == [0, 1, m, 2, 3, 4, 5, m, 6, 7, m, m, 3]
    assert out.ranks.offsets.tolist() == [0, 10, 11, 13]
    assert out.index_M.tolist() == [2, 7, 10, 11]
    assert out.n_ranks_M.tolist() == [4, 4, 1, 1]
    geometric = [np.log([800, 700, 600, 500]).mean(), np.log([400, 300, 200, 100]).mean(), 0, np.log(0.5)]
    np.testing.assert_allclose(out.log_value_M, geometric, rtol=1e-6)
    assert out.rest_B.tolist() == [0, 0, 0]
    # without room for all, the lowest ranks are left out
    out = views.impute(cells.take([0]), median_V, limit=6, mask_rate=0.25)
    assert out.ranks.genes.tolist() == [0, m, 1, 2, m, 3]
    assert out.n_ranks_M.tolist() == [2, 2]
    geometric = [np.log([800, 700]).mean(), np.log([600, 500]).mean()]
    np.testing.assert_allclose(out.log_value_M, geometric, rtol=1e-6)
    assert out.rest_B.tolist() == [0.5]
    np.testing.assert_allclose(out.rest_log_value_B, np.log([400, 300, 200, 100]).mean(), rtol=1e-6)


def test_imputation_is_the_formula(model, blood):
    """Cell by cell and gene by gene, from the probabilities at the masks."""
    model.eval()
    cells = blood.take([3, 8])
    genes_BQ = np.array([[5, 70, 900], [20_001, 70, 6]])
    inputs = model.impute_inputs(cells, genes_BQ)
    asked = views.impute(cells, model.medians.numpy(), limit=model._room, mask_rate=0.15)
    assert np.diff(asked.offsets).tolist() == [32, 32]
    with torch.no_grad():
        imputed = model.impute(inputs)
        log_p_NT = model.name(model.encode(inputs["tokens"], inputs["layout"], 2)).log_softmax(1)
    assert (inputs["tokens"][inputs["positions"]] == MASK).all()
    assert (inputs["tokens"] == MASK).sum() == 64
    for row in range(2):
        masks = ((inputs["tokens"] == MASK) & (inputs["layout"].rows_N == row)).nonzero()[:, 0]
        span = slice(*asked.offsets[row : row + 2])
        for column, gene in enumerate(genes_BQ[row]):
            p = log_p_NT[masks, gene + model.n_specials].exp().double().numpy() * asked.n_ranks_M[span]
            median = np.nan_to_num(model.medians[gene].item())
            value = (p * np.log1p(np.exp(asked.log_value_M[span]) * median)).sum() / p.sum()
            rest = asked.rest_B[row]
            assert 0.4 < rest < 1
            value = (1 - rest) * value + rest * np.log1p(np.exp(asked.rest_log_value_B[row]) * median)
            assert imputed.values_BQ[row, column].item() == pytest.approx(value, rel=1e-4, abs=1e-7)
            assert imputed.detection_BQ[row, column].item() == pytest.approx(np.log(p.sum()), rel=1e-4)


def test_imputation_of_a_cell_does_not_depend_on_the_others(model, blood):
    model.eval()
    cells = CellBatch.concatenate([make_batch([{}, {5: 1}]), blood.take([4, np.argmin(blood.lengths)])])
    genes_BQ = np.array([[1, 2], [900, 4], [17, 6], [20_000, 9]])
    with torch.no_grad():
        together = model.impute(model.impute_inputs(cells, genes_BQ))
        for row in range(4):
            alone = model.impute(model.impute_inputs(cells.take([row]), genes_BQ[[row]]))
            for part, whole in zip(alone, together, strict=True):
                assert part.isfinite().all()
                torch.testing.assert_close(part[0], whole[row], atol=1e-5, rtol=1e-5)


def test_imputation_of_no_cells(model):
    imputed = model.impute(model.impute_inputs(make_batch([]), np.zeros((0, 3), np.int64)))
    assert imputed.values_BQ.shape == imputed.detection_BQ.shape == (0, 3)


def test_imputation_learns(blood):
    """Trained on some cells, it knows hidden genes of others from zeros, better than untrained."""
    n_genes = 1000
    blood = select(blood, blood.genes < n_genes)
    train_cells, cells = blood.slice(0, 300), blood.slice(300, 360)
    hidden_N = unit(hash_genes(cells, "hide")) < 0.3
    shown, (rows, genes) = select(cells, ~hidden_N), (cells.cell_of[hidden_N], cells.genes[hidden_N])
    truth_N = log1p_cp10k(cells)[hidden_N]
    dense_BV = np.zeros((len(cells), n_genes), bool)
    dense_BV[cells.cell_of, cells.genes] = True
    genes_BQ = np.tile(np.arange(n_genes), (len(cells), 1))
    visible_BV = np.zeros_like(dense_BV)
    visible_BV[shown.cell_of, shown.genes] = True

    def judged(model) -> tuple[float, float]:
        with torch.no_grad():
            values_BQ, detection_BQ = (part.numpy() for part in model.impute(model.impute_inputs(shown, genes_BQ)))
        asked = ~visible_BV
        order = np.argsort(np.argsort(detection_BQ[asked]))
        positive = dense_BV[asked]
        n = positive.sum()
        auroc = (order[positive].sum() - n * (n - 1) / 2) / n / (len(positive) - n)
        return auroc, np.corrcoef(values_BQ[rows, genes], truth_N)[0, 1]

    torch.manual_seed(0)
    sizes = Geneformer.Sizes(version="V1", max_length=128, dropout=0.0, **TINY)
    model = Geneformer(sizes, n_genes, real_statistics(train_cells, n_genes)).eval()
    untrained = judged(model)
    train(model, train_cells.slice(0, 60), steps=30, learning_rate=1e-2)
    trained = judged(model)
    assert trained[0] > max(untrained[0] + 0.1, 0.75)
    assert min(untrained[1], trained[1]) > 0.6  # the ranks and medians of the view say most of the value


def test_the_last_layer_is_asked_only_where_it_is_needed(model, blood):
    """Loss and gradients are those of the whole last layer."""
    inputs = model.eval().pretrain_inputs(blood.slice(0, 6), seed=0, step=1)
    loss = total_loss(model(inputs))
    found = [(loss, *torch.autograd.grad(loss, list(model.parameters())))]
    x_ND = model.encode(inputs["tokens"], inputs["layout"], 2)
    loss = F.cross_entropy(model.name(x_ND[inputs["positions"]]), inputs["targets"])
    found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for few, whole in zip(*found, strict=True):
        torch.testing.assert_close(few, whole, atol=1e-6, rtol=1e-4)


def test_counts_and_operations_by_hand():
    """Two cells of 3 and 1 genes, of which 2 and 0 are asked."""
    model = tiny("V1", 8, [1.0, 1.0, 1.0])
    inputs = of_lists([[2, 1, 4], [3]])
    inputs |= {"positions": torch.tensor([1, 2]), "targets": torch.tensor([3, 4])}
    inputs["layout_asked"] = PACKED.layout([2, 0])
    assert model.loss_counts(inputs)["mlm"] == model(inputs)["mlm"].count == 2
    layer = 4 * 16 * 16 + 2 * 16 * 32
    first = 2 * 4 * layer + 4 * 16 * (3 * 3 + 1 * 1)
    last = 2 * (4 * 2 * 16 * 16 + 2 * (layer - 2 * 16 * 16)) + 4 * 16 * (2 * 3)
    assert model.body_flops(inputs) == first + last + 2 * 2 * 16 * 16
    cells = make_batch([{}, {0: 1}, dict.fromkeys(range(9), 1)])
    assert model.token_lengths(cells).tolist() == [0, 1, 8]
    assert tiny("V2", 8, [1.0] * 9).token_lengths(cells).tolist() == [2, 3, 8]


def test_bfloat16_is_close(model, blood):
    """Under autocast the states between layers are half as wide, and the loss is nearly the same."""
    inputs = model.eval().pretrain_inputs(blood.slice(0, 4), seed=0, step=1)
    with torch.no_grad():
        exact = total_loss(model(inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert model.encode(inputs["tokens"], inputs["layout"], 2).dtype == torch.bfloat16
            assert model.embed_cells(model.embed_inputs(blood.slice(0, 4))).dtype == torch.float32
            rough = total_loss(model(inputs))
    assert rough.dtype == torch.float32
    assert rough != exact
    torch.testing.assert_close(rough, exact, atol=0, rtol=1e-3)


def test_gene_embeddings(model):
    assert model.embed_genes().shape == (N_GENES, 16)
    assert torch.equal(model.embed_genes()[0], model.word_embeddings.weight[model.n_specials])


def test_trivial_baseline_by_hand():
    model = tiny("V1", 8, [1.0, 1.0, 1.0])
    batch = {"targets": torch.tensor([3])}
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
