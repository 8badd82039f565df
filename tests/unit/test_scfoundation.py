"""scFoundation's inputs and objective on hand-computed cells, its random features, its independence of the batch."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cellmill.errors import CellmillError
from cellmill.models.attention import attend
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.packing import Layout, Packing, uniform
from cellmill.models.performer import draw_projection, performer
from cellmill.models.scfoundation import Scfoundation, mask_probability
from cellmill.shards.batch import CellBatch
from cellmill.views import scfoundation as views
from cellmill.views.ragged import log1p_cp10k
from model_cells import assert_cells_are_independent, make_batch, train
from shard_cells import real_cells
from small_runs import few_genes

N_GENES = 3000
TINY = Scfoundation.Sizes(
    **{"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 32, "max_length": 300, "n_bins": 10},
    **{"decoder_layers": 2, "decoder_width": 12, "decoder_heads": 2, "decoder_hidden": 24},
)


@pytest.fixture(scope="module")
def blood(data):
    return few_genes(real_cells(data, "celltypist_sample")[0])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively(Scfoundation(TINY, N_GENES)).eval()


def lively(model: Scfoundation) -> Scfoundation:
    """Wider weights than the initial ones, so that differences show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or parameter.ndim > 1:
                parameter.copy_(
                    torch.randn(parameter.shape) * (1 if "embedding" in name else parameter.shape[1] ** -0.5)
                )
    return model


def cells_of(inputs: dict, name: str, layout: str = "layout") -> list[list]:
    """An input's values, a list for each cell."""
    layout = inputs[layout]
    return [inputs[name][start:end].tolist() for start, end in zip(layout.starts, layout.ends, strict=True)]


def asked_of(inputs: dict, name: str = "asked") -> list[list]:
    return cells_of(inputs, name, "layout_asked")


def test_published_parameter_count():
    with torch.device("meta"):
        model = Scfoundation(Scfoundation.presets["published"], Scfoundation.published_genes["published"])
    assert parameter_counts(model)["total"] == 119_252_285
    assert model.gene_embedding.weight.shape == (19_267, 768)
    assert model.decoder[5].projection.shape == (266, 64)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1), ("small", 10), ("base", 50)])
def test_presets_of_the_dial(preset, millions):
    with torch.device("meta"):
        model = Scfoundation(Scfoundation.presets[preset], 20_000)
    assert parameter_counts(model)["without_embeddings"] == pytest.approx(millions * 1e6, rel=0.1)
    assert model.sizes.max_length == 1024


# inputs


def test_inputs_by_hand():
    model = Scfoundation(TINY, 6)
    cells = make_batch([{1: 10, 4: 90}, {}], totals=[1000, 0])
    inputs = model.embed_inputs(cells)
    tokens, values = cells_of(inputs, "tokens"), cells_of(inputs, "values")
    assert tokens[0][:2] == tokens[1] == [6, 7]  # T, S
    assert sorted(tokens[0][2:]) == [1, 4]
    shown = dict(zip(tokens[0], values[0], strict=True))
    assert shown == pytest.approx({6: 3, 7: 3, 1: np.log(101), 4: np.log(901)})
    assert values[1] == [0, 0]
    assert asked_of(inputs) == [[1, 4], []]
    assert len(inputs["unread"]) == 0
    deeper = cells_of(model.embed_inputs(cells, np.array([10**5, 1])), "values")
    assert [cell[:2] for cell in deeper] == [[5, 3], [0, 0]]


def test_a_long_cell_is_read_in_part_and_seen_whole():
    model = Scfoundation(replace(TINY, max_length=4), 6)
    cells = make_batch([{0: 1, 2: 2, 3: 3, 5: 4}, {1: 1}], totals=[100, 100])
    inputs = model.embed_inputs(cells)
    read, other = cells_of(inputs, "tokens")
    assert read[:2] == [6, 7]
    assert len(read) == 4
    assert other == [6, 7, 1]
    places = inputs["unread"].tolist()
    assert set(places) | set(read[2:]) == {0, 2, 3, 5}  # the first cell's rows are its genes
    values = {0: 1, 2: 2, 3: 3, 5: 4}
    expected = [np.log1p(100 * values[gene]) for gene in places]
    assert inputs["unread_values"].tolist() == pytest.approx(expected)
    chosen = {
        tuple(sorted(cells_of(model.pretrain_inputs(cells, seed=0, step=step), "tokens")[0][2:])) for step in range(60)
    }
    assert len(chosen) > 5


