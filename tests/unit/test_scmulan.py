"""scMulan's objective on hand-computed sentences, its tasks, cache and poolings, and its independence of the batch."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cellmill.checkpoints import load_checkpoint, save_checkpoint
from cellmill.errors import CellmillError
from cellmill.models import resolve_sizes, scmulan_objective
from cellmill.models.attention import attention_backend
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.packing import PACKED, Packing
from cellmill.models.scmulan import Scmulan, last_words
from cellmill.models.scmulan_genes import most_variable
from cellmill.recipes import ModelRecipe
from cellmill.views import scmulan as views
from cellmill.views.ragged import offsets_of
from model_cells import assert_cells_are_independent, make_batch, real_statistics, train
from shard_cells import real_cells
from torch.utils.flop_counter import FlopCounterMode

N_GENES = 32_786
SMALL = Scmulan.Sizes(n_layers=2, width=16, n_heads=2, max_length=64, n_model_genes=500)
CATEGORIES = {"tissue_general": ["blood", "lung"], "cell_type": ["B cell", "T cell", "monocyte"], "sex": ["F", "M"]}


def with_codes(cells, seed=0, known=0.8):
    """The cells with codes of `CATEGORIES`, a part of them unknown."""
    random = np.random.default_rng(seed)
    codes = {}
    for column, values in CATEGORIES.items():
        codes_B = random.integers(len(values), size=len(cells))
        codes[column] = np.where(random.random(len(cells)) < known, codes_B, -1).astype(np.int32)
    return replace(cells, codes=codes)


@pytest.fixture(scope="module")
def blood(data):
    return with_codes(real_cells(data, "celltypist_sample")[0])


@pytest.fixture(scope="module")
def statistics(blood):
    return real_statistics(blood, N_GENES)


@pytest.fixture
def model(statistics):
    torch.manual_seed(0)
    model = Scmulan(SMALL, N_GENES, statistics, CATEGORIES).eval()
    for parameter in model.parameters():  # larger than at the start, so that words matter
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tiny(n_genes=4, categories=CATEGORIES, **sizes) -> Scmulan:
    torch.manual_seed(1)
    model = Scmulan(replace(SMALL, **sizes), n_genes, categories=categories).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_published_parameter_count():
    with torch.device("meta"):
        model = Scmulan(Scmulan.presets["published"], 2000, categories=Scmulan.published_categories["published"])
    assert parameter_counts(model)["total"] == 368_800_320
    assert (model.n_tokens, model.pct) == (2222, 2206)


def test_tokens_and_words():
    """<E>, genes, the words of each column, <PCT> and its fellows."""
    model = tiny()
    assert model.tokens.gene_V.tolist() == [1, 2, 3, 4]
    assert model.first_word == {"tissue_general": 5, "cell_type": 7, "sex": 10}
    assert (model.tokens.end, model.tokens.annotate, model.tokens.describe, model.n_tokens) == (0, 12, 13, 28)
    cells = make_batch([{0: 1}, {1: 1}, {2: 1}])
    codes = {"tissue_general": [1, -1, -1], "cell_type": [2, 0, -1], "sex": [0, 1, -1]}
    cells = replace(cells, codes={column: np.array(code, np.int32) for column, code in codes.items()})
    words = model.words(cells, model.obs_columns)
    assert words.offsets.tolist() == [0, 3, 5, 5]
    assert words.tokens.tolist() == [6, 9, 10, 7, 11]
    assert len(model.words(replace(cells, codes={}), model.obs_columns).tokens) == 0


def ask(model: Scmulan, *spoken: tuple) -> dict:
    """Training inputs of sentences, each (tokens, values, targets, task) and maybe whether it ends."""
    spoken = [(*sentence, True)[:5] for sentence in spoken]
    tokens, values, targets, tasks, ends = zip(*spoken, strict=True)
    words = (np.array(sum(part, []), np.int32) for part in (tokens, values))
    offsets = offsets_of(np.array([len(part) for part in tokens]))
    return model.ask(views.Sentences(offsets, *words, *(np.array(part) for part in (targets, tasks, ends))))


def states(model: Scmulan, tokens, values) -> torch.Tensor:
    """[L, D], the last states of one sentence."""
    tokens, values = torch.as_tensor(tokens), torch.as_tensor(values)
    return model.encode({"tokens": tokens, "values": values, "layout": PACKED.layout([len(tokens)])})


def words_of(inputs: dict, row: int) -> tuple[list[int], list[int]]:
    """Tokens and values of one sentence of packed inputs."""
    span = slice(inputs["layout"].starts[row], inputs["layout"].ends[row])
    return inputs["tokens"][span].tolist(), inputs["values"][span].tolist()


# tissue 5, type 7, then genes 2, 4, 1 and the end: asked at places 1, 2, 3 (what remains of 2, 4, 1) and 4 (<E>)
GENERATED = ([5, 7, 2, 4, 1, 0], [0, 0, 10, 3, 6, 0], 4, views.GENERATE)
ANNOTATED = ([3, 1, 12, 8, 0], [10, 2, 0, 0, 0], 2, views.ANNOTATE)
REMAINING = {1: [2, 3, 4], 2: [3, 4], 3: [4], 4: [5]}


def test_the_objective_by_hand():
    model = tiny()
    tokens, values, *_ = GENERATED
    with torch.no_grad():
        losses = model(ask(model, GENERATED))
        h_LD = states(model, tokens, values)
        log_LT, value_LT = model.entity_head(h_LD).log_softmax(1), model.value_head(h_LD)
    entity = value = 0.0
    for place, words in REMAINING.items():
        for word in words:
            entity -= float(log_LT[place, tokens[word]]) / len(words)
            value += (float(value_LT[place, tokens[word]]) - float(values[word])) ** 2 / len(words)
    assert losses["entity"].count == losses["value"].count == 1  # one sentence, of four places
    assert float(losses["entity"].sum) == pytest.approx(entity / 4, rel=1e-5)
    assert float(losses["value"].sum) == pytest.approx(value / 4, rel=1e-5)


def test_sentences_weigh_the_same():
    model = tiny()
    with torch.no_grad():
        apart, together = (
            [model(ask(model, one)) for one in (GENERATED, ANNOTATED)],
            model(ask(model, GENERATED, ANNOTATED)),
        )
    for name, term in together.items():
        assert term.count == 2
        assert float(term.sum) == pytest.approx(sum(float(losses[name].sum) for losses in apart), rel=1e-5)


def test_a_model_without_opinion_is_at_the_logarithm_of_its_tokens():
    model = tiny()
    torch.nn.init.zeros_(model.entity_head.weight)
    torch.nn.init.zeros_(model.value_head.weight)
    with torch.no_grad():
        losses = model(ask(model, GENERATED))
    assert float(losses["entity"].sum / losses["entity"].count) == pytest.approx(math.log(28), rel=1e-6)
    # squares of 10, 3, 6; of 3, 6; of 6; of <E>'s 0
    assert float(losses["value"].sum) == pytest.approx(((100 + 9 + 36) / 3 + (9 + 36) / 2 + 36) / 4, rel=1e-6)


def test_a_target_without_words_in_front_is_not_asked_for():
    model = tiny()
    with torch.no_grad():
        losses = model(ask(model, ([2, 4, 0], [10, 3, 0], 3, views.GENERATE)))
        log_LT = model.entity_head(states(model, [2, 4], [10, 3])).log_softmax(1)
    assert losses["entity"].count == 1
    assert float(losses["entity"].sum) == pytest.approx(-float(log_LT[0, 4] + log_LT[1, 0]) / 2, rel=1e-5)
    empty = model(ask(model, ([0], [0], 1, views.GENERATE)))
    assert empty["entity"].count == empty["entity"].sum == 0


def test_the_end_of_a_cut_sentence_is_not_asked_for():
    """Of the trivial baseline neither; a sentence of which nothing else is asked does not count."""
    model = tiny()
    tokens, values, *_ = GENERATED
    inputs = ask(model, (*GENERATED, False))
    trivial = torch.randn(4, model.n_tokens)
    with torch.no_grad():
        losses = model(inputs)
        h_LD = states(model, tokens, values)
        log_LT, value_LT = model.entity_head(h_LD).log_softmax(1), model.value_head(h_LD)
        by_frequency = model.trivial_losses(inputs, trivial)
    entity = value = frequency = error = 0.0
    for place in (1, 2, 3):
        words = REMAINING[place]
        for word in words:
            token, truth = tokens[word], values[word]
            entity -= float(log_LT[place, token]) / len(words) / 3
            value += (float(value_LT[place, token]) - truth) ** 2 / len(words) / 3
            frequency -= float(trivial[views.GENERATE, token]) / len(words) / 3
            error += (float(trivial[3, token]) - truth) ** 2 / len(words) / 3
    assert float(losses["entity"].sum) == pytest.approx(entity, rel=1e-5)
    assert float(losses["value"].sum) == pytest.approx(value, rel=1e-5)
    assert float(by_frequency["entity"].sum) == pytest.approx(frequency, rel=1e-5)
    assert float(by_frequency["value"].sum) == pytest.approx(error, rel=1e-5)
    with torch.no_grad():
        model.entity_head.weight[0] += 1  # the end still takes part in the softmax, and is no target
        assert model(ask(model, ([5, 0], [0, 0], 1, views.GENERATE, False)))["entity"].count == 0


def test_sentences_are_cut_in_training_alone(model, blood):
    """Generated ones do not end then; the released code reads a cell whole, so all its genes decide its embedding."""
    cells = blood.take(np.arange(200))
    known_B = np.bincount(cells.cell_of[model.tokens.gene_V[cells.genes] >= 0], minlength=len(cells))
    assert (known_B > SMALL.max_length).any()
    assert (known_B < SMALL.max_length - 10).any()
    inputs = model.pretrain_inputs(cells, seed=0, step=4)
    layout, asked = inputs["layout"], inputs["layout_asked"]
    generated = inputs["task"].numpy() == views.GENERATE
    n_genes_B = layout.sum((inputs["values"] > 0).float().unsqueeze(1))[:, 0].numpy()
    ends = inputs["shares"].numpy()[asked.ends - 1] > 0
    assert layout.longest == SMALL.max_length - 1  # and <E>
    assert np.array_equal(ends, ~generated | (n_genes_B == known_B))
    assert (layout.lengths[~ends] == SMALL.max_length - 1).all()
    assert 0 < ends[generated].sum() < generated.sum()
    assert np.array_equal(model.embed_inputs(cells)["layout"].lengths, known_B + 1)
    asked = model.impute_inputs(cells, np.zeros((len(cells), 1), np.int64))
    assert np.array_equal(asked["layout"].lengths, np.maximum(known_B, 1))


def test_annotation_asks_behind_the_task_alone():
    model = tiny()
    with torch.no_grad():
        losses = model(ask(model, ANNOTATED))
        log_LT = model.entity_head(states(model, *ANNOTATED[:2])).log_softmax(1)
    assert losses["entity"].count == 1
    assert float(losses["entity"].sum) == pytest.approx(-float(log_LT[2, 8] + log_LT[3, 0]) / 2, rel=1e-5)


def test_tasks_are_equally_frequent_among_those_that_a_cell_has_words_for():
    """Measured over 12,000 cells."""
    n = 12_000
    cells = make_batch([{0: 1, 1: 2}] * n)
    codes = {"tissue_general": np.zeros(n, np.int32), "cell_type": np.zeros(n, np.int32)}
    codes["cell_type"][6000:] = -1
    codes["tissue_general"][4000:6000] = codes["tissue_general"][9000:] = -1
    cells = replace(cells, codes=codes)
    inputs = tiny().pretrain_inputs(cells, seed=3, step=1)
    task = inputs["task"].numpy()

    def rates(start, stop):
        return (np.bincount(task[start:stop], minlength=3) / (stop - start)).tolist()

    assert rates(0, 4000) == pytest.approx([1 / 3] * 3, abs=0.025)
    assert rates(4000, 6000) == pytest.approx([1 / 2, 1 / 2, 0], abs=0.035)
    assert rates(6000, 9000) == pytest.approx([1 / 2, 0, 1 / 2], abs=0.03)
    assert rates(9000, n) == [1, 0, 0]
    generated = task[:4000] == views.GENERATE
    starts_with_gene = inputs["values"][inputs["layout"].starts[:4000]].numpy()[generated] > 0
    assert starts_with_gene.mean() == pytest.approx(0.1, abs=0.025)


def test_metadata_stands_in_front_of_generated_genes():
    cells = replace(make_batch([{0: 3, 2: 5}]), codes={"cell_type": np.array([1]), "sex": np.array([0])})
    model = tiny(unprompted=0.0)
    seen = {}
    for step in range(40):
        inputs = model.pretrain_inputs(cells, seed=0, step=step)
        seen.setdefault(int(inputs["task"]), set()).add(tuple(inputs["tokens"].tolist()))
        assert inputs["next_tokens"][-1] == 0
    assert seen[views.GENERATE] == {(10, 8, 1, 3), (10, 8, 3, 1)}
    assert seen[views.ANNOTATE] == {(1, 3, 12, 8), (3, 1, 12, 8)}
    assert seen[views.DESCRIBE] == {(1, 3, 13, 10), (3, 1, 13, 10)}


def test_cells_are_independent(model, blood):
    assert_cells_are_independent(model, blood.take(np.arange(40)), n_checked=12)


@pytest.mark.parametrize("pooling", Scmulan.poolings)
def test_every_pooling_is_independent_of_the_batch(model, blood, pooling):
    cells = blood.take(np.arange(20))
    with torch.inference_mode():
        together = model.embed_cells(model.embed_inputs(cells), pooling)
        for row in range(6):
            alone = model.embed_cells(model.embed_inputs(cells.take([row])), pooling)
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling", Scmulan.poolings)
def test_reading_in_bfloat16_is_near(blood, statistics, pooling):
    """Also through the cache, of a model whose weights are as at the start."""
    torch.manual_seed(0)
    model = Scmulan(SMALL, N_GENES, statistics, CATEGORIES).eval()
    inputs = model.embed_inputs(blood.take(np.arange(12)))
    with torch.inference_mode():
        exact_BD = model.embed_cells(inputs, pooling)
        with torch.autocast("cpu", torch.bfloat16):
            rounded_BD = model.embed_cells(inputs, pooling)
    assert rounded_BD.dtype == torch.float32
    assert 0 < float((rounded_BD - exact_BD).norm() / exact_BD.norm()) < 0.02


@pytest.mark.parametrize("packing", [PACKED, Packing("padded"), Packing(grain=64)])
def test_a_cache_equals_the_full_forward(model, blood, packing):
    """Sentences of unlike lengths, read at once and then three words further, one at a time."""
    model.packing = packing
    inputs = model.embed_inputs(blood.take([0, 3, 7, 20]))
    further_BS = torch.tensor([[5, 501, 9], [1, 2, 3], [503, 504, 0], [8, 7, 6]])
    values_BS = further_BS % 11
    with torch.inference_mode():
        h_ND, cache = model.read(inputs, 3)
        found = [h_ND[last_words(inputs["layout"])]]
        for tokens_B, values_B in zip(further_BS.T, values_BS.T, strict=True):
            found.append(model.read_further(tokens_B, values_B, cache))
        for row in range(4):
            tokens, values = words_of(inputs, row)
            full_LD = states(model, tokens + further_BS[row].tolist(), values + values_BS[row].tolist())
            torch.testing.assert_close(h_ND[inputs["layout"].starts[row]], full_LD[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.stack([h[row] for h in found]), full_LD[-4:], atol=1e-5, rtol=1e-5)


def test_a_cache_goes_on_with_some_sentences():
    model = tiny()
    sentences = ([5, 1, 2], [6, 3], [5, 4, 1, 2])
    tokens = torch.tensor(sum(sentences, []))
    with torch.inference_mode():
        _, cache = model.read({"tokens": tokens, "values": tokens, "layout": PACKED.layout([3, 2, 4])}, 2)
        model.read_further(torch.tensor([4, 4, 3]), torch.tensor([9, 2, 8]), cache)
        cache.keep(torch.tensor([True, False, True]))
        state_BD = model.read_further(torch.tensor([3, 6]), torch.tensor([1, 7]), cache)
        for state_D, said, values in (
            (state_BD[0], [5, 1, 2, 4, 3], [5, 1, 2, 9, 1]),
            (state_BD[1], [5, 4, 1, 2, 3, 6], [5, 4, 1, 2, 8, 7]),
        ):
            torch.testing.assert_close(state_D, states(model, said, values)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_the_label_informed_embedding_is_the_state_of_the_said_type(model, blood, levels):
    """Whether a finer type follows depends on <E>, which is made unlikely or likely here."""
    inputs = model.embed_inputs(blood.take(np.arange(12)))
    types = model.type_words
    model.entity_head.weight.data[0] = 0
    with torch.inference_mode():
        after_BD = model.decode_types(inputs).states_BD
    model.entity_head.weight.data[0] = after_BD.mean(0) * (10 if levels == 1 else -10)
    with torch.inference_mode():
        found = model.decode_types(inputs)
        informed = model.embed_cells(inputs, "label_informed")
        for row in range(12):
            tokens, values = words_of(inputs, row)
            said = []
            for _ in range(2):
                logits_T = model.entity_head(states(model, tokens, values)[-1])
                logits_K = logits_T[types].clone()
                logits_K[said] = -torch.inf
                code = int(logits_K.argmax())
                if said and logits_K[code] <= logits_T[0]:
                    break
                tokens, values = [*tokens, types.start + code], [*values, 0]
                said.append(code)
                probability = float(logits_K.softmax(0)[code])
            assert len(said) == levels
            h_D = states(model, tokens, values)[-1]
            torch.testing.assert_close(informed[row], h_D, atol=1e-5, rtol=1e-5)
            assert int(found.codes_B[row]) == said[-1]
            assert float(found.probability_B[row]) == pytest.approx(probability, abs=1e-5)


def test_without_cell_types_genes_are_pooled():
    model = tiny(categories={"sex": ["F", "M"]})
    assert model.poolings == ("mean", "pct", "released")
    with pytest.raises(CellmillError, match="no cell type words"):
        model.decode_types(model.embed_inputs(make_batch([{0: 1}])))
    with pytest.raises(CellmillError, match="no pooling 'label_informed'"):
        model.embed_cells(model.embed_inputs(make_batch([{0: 1}])), "label_informed")


def test_a_model_that_says_one_type_and_the_end_is_read_at_pct(model, blood):
    """So the released reading of a model of one level of types says nothing of the type."""
    inputs = model.embed_inputs(blood.take(np.arange(12)))
    with torch.inference_mode():
        pct_BD = model.encode(inputs)[last_words(inputs["layout"])]
    weight = model.entity_head.weight.data
    weight.zero_()
    weight[model.type_words.start] = pct_BD.mean(0)  # said first, as it looks like <PCT>'s states
    with torch.inference_mode():
        logits_BT = model.logits(pct_BD)
        assert (logits_BT.argmax(1) == model.type_words.start).all()
        after_BD = model.released_states(inputs)
    weight[0] = torch.linalg.lstsq(torch.cat([after_BD, pct_BD]), torch.tensor([100.0] * 12 + [-100.0] * 12)).solution
    with torch.inference_mode():
        assert not torch.allclose(after_BD, pct_BD, atol=0.1)
        torch.testing.assert_close(model.embed_cells(inputs, "released"), pct_BD)


def test_the_last_products_are_exact_in_bfloat16():
    """The cross-entropy's two parts are of the same logits: a sure word costs next to nothing, never less."""
    model = tiny()
    inputs = ask(model, GENERATED)
    with torch.no_grad():
        model.entity_head.weight.mul_(40)
        with torch.autocast("cpu", torch.bfloat16):
            h_LD = model.encode(inputs)
            logits_LT, bins_LT = model.logits(h_LD.bfloat16()), model.bins(h_LD)
            entity = float(model(inputs)["entity"].sum)
        log_LT = (h_LD @ model.entity_head.weight.T).log_softmax(1)
    assert h_LD.dtype == logits_LT.dtype == bins_LT.dtype == torch.float32
    torch.testing.assert_close(bins_LT, h_LD @ model.value_head.weight.T)
    exact = sum(
        -float(log_LT[place, GENERATED[0][word]]) / len(words) / 4
        for place, words in REMAINING.items()
        for word in words
    )
    assert entity == pytest.approx(exact, rel=1e-5)


