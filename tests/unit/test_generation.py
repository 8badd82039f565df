"""Generation with an scGPT that was trained for seconds on real cells of two types, and what prompts are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.abilities.generation import cell_states, generate, values_by_reference, values_by_total
from cellmill.errors import CellmillError
from cellmill.models.base import total_loss
from cellmill.models.geneformer import Geneformer
from cellmill.models.packing import Packing, uniform
from cellmill.models.scgpt import PAD_VALUE, Scgpt
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import log1p_cp10k, select
from model_cells import make_batch
from shard_cells import real_cells

N_GENES = 200
N_TEST = 20
STEPS = 600
SEED = 2  # of some others, mvc still says the same of every cell after so few steps
TYPES = ("acinar", "beta")
SIZES = Scgpt.Sizes(
    n_layers=1, width=32, n_heads=2, hidden=32, max_length=65, dropout=0.0, cell_prompt_after=0, value_init="spread"
)


@pytest.fixture(scope="module")
def pancreas(data) -> dict[str, CellBatch]:
    """As many cells of each type, in the 200 genes that most cells express; the first 20 are not trained on."""
    cells, obs = real_cells(data, "baron_h1")
    by_cells = np.argsort(-np.bincount(cells.genes), kind="stable")
    gene_V = np.full(len(by_cells), -1)
    gene_V[np.sort(by_cells[:N_GENES])] = np.arange(N_GENES)
    few = select(cells, gene_V[cells.genes] >= 0)
    few = CellBatch(few.joinids, few.offsets, gene_V[few.genes], few.counts, few.totals)
    types = np.array(obs["cell_type"].to_pylist())
    return {name: few.take(np.flatnonzero(types == name)[:110]) for name in TYPES}


@pytest.fixture(scope="module")
def model(pancreas) -> Scgpt:
    torch.manual_seed(SEED)
    model = Scgpt(SIZES, N_GENES)
    known = CellBatch.concatenate([cells.slice(N_TEST, 110) for cells in pancreas.values()])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / STEPS))
    rows = np.random.default_rng(SEED)
    for step in range(STEPS):
        cells = known.take(rows.choice(len(known), 16, replace=False))
        optimizer.zero_grad()
        total_loss(model(model.pretrain_inputs(cells, seed=SEED, step=step), step=step)).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def untrained() -> Scgpt:
    torch.manual_seed(0)
    return Scgpt(SIZES, N_GENES).eval()


def held_out(pancreas, name: str) -> CellBatch:
    return pancreas[name].slice(0, N_TEST)


def mean_bins(model, cells: CellBatch) -> np.ndarray:
    """The mean bin of each gene over cells; 0 where it is not expressed."""
    return np.bincount(cells.genes, model.bin_counts(cells, "test"), minlength=N_GENES) / len(cells)


def all_genes(n_cells: int) -> np.ndarray:
    return np.tile(np.arange(N_GENES), (n_cells, 1))


def correlations(a_BQ: np.ndarray, b_Q: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a_Q, b_Q)[0, 1] for a_Q in a_BQ])


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", TYPES)
def test_a_cell_prompt_generates_its_type(model, pancreas, name, steps):
    """What the state of an unseen cell says of all genes correlates best with real cells of its type."""
    (other,) = set(TYPES) - {name}
    states = cell_states(model, held_out(pancreas, name))
    bins = generate(model, all_genes(N_TEST), states_BD=states, steps=steps, output="mvc").bins_BQ
    own, others = (mean_bins(model, pancreas[kind].slice(N_TEST, 110)) for kind in (name, other))
    closer = correlations(bins, own) - correlations(bins, others)
    swapped = cell_states(model, held_out(pancreas, other))
    wrong = generate(model, all_genes(N_TEST), states_BD=swapped, steps=steps, output="mvc").bins_BQ
    further = correlations(wrong, own) - correlations(wrong, others)
    assert (closer > further.mean()).mean() >= 0.9
    assert closer.mean() > 0 > further.mean()


def test_a_cell_prompt_reaches_every_gene(untrained):
    """By the genes' own states, too, the bins depend on the state in the place of <cls>."""
    prompts = np.random.default_rng(0).normal(size=(2, N_TEST, SIZES.width)).astype(np.float32)
    bins = [seen(untrained, *np.zeros((2, N_TEST, 0)), all_genes(N_TEST), states).gep_G for states in prompts]
    assert ((bins[0] - bins[1]).abs().view(N_TEST, N_GENES).amax(0) > 1e-3).all()


@pytest.mark.parametrize("name", TYPES)
def test_a_gene_prompt_generates_the_rest_of_the_cell(model, pancreas, name):
    """Half of each unseen cell is known; the other half comes nearer than by the genes' means over both types."""
    cells = held_out(pancreas, name)
    known_N = np.arange(len(cells.genes)) % 2 == 0
    hidden = select(cells, ~known_N)
    generated = []
    for row in range(N_TEST):
        asked = hidden.genes[hidden.offsets[row] : hidden.offsets[row + 1]][None]
        generated.append(generate(model, asked, known=select(cells, known_N).take([row])).bins_BQ[0])
    truth = model.bin_counts(cells, "test")[~known_N]
    trained_on = CellBatch.concatenate([some.slice(N_TEST, 110) for some in pancreas.values()])
    mean_V = model.fit_trivial([trained_on]).numpy()
    error = np.square(np.concatenate(generated) - truth).mean()
    assert error < 0.9 * np.square(mean_V[hidden.genes] - truth).mean()