def test_pretrain_inputs_are_the_views(model, blood):
    cells = blood.take(np.arange(12))
    inputs = model.pretrain_inputs(cells, seed=0, step=3)
    encoded, nonzeros, zeros = views.pretrain(cells, n_genes=N_GENES, seed=0, step=3)
    tokens, values = cells_of(inputs, "tokens"), cells_of(inputs, "values")
    columns_of = [asked_of(inputs, name) for name in ("asked", "hidden", "targets")]
    for row in range(12):
        span = slice(*encoded.genes.offsets[row : row + 2])
        expected = dict(zip(encoded.genes.genes[span].tolist(), encoded.values[span].tolist(), strict=True))
        shown = dict(zip(tokens[row], values[row], strict=True))
        mine = inputs["unread"] // (N_GENES + 2) == row
        rest = inputs["unread"][mine] % (N_GENES + 2)
        assert shown | dict(zip(rest.tolist(), inputs["unread_values"][mine].tolist(), strict=True)) == expected
        assert len(shown) + len(rest) == len(expected)
        masked = {}
        for part in (nonzeros, zeros):
            span = slice(*part.genes.offsets[row : row + 2])
            columns = (part.genes.genes[span], part.hidden[span], part.targets[span])
            masked |= {
                gene: (hidden, target) for gene, hidden, target in zip(*map(np.ndarray.tolist, columns), strict=True)
            }
        columns = (column[row] for column in columns_of)
        assert {gene: (hidden, target) for gene, hidden, target in zip(*columns, strict=True)} == masked


def test_masking_rates_over_ten_thousand_cells(blood):
    """30 % of nonzeros and 3 % of zeros, of which four fifths are hidden; half of the deep cells are thinned."""
    model = Scfoundation(TINY, N_GENES)
    cells = blood.take(np.arange(10_000) % len(blood))
    cells = CellBatch(np.arange(10_000), cells.offsets, cells.genes, cells.counts, cells.totals)
    n_hidden = n_masked = n_thinned = n_deep = 0
    n_nonzeros = expected_nonzeros = 0.0
    for start in range(0, 10_000, 500):
        part = cells.slice(start, start + 500)
        inputs = model.pretrain_inputs(part, seed=0, step=7)
        n_masked += len(inputs["asked"])
        n_hidden += inputs["hidden"].sum().item()
        n_nonzeros += (inputs["targets"] > 0).sum().item()
        expected_nonzeros += mask_probability(part).sum()
        depth = inputs["values"].numpy()[inputs["layout"].starts[:, None] + np.arange(2)]
        assert depth[:, 0] == pytest.approx(np.log10(part.totals), rel=1e-6)
        assert (depth[:, 1] <= depth[:, 0]).all()
        deep = part.totals >= views.MIN_COUNTS
        n_deep += deep.sum()
        n_thinned += (depth[deep, 1] < depth[deep, 0]).sum()
        assert (depth[~deep, 1] == depth[~deep, 0]).all()
    assert n_hidden / n_masked == pytest.approx(0.8, abs=0.002)
    assert n_thinned / n_deep == pytest.approx(0.5, abs=0.02)
    assert n_nonzeros == pytest.approx(expected_nonzeros, rel=0.01)
    n_zeros = 10_000 * N_GENES - len(cells.genes)
    assert n_masked - n_nonzeros == pytest.approx(0.03 * n_zeros, rel=0.005)


def test_mask_probability_by_hand():
    cells = make_batch([{0: 1, 1: 2}, {0: 1}], totals=[1000, 999])
    # one molecule is lost with probability 1/2 of a thinned cell, both of two with 3/10: half of the cells are thinned
    assert mask_probability(cells).tolist() == pytest.approx([0.3 * 0.75 + 0.03 * 0.25, 0.3 * 0.85 + 0.03 * 0.15, 0.3])