# What the engine asks: packed cells, exact sums in blocks, counts


def by_definition(model: Scmulan, inputs: dict) -> torch.Tensor:
    """The objective by plain products, question by question, of the inputs of `questions`."""
    h_ND, asked = model.encode(inputs), inputs["layout_asked"]
    log_MT = model.entity_head(h_ND[inputs["asked"]]).log_softmax(1)
    value_MT = model.value_head(h_ND[inputs["asked"]])
    entity = value = 0.0
    for start, end in zip(asked.starts, asked.ends, strict=True):
        for question in range(start, end):
            answers = torch.arange(question, end - 1) if question < end - 1 else torch.tensor([end - 1])
            tokens, truth = inputs["next_tokens"][answers].long(), inputs["next_values"][answers]
            share = inputs["shares"][question]
            entity = entity - share * log_MT[question, tokens].mean()
            value = value + share * (value_MT[question, tokens] - truth).square().mean()
    return torch.stack([entity, value]) / inputs["n_asked"]


@pytest.mark.parametrize(("block", "rows"), [(2**18, 256), (700, 7)])
def test_sums_in_blocks_are_those_of_the_definition(model, blood, monkeypatch, block, rows):
    """Real sentences, their losses and gradients; with blocks of a few values, too."""
    monkeypatch.setitem(scmulan_objective.BLOCK, "cpu", block)
    monkeypatch.setattr(scmulan_objective, "ROWS", rows)
    inputs = model.pretrain_inputs(blood.take(np.arange(30)), seed=0, step=1)
    assert set(inputs["task"].tolist()) == {views.GENERATE, views.ANNOTATE, views.DESCRIBE}
    found = []
    for in_blocks in (True, False):
        model.zero_grad()
        terms = model(inputs)
        losses = torch.stack([t.sum / t.count for t in terms.values()]) if in_blocks else by_definition(model, inputs)
        (losses * torch.tensor([1.0, 0.3])).sum().backward()
        found.append((losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for name, gradient in found[1][1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def losses_gradients_embeddings(model: Scmulan, cells, packing: Packing) -> tuple:
    model.packing = packing
    model.zero_grad()
    terms = model(model.pretrain_inputs(cells, seed=0, step=1))
    total_loss(terms).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        embeddings = [model.embed_cells(model.embed_inputs(cells), pooling) for pooling in model.poolings]
        imputed = model.impute(model.impute_inputs(cells, np.tile(np.arange(9), (len(cells), 1))))
        states = model.gene_states(model.embed_inputs(cells)).states_ND
    losses = {name: (term.sum.detach(), term.count) for name, term in terms.items()}
    return losses, gradients, [*embeddings, *imputed, states]


@pytest.mark.parametrize("packing", [Packing("padded"), Packing("packed", grain=256)])
@pytest.mark.parametrize("backend", [None, "reference", "padded"])
def test_layouts_and_attentions_are_the_same(model, blood, packing, backend):
    cells = blood.take([0, 3, 7, 20, 41])
    plain = losses_gradients_embeddings(model, cells, PACKED)
    with attention_backend(backend) if backend else nullcontext():
        other = losses_gradients_embeddings(model, cells, packing)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_an_empty_cell_beside_others(model):
    """It has no genes and no known words: of it only <E> could be asked, and nothing stands in front of that."""
    cells = replace(make_batch([{3: 1, 9: 4}, {}, {7: 2}]), codes={"sex": np.array([0, -1, 1])})
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    assert inputs["layout"].lengths[1] == inputs["layout_asked"].lengths[1] == 0
    terms = model(inputs)
    total_loss(terms).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    nothing = model.pretrain_inputs(cells.take([1]), seed=0, step=0)
    assert [t.sum.item() for t in model(nothing).values()] == [0, 0]
    with torch.no_grad():
        alone = [model(model.pretrain_inputs(cells.take([row]), seed=0, step=0)) for row in range(3)]
    for name, term in terms.items():
        assert term.sum.item() == pytest.approx(sum(float(one[name].sum) for one in alone), rel=1e-5)
    assert model(model.pretrain_inputs(cells.take([]), seed=0, step=0))["entity"].count == 0


def test_counts_lengths_and_operations(model, blood):
    """Counts as forward's, lengths of which some cell needs all, operations by torch's own counter."""
    cells = blood.take(np.arange(60))
    longest_B = np.zeros(60, np.int64)
    for step in range(12):
        inputs = model.pretrain_inputs(cells, seed=0, step=step)
        longest_B = np.maximum(longest_B, inputs["layout"].lengths)
    allowed_B = model.token_lengths(cells)
    assert (longest_B <= allowed_B).all()
    assert (longest_B == allowed_B).mean() > 0.5
    counts, terms = model.loss_counts(inputs), model(inputs)
    assert {name: float(count) for name, count in counts.items()} == {n: float(t.count) for n, t in terms.items()}
    with FlopCounterMode(display=False) as counter, attention_backend("reference"), torch.no_grad():
        model.encode(inputs, inputs["asked"], inputs["layout_asked"])
    lengths, asked = inputs["layout"].lengths, inputs["layout_asked"].lengths
    hidden = (lengths * (lengths - 1) // 2).sum() * (SMALL.n_layers - 1) + (asked * (asked - 1) // 2).sum()
    assert model.body_flops(inputs) + 4 * SMALL.width * hidden == counter.get_total_flops()


def test_training_in_bfloat16_follows_float32(statistics, blood):
    """The stream between layers is bfloat16 then; 100 steps on real cells, the losses of each compared."""
    cells, followed = blood.take(np.arange(200)), {}
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Scmulan(replace(SMALL, width=32), N_GENES, statistics, CATEGORIES)
        model.packing = Packing(grain=256)  # the CPU prepares its products anew for every number of words
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(100):
            batch = cells.take((4 * step + np.arange(4)) % 200)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = total_loss(model(model.pretrain_inputs(batch, seed=0, step=step), step=step))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1
        followed[precision] = np.array(losses)
    difference = np.abs(followed[torch.bfloat16] / followed[torch.float32] - 1)
    assert 0 < difference.mean() < 0.01


def test_most_variable_genes(blood, statistics):
    """Against the formula gene by gene; unexpressed genes never."""
    chosen = most_variable(statistics, 500)
    mean, std = statistics.mean_log1p_cp10k.double().numpy(), statistics.std_log1p_cp10k.double().numpy()
    expressed = np.flatnonzero(np.isfinite(mean))
    assert 500 < len(expressed) < N_GENES
    z = np.full(N_GENES, -np.inf)
    for genes in np.array_split(expressed[np.argsort(mean[expressed], kind="stable")], 20):
        dispersion = std[genes] ** 2 / mean[genes]
        z[genes] = (dispersion - dispersion.mean()) / dispersion.std()
    z[statistics.nonzero_cells.numpy() < 10] = -np.inf
    assert len(np.intersect1d(chosen, np.argsort(-z)[:500])) > 490  # bins differ by a gene at their edges
    assert np.isfinite(z[chosen]).all()
    assert np.array_equal(most_variable(statistics, N_GENES), expressed)


def test_genes_that_are_no_words(model, blood):
    token_V = model.tokens.gene_V
    assert model.n_known_genes == (token_V >= 0).sum() == 500
    genes_VD = model.embed_genes()
    assert genes_VD.shape == (N_GENES, 16)
    assert not genes_VD[token_V < 0].any()
    gene = int(np.flatnonzero(token_V >= 0)[7])
    assert torch.equal(genes_VD[gene], model.word_embedding.weight[token_V[gene]].detach())
    with pytest.raises(CellmillError, match="does not know its genes; build it with the corpus statistics"):
        Scmulan(SMALL, N_GENES).embed_inputs(blood)


def test_gene_states_are_those_of_the_sentence(model, blood):
    cells = blood.take([2, 5])
    inputs = model.embed_inputs(cells)
    with torch.inference_mode():
        found = model.gene_states(inputs)
        h_ND = model.encode(inputs)
    assert len(found.genes_N) == len(h_ND) - 2
    for n in (0, 11, len(found.genes_N) - 1):
        row, token = int(found.cells_N[n]), model.tokens.gene_V[int(found.genes_N[n])]
        place = words_of(inputs, row)[0].index(token)
        torch.testing.assert_close(found.states_ND[n], h_ND[inputs["layout"].starts[row] + place])
    for row in range(2):
        expressed = cells.genes[cells.offsets[row] : cells.offsets[row + 1]]
        assert np.isin(found.genes_N[found.cells_N == row].numpy(), expressed).all()


def test_imputation_reads_the_state_of_the_last_gene():
    model = tiny(n_genes=5)
    cells = make_batch([{0: 9, 2: 999}, {}], totals=[10_000, 10])
    with torch.inference_mode():
        imputed = model.impute(model.impute_inputs(cells, np.array([[1, 3, 4], [1, 3, 4]])))
        h_D = states(model, [3, 1], [10, 4])[-1]  # ln 10 of ln 1000: bin 4
        log_T, bins_T = model.entity_head(h_D).log_softmax(0), model.value_head(h_D).clamp(0.5, 10)
        empty_D = states(model, [model.pct], [0])[-1]
        empty_T = model.entity_head(empty_D).log_softmax(0)
    words = [2, 4, 5]
    torch.testing.assert_close(imputed.detection_BQ[0], log_T[words])
    torch.testing.assert_close(imputed.values_BQ[0], (bins_T[words] - 0.5) / 10 * math.log(1000))
    torch.testing.assert_close(imputed.detection_BQ[1], empty_T[words])


def test_imputation_has_no_opinion_of_other_genes(model, blood):
    cells, token_V = blood.take(np.arange(5)), model.tokens.gene_V
    known, others = np.flatnonzero(token_V >= 0), np.flatnonzero(token_V < 0)[[3, 700]]
    asked_BQ = np.tile(np.concatenate([known, others]), (5, 1))
    with torch.inference_mode():
        values_BQ, detection_BQ = model.impute(model.impute_inputs(cells, asked_BQ))
    torch.testing.assert_close(values_BQ[:, -1], values_BQ[:, :-2].mean(1))
    torch.testing.assert_close(detection_BQ[:, -2], detection_BQ[:, :-2].mean(1))
    assert values_BQ.isfinite().all()


def test_the_trivial_baseline_by_hand():
    """Frequencies with one added to every word that a task may ask for; mean bins."""
    model = tiny(n_genes=3)
    cells = make_batch([{0: 9, 1: 99}, {0: 5}], totals=[10_000, 10])
    cells = replace(cells, codes={"cell_type": np.array([1, -1]), "sex": np.array([0, 1])})
    trivial = model.fit_trivial([cells.take([0]), cells.take([1])])
    p = trivial[:3].exp()
    assert p[views.GENERATE, :4].tolist() == pytest.approx([3 / 9, 3 / 9, 2 / 9, 1 / 9])  # <E>, genes 0, 1, 2
    assert p[views.ANNOTATE, [0, 6, 7, 8]].tolist() == pytest.approx([2 / 6, 1 / 6, 2 / 6, 1 / 6])
    assert p.sum(1).tolist() == pytest.approx([1, 1, 1])
    # bins: gene 0 has 5 and 10, gene 1 has 10; gene 2 is never seen and gets the mean of all
    assert trivial[3, :4].tolist() == pytest.approx([0, 7.5, 10, 25 / 3])
    inputs = ask(model, ([9, 1, 2, 0], [0, 5, 10, 0], 3, views.GENERATE))
    losses = model.trivial_losses(inputs, trivial)
    log = p[0].log()
    entity = -float((log[1] + log[2]) / 2 + log[2] + log[0])
    assert float(losses["entity"].sum) == pytest.approx(entity / 3, rel=1e-5)
    assert float(losses["value"].sum) == pytest.approx(2.5**2 / 2 / 3, rel=1e-5)
    assert losses["entity"].count == model(inputs)["entity"].count == 1


def test_training_beats_the_trivial_baseline(data, statistics, blood):
    torch.manual_seed(0)
    cells = blood.take(np.arange(24))
    model = Scmulan(replace(SMALL, width=32, n_model_genes=200), N_GENES, statistics, CATEGORIES)
    inputs = model.pretrain_inputs(cells, seed=0, step=None)
    trivial = total_loss(model.trivial_losses(inputs, model.fit_trivial([cells]))).item()
    assert train(model, cells, 60, 1e-2) < 0.95 * trivial


def test_a_checkpoint_is_complete(model, blood, tmp_path):
    meta = {"recipe": {"architecture": "scmulan"}, "feature_ids": [f"g{i}" for i in range(N_GENES)]}
    save_checkpoint(tmp_path, model, meta)
    again, _ = load_checkpoint(tmp_path)
    assert again.categories == CATEGORIES
    cells = blood.take(np.arange(6))
    inputs = model.pretrain_inputs(cells, seed=0, step=2)
    for name, same in again.pretrain_inputs(cells, seed=0, step=2).items():
        if not name.startswith("layout"):
            assert torch.equal(inputs[name], same)
    with torch.inference_mode():
        assert torch.equal(model.embed_cells(model.embed_inputs(cells)), again.embed_cells(again.embed_inputs(cells)))


def test_impossible_sizes_are_refused():
    with pytest.raises(CellmillError, match="width 16 is no multiple of n_heads 3"):
        replace(SMALL, n_heads=3)


def test_the_demo_recipe_fits():
    path = Path(__file__).parents[2] / "config" / "models" / "scmulan-demo.yaml"
    recipe = ModelRecipe.from_dict(yaml.safe_load(path.read_text()))
    assert recipe.architecture == "scmulan"
    assert resolve_sizes(Scmulan, recipe.preset, recipe.sizes).n_model_genes == 2000
