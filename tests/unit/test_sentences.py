"""What a small scMulan says after some seconds of training: types of cells that it has not seen, cells of a type."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.abilities.sentences import annotate, generate
from cellmill.errors import CellmillError
from cellmill.models.base import total_loss
from cellmill.models.geneformer import Geneformer
from cellmill.models.packing import PACKED
from cellmill.models.scmulan import Scmulan
from model_cells import real_statistics, statistics_of_medians
from shard_cells import real_cells

N_GENES = 20_125
TYPES = ("acinar", "alpha", "beta", "ductal")
SIZES = Scmulan.Sizes(n_layers=1, width=48, n_heads=2, max_length=64, n_model_genes=150)
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def pancreas(data):
    """110 cells of each of four types in random order; the first 240 train."""
    cells, obs = real_cells(data, "baron_h1")
    types = np.array(obs["cell_type"].to_pylist())
    rows = np.concatenate([np.flatnonzero(types == name)[:110] for name in TYPES])
    rows = np.random.default_rng(0).permutation(rows)
    codes = np.searchsorted(TYPES, types[rows]).astype(np.int32)
    organ = np.zeros(len(rows), np.int32)
    return replace(cells.take(rows), codes={"tissue_general": organ, "cell_type": codes})


@pytest.fixture(scope="module")
def model(pancreas):
    training = pancreas.take(np.arange(240))
    torch.manual_seed(0)
    categories = {"tissue_general": ["pancreas"], "cell_type": list(TYPES)}
    model = Scmulan(SIZES, N_GENES, real_statistics(training, N_GENES), categories)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(300):
        batch = training.take((16 * step + np.arange(16)) % len(training))
        optimizer.zero_grad()
        total_loss(model(model.pretrain_inputs(batch, seed=0, step=step))).backward()
        optimizer.step()
    return model.eval()


def test_annotation_of_new_cells(model, pancreas):
    new = pancreas.take(np.arange(240, 440))
    truth = new.codes["cell_type"]
    said = annotate(model, replace(new, codes={}), **QUIET)
    assert said.names == [TYPES[code] for code in said.codes]
    assert ((said.probabilities > 0) & (said.probabilities <= 1)).all()
    majority = np.bincount(truth).max() / len(truth)
    assert (said.codes == truth).mean() > max(majority + 0.2, 0.8)


def test_annotation_does_not_depend_on_the_batch(model, pancreas):
    cells = pancreas.take(np.arange(300, 321))
    one, other = annotate(model, cells, batch_size=21, **QUIET), annotate(model, cells, batch_size=4, **QUIET)
    assert one.names == other.names
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
    alone = annotate(model, cells.take([7]), **QUIET)
    assert alone.names == [one.names[7]]
    np.testing.assert_allclose(alone.probabilities, one.probabilities[7:8], atol=1e-5)
    none = annotate(model, cells.take([]), **QUIET)
    assert none.names == []


def test_generated_cells_resemble_cells_of_their_type(model, pancreas):
    """Which genes differ between two types, and which way, is as in real cells."""
    known = model.tokens.gene_V >= 0
    real, made = {}, {}
    for name in ("acinar", "beta"):
        cells = pancreas.take(np.flatnonzero(pancreas.codes["cell_type"] == TYPES.index(name)))
        real[name] = np.bincount(cells.genes, minlength=N_GENES)[known] / len(cells)
        said = generate(model, {"tissue_general": "pancreas", "cell_type": name}, 100, seed=1, **QUIET)
        made[name] = np.bincount(said.genes, minlength=N_GENES)[known] / 100
    differences = [rates["acinar"] - rates["beta"] for rates in (real, made)]
    assert np.corrcoef(differences)[0, 1] > 0.5


def test_generated_cells_are_well_formed(model):
    words = {"cell_type": "alpha"}
    made = generate(model, words, 20, seed=3, **QUIET)
    lengths = np.diff(made.offsets)
    assert len(lengths) == len(made.ended) == 20
    assert (lengths > 0).any()
    assert (model.tokens.gene_V[made.genes] > 0).all()
    assert ((made.bins >= 0) & (made.bins <= 10)).all()
    for start, stop in zip(made.offsets[:-1], made.offsets[1:], strict=True):
        assert (np.diff(made.genes[start:stop]) > 0).all()  # no word is said twice
    assert (lengths[~made.ended] == SIZES.max_length - 1).all()


def test_generation_is_decided_by_the_seed(model):
    words = {"cell_type": "alpha"}
    made = generate(model, words, 12, seed=3, **QUIET)
    again = generate(model, words, 12, seed=3, batch_size=5, **QUIET)
    for one, other in zip(made, again, strict=True):
        assert np.array_equal(one, other)
    other = generate(model, words, 12, seed=4, **QUIET)
    assert not np.array_equal(made.genes, other.genes)
    fewer = generate(model, words, 4, seed=3, **QUIET)
    assert np.array_equal(fewer.genes, made.genes[: made.offsets[4]])
    assert len(generate(model, words, 0, seed=3, **QUIET).ended) == 0


def test_options_of_generation(model):
    words = {"cell_type": "beta"}
    assert np.diff(generate(model, words, 5, seed=0, limit=6, **QUIET).offsets).max() <= 5
    greedy = generate(model, words, 3, seed=0, top_k=1, limit=12, **QUIET)
    first = greedy.genes[: greedy.offsets[1]]
    for start, stop in zip(greedy.offsets[:-1], greedy.offsets[1:], strict=True):
        assert np.array_equal(greedy.genes[start:stop], first)
    lengths = {
        scale: np.diff(generate(model, words, 30, seed=0, end_scale=scale, **QUIET).offsets).mean()
        for scale in (1e-9, 1.0, 100.0)
    }
    assert lengths[1e-9] == SIZES.max_length - 1
    assert lengths[1e-9] >= lengths[1.0] > lengths[100.0]


def test_greedy_generation_equals_full_forwards(model):
    """Word by word, without a cache, from the definition."""
    made = generate(model, {"cell_type": "beta"}, 1, seed=0, top_k=1, limit=15, **QUIET)
    tokens, values, said = [model.first_word["cell_type"] + 2], [0], {}
    gene_T = model.gene_T()
    with torch.inference_mode():
        while len(tokens) < 15:
            layout = PACKED.layout([len(tokens)])
            inputs = {"tokens": torch.tensor(tokens), "values": torch.tensor(values), "layout": layout}
            h_D = model.encode(inputs)[-1]
            logits = model.entity_head(h_D)
            logits[[*tokens]] = -torch.inf
            token = int(logits[: 1 + model.n_gene_words].argmax())
            if token == 0:
                break
            bin_ = int(model.value_head(h_D)[token].clamp(0, 10).round())
            tokens, values = [*tokens, token], [*values, bin_]
            said[int(gene_T[token])] = bin_
    assert dict(zip(made.genes.tolist(), made.bins.tolist(), strict=True)) == said


def test_the_mode_of_the_model_is_left_as_it_was(model, pancreas):
    model.train()
    annotate(model, pancreas.take([0]), **QUIET)
    assert model.training
    model.eval()


def test_what_the_model_cannot_say_is_refused(model, pancreas):
    for words, fault in (
        ({}, "name at least one word to generate from, of tissue_general, cell_type"),
        ({"sex": "F"}, "no words of the column 'sex'"),
        ({"cell_type": "neuron"}, "no word 'neuron' of the column 'cell_type'; it knows acinar, alpha"),
    ):
        with pytest.raises(CellmillError, match=fault):
            generate(model, words, 1, seed=0, **QUIET)
    other = Geneformer(Geneformer.presets["demo"], 10, statistics_of_medians(torch.ones(10)))
    for ask in (lambda: generate(other, {"cell_type": "beta"}, 1, seed=0), lambda: annotate(other, pancreas.take([0]))):
        with pytest.raises(CellmillError, match="a Geneformer says no words; give a model of the architecture scmulan"):
            ask()
    with pytest.raises(CellmillError, match="limit 1 leaves no room"):
        generate(model, {"cell_type": "beta"}, 1, seed=0, limit=1, **QUIET)
    with pytest.raises(CellmillError, match="top_k=0"):
        generate(model, {"cell_type": "beta"}, 1, seed=0, top_k=0, **QUIET)
    untaught = Scmulan(replace(SIZES, n_model_genes=N_GENES), N_GENES)
    with pytest.raises(CellmillError, match="no cell type words"):
        annotate(untaught, pancreas.take([0]), **QUIET)