def test_released_depth_tokens(model):
    """A depth of one count has the value 0: ours is read nevertheless."""
    cells = make_batch([{3: 1}, {2: 4, 5: 6}], totals=[1, 10])
    assert cells_of(model.embed_inputs(cells), "tokens")[0] == [N_GENES, N_GENES + 1, 3]
    released = Scfoundation(replace(TINY, released_depth_tokens=True), N_GENES)
    released.load_state_dict(model.state_dict())
    assert cells_of(released.embed_inputs(cells, np.array([100, 10])), "tokens")[0] == [3, N_GENES]
    with pytest.raises(CellmillError, match="released_depth_tokens: a cell of at most one count"):
        released.embed_inputs(cells)
    deep = cells.take([1])
    ours, theirs = (m.eval().embed_cells(m.embed_inputs(deep)) for m in (model, released))
    assert torch.equal(ours, theirs)


# the network


def test_value_embedding_by_hand(model):
    embedding = model.value_embedding
    with torch.no_grad():
        a = embedding.linear1.weight[:, 0] * 2.5 + embedding.linear1.bias
        a = torch.where(a > 0, a, 0.1 * a)
        mixed = torch.softmax(a + embedding.linear2.weight @ a + embedding.linear2.bias, 0) @ embedding.bins.weight
        torch.testing.assert_close(embedding(torch.tensor([2.5]))[0], mixed)


def test_decoder_by_the_long_way(model, blood):
    """All positions, gene by gene as the paper says it, through the encoder, the map, every layer and both norms."""
    cells = blood.take([np.argmin(blood.lengths)])
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    with torch.no_grad():
        x_PD = model.value_embedding(torch.zeros(N_GENES + 2)).clone()
        x_PD[inputs["tokens"]] = model.encode(inputs)
        x_PD[inputs["unread"]] = model.value_embedding(inputs["unread_values"])
        x_PD[inputs["asked"][inputs["hidden"]]] = model.value_embedding.mask.weight[0]
        x_PC = model.to_decoder(x_PD + model.gene_embedding.weight[: N_GENES + 2])
        for layer in model.decoder:
            x_PC = layer(x_PC, uniform(1, N_GENES + 2))
        predicted = model.head(model.final_norm(model.decoder_norm(x_PC)))[:, 0]
        asked = inputs["asked"]
        mine = model.predict(inputs, inputs["hidden"])
        torch.testing.assert_close(mine, predicted[asked], atol=1e-5, rtol=1e-5)
        term = model(inputs)["mse"]
        torch.testing.assert_close(term.sum, (predicted[asked] - inputs["targets"]).square().sum())
        assert term.count == len(asked)