def test_a_cell_state_is_what_training_prompts_with(model, pancreas):
    cells = held_out(pancreas, "beta")
    states = cell_states(model, cells, batch_size=7)
    embedded = model.embed_cells(model.embed_inputs(cells)).detach().numpy()
    np.testing.assert_allclose(states / np.linalg.norm(states, axis=1, keepdims=True), embedded, atol=1e-5)
    prompted = model.pretrain_inputs(cells, seed=0, step=None)
    with torch.no_grad():
        first = model.predict(prompted).cls_BD
        gep_prompt = model.predict(prompted, first).gep_G - prompted["targets"]
        torch.testing.assert_close(gep_prompt.square().sum(), model(prompted)["gep_prompt"].sum, rtol=1e-4, atol=0)


def seen(model, genes_BS: np.ndarray, bins_BS: np.ndarray, asked: np.ndarray, states: np.ndarray):
    """What is predicted of genes after some others, as many of each cell, with a cell prompt."""
    cls, pad = np.full((len(asked), 1), model.cls), np.full((len(asked), 1), PAD_VALUE)
    inputs = {
        "tokens": torch.from_numpy(np.concatenate([cls, genes_BS], 1).astype(np.int32).ravel()),
        "values": torch.from_numpy(np.concatenate([pad, bins_BS], 1).astype(np.int32).ravel()),
        "layout": uniform(len(asked), 1 + genes_BS.shape[1]),
        "asked": torch.from_numpy(asked.ravel()),
        "layout_asked": uniform(*asked.shape),
    }
    with torch.no_grad():
        return model.predict(inputs, torch.from_numpy(states))


def test_steps(untrained, pancreas):
    """About equally many genes a step, the agreed ones first, each by what is known at its step."""
    model, cells = untrained, held_out(pancreas, "beta")
    states = cell_states(model, cells)
    asked = all_genes(N_TEST)[:, :50]
    once, thrice = (generate(model, asked, states_BD=states, steps=steps) for steps in (1, 3))
    assert (once.step_BQ == 1).all()
    assert [np.bincount(row).tolist() for row in thrice.step_BQ] == [[0, 16, 17, 17]] * N_TEST
    first = thrice.step_BQ == 1
    np.testing.assert_allclose(thrice.bins_BQ[first], once.bins_BQ[first], rtol=1e-5)
    predicted = seen(model, np.zeros((N_TEST, 0)), np.zeros((N_TEST, 0)), asked, states)
    apart = (predicted.gep_G - predicted.mvc_G).abs().view(asked.shape).numpy()
    for row in range(N_TEST):
        assert apart[row][first[row]].max() <= apart[row][~first[row]].min()
    steps = generate(model, asked, states_BD=states, steps=50).step_BQ
    assert (np.sort(steps) == np.arange(1, 51)).all()
    more_steps_than_genes = generate(model, asked[:, :3], states_BD=states, steps=7)
    assert (more_steps_than_genes.step_BQ > 0).all()


def test_generated_bins_are_perceived_as_whole_numbers(model, pancreas):
    """The second step sees the first one's genes with the whole bins that training shows, not with fractions."""
    cells = held_out(pancreas, "beta")
    asked, states = all_genes(N_TEST)[:, :60], cell_states(model, cells)
    out = generate(model, asked, states_BD=states, steps=2)
    first = np.argsort(out.step_BQ, axis=1, kind="stable")[:, :30]
    later = np.argsort(out.step_BQ, axis=1, kind="stable")[:, 30:]
    bins = np.take_along_axis(out.bins_BQ, first, 1)
    assert np.mean(bins != np.round(bins)) > 0.5
    genes, rest = np.take_along_axis(asked, first, 1), np.take_along_axis(asked, later, 1)

    def predicted(perceived: np.ndarray) -> np.ndarray:
        return (
            seen(model, genes, perceived, rest, states).gep_G.clamp(1, model.sizes.n_bins - 1).view(rest.shape).numpy()
        )

    second = np.take_along_axis(out.bins_BQ, later, 1)
    np.testing.assert_allclose(second, predicted(np.round(bins)), atol=1e-3)
    assert np.abs(second - predicted(np.floor(bins))).max() > 0.01


def test_the_model_stays_in_its_mode(untrained):
    cells = make_batch([{3: 1, 4: 2}])
    for training in (True, False):
        untrained.train(training)
        states = cell_states(untrained, cells)
        assert all(module.training == training for module in untrained.modules())
        generate(untrained, np.array([[1, 2]]), states_BD=states)
        assert all(module.training == training for module in untrained.modules())