def test_hidden_genes_are_not_seen_in_training(blood):
    """Other counts at hidden genes change no input but random values, which are drawn from all genes of the cell.

    Cells of fewer than 1,000 counts are not thinned, and totals are held, so the other genes' values are the same.
    """
    model = Scfoundation(TINY, N_GENES)
    cells = blood.take(np.flatnonzero(blood.lengths > 0)[:40])
    cells = CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, np.minimum(cells.totals, 999))
    inputs = model.pretrain_inputs(cells, seed=0, step=3)
    row_Q, asked_Q = inputs["layout_asked"].rows_N, inputs["asked"]
    hidden_BV, asked_BV = (np.zeros((len(cells), N_GENES + 2), bool) for _ in range(2))
    asked_BV[row_Q, asked_Q] = True
    hidden_BV[row_Q[inputs["hidden"]], asked_Q[inputs["hidden"]]] = True
    hidden_N = hidden_BV[cells.cell_of, cells.genes]
    assert hidden_N.sum() > 1000
    counts = np.where(hidden_N, cells.counts + 7, cells.counts)
    other = model.pretrain_inputs(
        CellBatch(cells.joinids, cells.offsets, cells.genes, counts, cells.totals), seed=0, step=3
    )
    for name in ("tokens", "unread", "asked", "hidden"):
        assert torch.equal(inputs[name], other[name]), name
    assert not torch.equal(inputs["targets"], other["targets"])

    own_BV = np.zeros(hidden_BV.shape, np.float32)
    own_BV[cells.cell_of, cells.genes] = log1p_cp10k(cells)
    layout = inputs["layout"]
    gene_E = (layout.places_N >= 2).numpy()
    row_U, token_U = np.divmod(inputs["unread"].numpy(), N_GENES + 2)
    rows = np.concatenate([layout.rows_N.numpy()[gene_E], row_U])
    genes = np.concatenate([inputs["tokens"].numpy()[gene_E], token_U])
    one, two = (np.concatenate([x["values"].numpy()[gene_E], x["unread_values"]]) for x in (inputs, other))
    masked = asked_BV[rows, genes]
    assert not hidden_BV[rows, genes].any()
    np.testing.assert_allclose(one[~masked], own_BV[rows, genes][~masked], rtol=1e-6)
    np.testing.assert_array_equal(one[~masked], two[~masked])
    # of the masked genes that are shown, one half are left as they are, and their counts are the same
    changed = (one != two)[masked]
    assert 0 < changed.sum() < 0.5 * masked.sum()
    assert torch.equal(inputs["values"][~gene_E], other["values"][~gene_E])


def test_genes_asked_for_are_not_seen(model, blood):
    """The mask stands in the place of every gene that is asked for, so one changes what another is thought to be."""
    cells = blood.take([0])
    visible = np.ones(len(cells.genes), bool)
    hidden = np.arange(0, len(cells.genes), 5)
    visible[hidden] = False
    offsets = np.array([0, visible.sum()])
    seen = CellBatch(cells.joinids, offsets, cells.genes[visible], cells.counts[visible], cells.totals)
    inputs = model.impute_inputs(seen, cells.genes[hidden][None])
    out = model.impute(inputs)
    assert out.values_BQ.shape == out.detection_BQ.shape == (1, len(hidden))
    assert out.values_BQ.dtype == torch.float32
    # two genes that are both asked for see the mask in each other's place: alone, the other is seen as a zero
    alone = model.impute(model.impute_inputs(seen, cells.genes[hidden][None, :1])).values_BQ
    assert (alone[0, 0] - out.values_BQ[0, 0]).abs() > 1e-6


def test_random_features_approach_exact_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(100, 2, 8) * 0.7 for _ in range(3))
    exact = attend(q, k, v, uniform(2, 50))
    errors = []
    for n_features in (16, 256, 4096):
        out = [performer(q, k, v, draw_projection(n_features, 8, i), uniform(2, 50), uniform(2, 50)) for i in range(4)]
        errors.append((torch.stack(out) - exact).square().mean().sqrt().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.2 * exact.std().item()


def plain_performer(q_LHK, k_PHK, v_PHK, projection_FK) -> torch.Tensor:
    """One cell, all features at once, differentiated by torch."""
    q_HLK, k_HPK, v_HPK = (x.transpose(0, 1) for x in (q_LHK, k_PHK, v_PHK))
    scale = q_HLK.shape[2] ** -0.25

    def features(x, over):
        product = x @ (projection_FK.T * scale)
        norm = x.square().sum(2, keepdim=True) * (scale**2 / 2)
        return torch.exp(product - norm - product.detach().amax(over, keepdim=True)) + 1e-4

    weights_HLP = features(q_HLK, (2,)) @ features(k_HPK, (0, 1, 2)).mT
    return (weights_HLP / weights_HLP.sum(2, keepdim=True) @ v_HPK).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("packing", [Packing(), Packing("padded"), Packing(grain=64)])
def test_performer_piece_by_piece_equals_all_at_once(packing, monkeypatch):
    """In float64's stead: values and gradients of cells of many lengths, in pieces that cut them unevenly."""
    monkeypatch.setattr("cellmill.models.performer.ON_CPU", 7 * 2 * 20)
    torch.manual_seed(0)
    queries, keys = (packing.layout(np.array(lengths)) for lengths in ([5, 0, 17, 1], [40, 3, 9, 1]))
    projection = draw_projection(20, 8, 0)
    q, k, v = (torch.randn(layout.n_slots, 2, 8, requires_grad=True) for layout in (queries, keys, keys))
    out = performer(q, k, v, projection, queries, keys)
    assert (out[~queries.used_N] == 0).all()
    expected = [
        plain_performer(q[q0:q1], k[k0:k1], v[k0:k1], projection)
        for q0, q1, k0, k1 in zip(queries.starts, queries.ends, keys.starts, keys.ends, strict=True)
    ]
    expected, out = torch.cat(expected), out[queries.used_N]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(out)
    gradients = [torch.autograd.grad((x * direction).sum(), (q, k, v)) for x in (out, expected)]
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_performer_and_dense_decoder_agree_with_many_features(blood):
    cells = blood.take([0, 1])
    torch.manual_seed(0)
    model = lively(Scfoundation(TINY, N_GENES)).eval()
    with torch.no_grad():
        for layer in model.decoder:
            layer.attention.qkv.weight[:24] *= 0.5  # queries and keys: as many features as this need moderate logits
    dense = Scfoundation(replace(TINY, decoder_attention="dense"), N_GENES).eval()
    many = Scfoundation(replace(TINY, n_features=4096), N_GENES).eval()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "projection" not in name}
    dense.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "steps_since_redraw"})
    assert not many.load_state_dict(tensors, strict=False).unexpected_keys
    with torch.no_grad():
        exact, close, far = (m(m.pretrain_inputs(cells, seed=0, step=None))["mse"].sum for m in (dense, many, model))
    assert (close - exact).abs() < 0.02 * exact
    assert (close - exact).abs() < (far - exact).abs()


def test_projections_are_orthogonal_and_of_normal_lengths():
    rows = draw_projection(20, 8, 0)
    assert rows.shape == (20, 8)
    directions = F.normalize(rows, dim=1)
    for start in (0, 8, 16):
        block = directions[start : start + 8]
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = draw_projection(4000, 8, 1)
    assert many.square().sum(1).mean().item() == pytest.approx(8, rel=0.05)
    assert many.mean().item() == pytest.approx(0, abs=0.03)
    assert torch.equal(rows, draw_projection(20, 8, 0))
    assert not torch.equal(rows, draw_projection(20, 8, 1))


def test_redraws_depend_on_the_step_alone(blood):
    cells = blood.take([0])
    sizes = replace(TINY, redraw_every=10)

    def after(steps, **changes):
        torch.manual_seed(0)
        model = Scfoundation(replace(sizes, **changes), N_GENES).train()
        for step in steps:
            model(model.pretrain_inputs(cells, seed=0, step=step), step=step)
        return [layer.projection.clone() for layer in model.decoder], int(model.steps_since_redraw)

    (first, _), (same, since), (second, _) = after([]), after([0, 3, 9]), after([0, 9, 10])
    assert since == 9
    for a, b, c, d, e in zip(first, same, second, after([17])[0], after([25])[0], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, c)
        assert not torch.equal(c, e)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(after([17], redraw_every=0)[0][0], first[0])
    model = Scfoundation(sizes, N_GENES).eval()  # fixed in evaluation
    before = model.decoder[0].projection.clone()
    model(model.pretrain_inputs(cells, seed=0, step=None))
    assert torch.equal(before, model.decoder[0].projection)