@pytest.mark.parametrize("steps", [1, 3])
def test_batches_company_and_layout_change_nothing(model, pancreas, steps, monkeypatch):
    cells = held_out(pancreas, "acinar")
    known = select(cells, np.arange(len(cells.genes)) % 3 == 0)
    asked = np.stack([np.setdiff1d(np.arange(N_GENES), known.take([row]).genes)[:90] for row in range(N_TEST)])
    states = cell_states(model, cells)
    whole = generate(model, asked, known=known, states_BD=states, steps=steps)
    again = generate(model, asked, known=known, states_BD=states, steps=steps, batch_size=3)
    np.testing.assert_allclose(again.bins_BQ, whole.bins_BQ, atol=1e-4)
    for packing in (Packing("packed", grain=256), Packing("padded")):
        monkeypatch.setattr(model, "packing", packing)
        otherwise = generate(model, asked, known=known, states_BD=states, steps=steps)
        np.testing.assert_allclose(otherwise.bins_BQ, whole.bins_BQ, atol=1e-4)
    alone = generate(model, asked[4:5, ::-1], known=known.take([4]), states_BD=states[4:5], steps=steps)
    np.testing.assert_allclose(alone.bins_BQ[0, ::-1], whole.bins_BQ[4], atol=1e-4)
    assert np.array_equal(again.step_BQ, whole.step_BQ)
    assert np.array_equal(alone.step_BQ[0, ::-1], whole.step_BQ[4])


def test_values_by_a_reference_cell(model, pancreas):
    """A cell's own bins beside the cell itself are its values; those of another depth are of the other's."""
    cell = pancreas["beta"].take([0])
    bins = model.bin_counts(cell, "test")[None].astype(np.float32)
    values = values_by_reference(model, bins, cell)
    assert values.dtype == np.float32
    truth = log1p_cp10k(cell)
    assert np.corrcoef(values[0], truth)[0, 1] > 0.97
    assert [values.min(), values.max()] == pytest.approx([truth.min(), truth.max()], rel=1e-5)
    deeper = replace(cell, totals=cell.totals * 2)
    np.testing.assert_allclose(np.expm1(values_by_reference(model, bins, deeper)) * 2, np.expm1(values), rtol=1e-4)
    one_for_all = values_by_reference(model, np.repeat(bins, 3, axis=0), cell)
    assert np.array_equal(one_for_all, np.repeat(values, 3, axis=0))


def test_values_by_a_total(model):
    bins = np.array([[1, 2, 3], [1, 25.5, 50], [7, 7, 7]], np.float32)
    values = values_by_total(model, bins, np.array([7, 5000, 30]))
    counts = np.expm1(values.astype(np.float64)) * np.array([7, 5000, 30])[:, None] / 1e4
    np.testing.assert_allclose(counts[0], [1, 2, 4], rtol=1e-5)  # 1 + x + x^2 = 7
    np.testing.assert_allclose(counts.sum(1), [7, 5000, 30], rtol=1e-5)
    np.testing.assert_allclose(counts[1, 1] ** 2, counts[1, 0] * counts[1, 2], rtol=1e-4)
    np.testing.assert_allclose(counts[2], [10, 10, 10], rtol=1e-5)
    assert np.array_equal(values_by_total(model, bins[:1], 7), values[:1])


def test_what_cannot_be_generated_is_refused(untrained):
    model, cells = untrained, make_batch([{3: 1, 4: 2}, {5: 1}])
    states = cell_states(model, cells)
    asked = np.array([[1, 2], [3, 4]])
    refused = {
        "no prompt": {},
        "steps is 0": {"known": cells, "steps": 0},
        "output is 'cls'; take gep or mvc": {"known": cells, "output": "cls"},
        "1 gene prompts and genes are asked of 2": {"known": cells.take([0])},
        "1 cell prompts": {"states_BD": states[:1]},
        r"cell prompts are \(2, 5\), expected \(2, 32\)": {"states_BD": states[:, :5]},
        "asked for twice": {"known": cells, "genes_BQ": np.array([[1, 1], [3, 4]])},
        "or is known already": {"known": cells, "genes_BQ": np.array([[1, 4], [3, 4]])},
        "none of the model's 200": {"known": cells, "genes_BQ": np.array([[1, 200], [3, 4]])},
    }
    for said, changed in refused.items():
        with pytest.raises(CellmillError, match=said):
            generate(model, **{"genes_BQ": asked} | changed)
    with pytest.raises(CellmillError, match="a Geneformer cannot generate"):
        generate(Geneformer(Geneformer.presets["demo"], 10), asked, known=cells)
    with pytest.raises(CellmillError, match="a total of 1 counts is too few for 2 genes"):
        values_by_total(model, np.ones((2, 2), np.float32), 1)
    with pytest.raises(CellmillError, match="2 reference cells for 3"):
        values_by_reference(model, np.ones((3, 2), np.float32), cells)
    assert generate(model, asked, known=cells).bins_BQ.shape == (2, 2)
    assert generate(model, asked[:, :0], known=cells).bins_BQ.shape == (2, 0)