def test_training_goes_on_to_the_bit_across_redraws(blood):
    """From weights and optimiser alone: a fresh model that is filled with them draws the features of the step."""
    sizes = replace(TINY, redraw_every=3, dropout=0.0)

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            inputs = model.pretrain_inputs(blood.slice(2 * step, 2 * step + 2), seed=0, step=step)
            total_loss(model(inputs, step=step)).backward()
            optimizer.step()

    def fresh(seed):
        torch.manual_seed(seed)
        model = Scfoundation(sizes, N_GENES).train()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    (whole, optimizer), (again, other) = fresh(0), fresh(1)
    steps(whole, optimizer, 0, 5)
    again.load_state_dict(whole.state_dict())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, 5, 8)
    steps(again, other, 5, 8)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_bfloat16(model, blood):
    inputs = model.pretrain_inputs(blood.slice(0, 3), seed=0, step=None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(inputs)["mse"]
    with torch.no_grad():
        exact = total_loss(model(inputs))
    assert rounded.sum.dtype == torch.float32
    assert total_loss({"mse": rounded}).item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("attention", ["performer", "dense"])
def test_a_cell_does_not_depend_on_its_batch(attention, blood):
    torch.manual_seed(0)
    model = lively(Scfoundation(replace(TINY, decoder_attention=attention), N_GENES)).eval()
    shortest, longest = np.argsort(blood.lengths)[[0, -1]]
    cells = blood.take([shortest, longest, *range(5)])
    assert_cells_are_independent(model, cells, 4)
    genes_BQ = np.array(
        [np.setdiff1d(np.arange(200), cells.genes[slice(*cells.offsets[i : i + 2])])[:20] for i in range(7)]
    )
    with torch.no_grad():
        together = model.impute(model.impute_inputs(cells, genes_BQ)).values_BQ
        states = model.gene_states(model.embed_inputs(cells))
        for row in (0, 1, 5):
            alone = model.impute(model.impute_inputs(cells.take([row]), genes_BQ[[row]])).values_BQ
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
            one = model.gene_states(model.embed_inputs(cells.take([row])))
            torch.testing.assert_close(one.states_ND, states.states_ND[states.cells_N == row], atol=2e-5, rtol=1e-5)
    assert np.array_equal(states.genes_N, cells.genes)
    assert np.array_equal(states.cells_N, cells.cell_of)
    assert states.states_ND.shape == (len(cells.genes), 12)


def test_micro_batches_give_the_gradient_of_the_batch(blood):
    torch.manual_seed(0)
    model = Scfoundation(replace(TINY, dropout=0.0), N_GENES).train()
    cells, gradients = blood.take(np.arange(6)), []
    for size in (6, 2):
        model.zero_grad()
        parts = [model.pretrain_inputs(cells.slice(i, i + size), seed=0, step=0) for i in range(0, 6, size)]
        count = sum(model.loss_counts(part, step=0)["mse"] for part in parts)
        for part in parts:
            (model(part, step=0)["mse"].sum / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


# embeddings


def test_poolings(model, blood):
    inputs = model.embed_inputs(blood.take(np.argsort(blood.lengths)[:3]))
    with torch.no_grad():
        states, layout = model.encode(inputs), inputs["layout"]
        every = model.embed_cells(inputs)
        parts = {name: model.embed_cells(inputs, name) for name in model.poolings}
    assert every.shape == (3, 64)
    for row in range(3):
        valid = states[layout.starts[row] : layout.ends[row]]
        expected = [valid[1], valid[0], valid[2:].amax(0), valid[2:].mean(0)]
        torch.testing.assert_close(every[row], torch.cat(expected))
        torch.testing.assert_close(parts["max"][row], valid.amax(0))
        for name, part in zip(("source", "target", "mean"), (0, 1, 3), strict=True):
            torch.testing.assert_close(parts[name][row], expected[part])
    with pytest.raises(CellmillError, match="no pooling 'cls'.*one of all, max"):
        model.embed_cells(inputs, "cls")


def test_an_empty_cell(model):
    cells = make_batch([{}, {0: 1}], totals=[0, 5])
    with torch.no_grad():
        for batch in (cells, cells.take([0])):
            embedded = model.embed_cells(model.embed_inputs(batch))
            assert embedded.isfinite().all()
            assert (embedded[0, 32:] == 0).all()
        assert len(model.gene_states(model.embed_inputs(cells.take([0]))).genes_N) == 0
    loss = total_loss(model(model.pretrain_inputs(cells, seed=0, step=None)))
    assert loss.isfinite()


def test_gene_embeddings(model):
    assert torch.equal(model.embed_genes(), model.gene_embedding.weight[:N_GENES])


# training


def test_trivial_baseline_by_hand():
    model = Scfoundation(TINY, 3)
    cells = make_batch([{0: 5, 1: 10}, {0: 5}], totals=[100, 200])  # too shallow to be thinned
    trivial = model.fit_trivial([cells.take([0]), cells.take([1])])
    values = np.log1p(np.array([500, 1000, 250]))
    expected = [(values[0] + values[2]) / 2, 0.3 * values[1] / 0.33, 0]
    assert trivial.tolist() == pytest.approx(expected, rel=1e-6)
    asked, targets = torch.tensor([0, 2, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 9.0])
    layout = Layout(np.array([2, 1]), np.array([0, 2]), 4)
    inputs = {"asked": asked, "targets": targets, "layout_asked": layout}
    term = model.trivial_losses(inputs, trivial)["mse"]
    assert term.count == 3
    assert term.sum.item() == pytest.approx((expected[0] - 1) ** 2 + 4 + (expected[1] - 3) ** 2, rel=1e-5)


def test_trivial_baseline_is_the_best_constant_of_each_gene(blood):
    """No other number a gene does better over many draws, for the genes that are masked often."""
    model = Scfoundation(TINY, N_GENES)
    cells = blood.take(np.arange(300))
    trivial = model.fit_trivial([cells])
    sums, counts = torch.zeros(N_GENES + 3), torch.zeros(N_GENES + 3)
    for step in range(40):
        inputs = model.pretrain_inputs(cells, seed=0, step=step)
        sums.index_add_(0, inputs["asked"], inputs["targets"])
        counts.index_add_(0, inputs["asked"], torch.ones(len(inputs["asked"])))
    often = counts[:N_GENES] > 2000
    assert often.sum() > 10
    means = (sums / counts.clamp(min=1))[:N_GENES][often]
    torch.testing.assert_close(trivial[often], means, atol=0.06, rtol=0.05)
    assert (trivial[often] - means).mean().abs() < 0.01


def test_learns_below_the_trivial_baseline(blood):
    torch.manual_seed(0)
    kept = blood.genes < 600
    offsets = np.concatenate([[0], np.cumsum(kept)])[blood.offsets]
    cells = CellBatch(blood.joinids, offsets, blood.genes[kept], blood.counts[kept], blood.totals).take(np.arange(16))
    model = Scfoundation(replace(TINY, n_layers=1, decoder_layers=1, dropout=0.0), 600)
    trivial = model.fit_trivial([cells])
    baseline = total_loss(model.trivial_losses(model.pretrain_inputs(cells, seed=0, step=None), trivial))
    assert train(model, cells, steps=200, learning_rate=1e-2) < baseline.item()


def test_embeddings_may_be_asked_at_one_depth(model, blood):
    """T is that of `embedding_depth` in embeddings; imputation, and a depth that is given, keep theirs."""
    cells = blood.take(np.arange(6))
    deep = Scfoundation(replace(TINY, embedding_depth=4.0), N_GENES).eval()
    deep.load_state_dict(model.state_dict())
    own = np.log10(cells.totals)
    inputs = deep.embed_inputs(cells)

    def depths(inputs, place=0):
        return inputs["values"][inputs["layout"].starts_B + place].tolist()

    assert depths(inputs) == [4] * 6
    assert depths(inputs, 1) == pytest.approx(own)
    assert depths(model.embed_inputs(cells)) == pytest.approx(own)
    assert depths(deep.embed_inputs(cells, np.full(6, 100))) == [2] * 6
    assert depths(deep.impute_inputs(cells, np.zeros((6, 1)))) == pytest.approx(own)
    with torch.no_grad():
        moved = deep.embed_cells(inputs) - model.embed_cells(model.embed_inputs(cells))
    assert moved.abs().max() > 1e-3


def test_impossible_sizes():
    with pytest.raises(CellmillError, match="decoder_width 12 is no multiple of decoder_heads 5"):
        replace(TINY, decoder_heads=5)
