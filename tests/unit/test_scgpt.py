"""scGPT: view and objective by hand, the attention rule, what is read out, cells that do not depend on their batch.

All but `test_layouts_and_ways_to_attend_agree` lay out cells packed, as training does.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.models import scgpt
from cellmill.models.attention import attend, attention_backend
from cellmill.models.base import parameter_counts, total_loss
from cellmill.models.packing import Packing
from cellmill.models.scgpt import PAD_VALUE, Scgpt, value_of_bins
from cellmill.randomness import uniform
from cellmill.views.ragged import log1p_cp10k
from cellmill.views.scgpt import count_edges
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
    assert parameter_counts(model)["total"] == 51_856_898
    with torch.device("meta"):
        flagged = Scgpt(replace(model.sizes, flag_embedding=True), model.n_genes)
    assert parameter_counts(flagged)["total"] == 51_856_898 + 2 * 512
    assert parameter_counts(flagged)["without_embeddings"] == parameter_counts(model)["without_embeddings"]


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


def cell_of(inputs, name: str, row: int) -> torch.Tensor:
    """What stands in `inputs[name]` of one cell."""
    layout = inputs["layout" if name in ("tokens", "values") else "layout_asked"]
    return inputs[name][layout.starts[row] : layout.ends[row]]


def test_inputs_of_small_cells(model):
    cells = make_batch([{5: 3}, {}, {1: 1, 9: 2}], totals=[3, 0, 50])
    inputs = model.embed_inputs(cells)
    tokens, values = inputs["tokens"], inputs["values"]
    assert tokens.shape == values.shape == (6,)
    assert cell_of(inputs, "tokens", 0).tolist() == [model.cls, 5]
    assert cell_of(inputs, "tokens", 1).tolist() == [model.cls]
    assert sorted(cell_of(inputs, "tokens", 2).tolist()) == [1, 9, model.cls]
    assert torch.equal(values == PAD_VALUE, tokens == model.cls)
    assert (values[tokens < N_GENES] >= 1).all()
    embedded = model.embed_cells(inputs)
    assert embedded.isfinite().all()
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    # one gene: floor(1 r) = 0 genes are hidden, whatever r
    loss = total_loss(model(model.pretrain_inputs(cells.take([0, 1]), seed=0, step=20), step=20))
    assert loss == 0
    loss.backward()


def test_token_lengths(model, blood):
    cells = type(blood).concatenate([make_batch([{}, {5: 3}]), blood])
    lengths = model.token_lengths(cells)
    assert lengths[:2].tolist() == [1, 2]
    assert lengths.max() == TINY.max_length
    inputs = model.pretrain_inputs(cells, seed=0, step=3)
    assert np.array_equal(inputs["layout"].lengths + inputs["layout_asked"].lengths, lengths)


def test_long_cells_keep_a_random_subset(model, blood):
    cell = blood.take([int(np.argmax(blood.lengths))])
    assert len(cell.genes) > 300
    tokens = model.embed_inputs(cell)["tokens"]
    assert tokens.shape == (301,)
    kept = tokens[1:].numpy()
    assert len(set(kept)) == 300
    assert set(kept) <= set(cell.genes)
    assert kept.mean() == pytest.approx(cell.genes.mean(), rel=0.15)
    assert torch.equal(model.embed_inputs(cell)["tokens"], tokens)
    other = model.pretrain_inputs(cell, seed=0, step=1)["tokens"]
    assert len(set(other[1:].numpy()) & set(kept)) < 250


def test_bins_come_before_subsampling(model, blood):
    """A subset keeps the bins that its genes have among all genes of the cell."""
    cell = blood.take([int(np.argmax(blood.lengths))])
    inputs = model.embed_inputs(cell)
    bin_of = dict(zip(cell.genes, model.bin_counts(cell, "embed", 0), strict=True))
    assert inputs["values"][1:].tolist() == [bin_of[gene] for gene in inputs["tokens"][1:].tolist()]


def test_hidden_shares(model, blood):
    """Over 10,000 cells of which a quarter, a half or three quarters are hidden, each share in a third of the steps."""
    shares, cells = [], blood.take([0, 1, 2])
    for step in range(60):
        inputs = model.pretrain_inputs(cells, seed=0, step=step)
        hidden = inputs["layout_asked"].lengths
        n_genes = hidden + inputs["layout"].lengths - 1
        shares.append(next(r for r in (0.25, 0.5, 0.75) if np.array_equal(hidden, np.floor(n_genes * r))))
    assert {shares.count(r) >= 10 for r in (0.25, 0.5, 0.75)} == {True}
    assert model.pretrain_inputs(blood.take([0]), seed=0, step=None)["asked"].shape == (150,)


def test_hidden_share_over_ten_thousand_cells(data, blood):
    model = Scgpt(replace(TINY, max_length=1200), N_GENES)
    hidden = total = 0
    steps = 10_000 // len(blood) + 1
    for step in range(steps):
        inputs = model.pretrain_inputs(blood, seed=0, step=step)
        hidden += len(inputs["asked"])
        total += len(inputs["tokens"]) - len(blood) + len(inputs["asked"])
    shares = [scgpt.views.HIDDEN_SHARES[int(uniform("scgpt share", 0, step)[0] * 3)] for step in range(steps)]
    assert steps * len(blood) >= 10_000
    assert hidden / total == pytest.approx(np.mean(shares), abs=1e-3)
    many = [scgpt.views.HIDDEN_SHARES[int(uniform("scgpt share", 0, step)[0] * 3)] for step in range(10_000)]
    assert np.mean(many) == pytest.approx(0.5, abs=0.01)


def test_perceived_and_hidden_genes_are_the_cell(model, blood):
    cell = blood.take([int(np.argmin(blood.lengths))])
    whole = Scgpt(replace(TINY, max_length=4000), N_GENES)
    inputs = whole.pretrain_inputs(cell, seed=0, step=5)
    shown = inputs["tokens"][1:].tolist()
    assert sorted(shown + inputs["asked"].tolist()) == cell.genes.tolist()
    bin_of = dict(zip(cell.genes.tolist(), whole.bin_counts(cell, 0, 5).tolist(), strict=True))
    assert inputs["values"][1:].tolist() == [bin_of[gene] for gene in shown]
    assert inputs["targets"].tolist() == [bin_of[gene] for gene in inputs["asked"].tolist()]
    few = make_batch([{3: 1, 4: 2, 5: 3, 6: 4}, {7: 1}])
    inputs = model.pretrain_inputs(few, seed=0, step=None)
    assert inputs["asked"].shape == inputs["targets"].shape == (2,)
    assert inputs["layout_asked"].lengths.tolist() == [2, 0]
    assert model(inputs)["gep"].count == 2


def states(model, inputs, x, g) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode(x, inputs["layout"], g, inputs["layout_asked"])


def test_attention_rule(model, blood):
    """Perceived tokens see no hidden one; a hidden token sees the perceived ones and itself, no other hidden one."""
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    torch.manual_seed(1)
    x, g = torch.randn(*inputs["tokens"].shape, 16), torch.randn(*inputs["asked"].shape, 16)
    h_x, h_g = states(model, inputs, x, g)
    moved_g = g.index_fill(0, torch.tensor(3), 1.0)
    again_x, again_g = states(model, inputs, x, moved_g)
    assert torch.equal(again_x, h_x)
    changed = (again_g - h_g).abs().sum(1)
    assert changed[3] > 1e-3
    changed[3] = 0
    assert changed.max() < 1e-6
    moved_x = x.index_fill(0, torch.tensor(5), 1.0)
    moved = states(model, inputs, moved_x, g)
    for layout, again, h in zip((inputs["layout"], inputs["layout_asked"]), moved, (h_x, h_g), strict=True):
        changed = (again - h).abs().sum(1)
        assert (changed[layout.starts[0] : layout.ends[0]] > 1e-7).all()
        assert changed[layout.starts[1] : layout.ends[1]].max() == 0


def test_the_rule_written_as_one_mask(model, blood):
    """Both kinds of tokens of a cell in one sequence under the paper's mask, by plain attention."""
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    torch.manual_seed(1)
    x, g = torch.randn(*inputs["tokens"].shape, 16), torch.randn(*inputs["asked"].shape, 16)
    h_x, h_g = states(model, inputs, x, g)
    for row in range(2):
        (p0, p1), (g0, g1) = ((inputs[name].starts[row], inputs[name].ends[row]) for name in ("layout", "layout_asked"))
        together = torch.cat([x[p0:p1], g[g0:g1]])
        mask = torch.eye(len(together), dtype=torch.bool)
        mask[:, : p1 - p0] = True
        with torch.no_grad():
            for layer in model.layers:
                q, k, v = (part.transpose(0, 1) for part in layer.attention.project(together))
                context = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                together = layer._after(together, layer.attention.out(context.transpose(0, 1).flatten(1)))
        torch.testing.assert_close(torch.cat([h_x[p0:p1], h_g[g0:g1]]), together, atol=1e-5, rtol=1e-5)


LAYOUTS = [Packing("packed", grain=256), Packing("padded")]
WAYS = ["reference", "padded"]


@pytest.mark.parametrize(
    ("packing", "way"),
    [*((packing, None) for packing in LAYOUTS), *((LAYOUTS[0], way) for way in WAYS)],
    ids=lambda value: getattr(value, "kind", value),
)
def test_layouts_and_ways_to_attend_agree(blood, packing, way):
    """Losses, gradients and embeddings are those of packed cells, each attended to alone."""
    torch.manual_seed(0)
    cells = type(blood).concatenate([make_batch([{7: 2, 11: 1, 500: 1, 3000: 4}, {9: 1}]), blood.take([0, 1, 2])])
    model = Scgpt(replace(TINY, dropout=0.0, max_length=101), N_GENES)

    def found() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = model(model.pretrain_inputs(cells, seed=0, step=None))
        total_loss(losses).backward()
        results = {name: term.sum.detach() / term.count for name, term in losses.items()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[name] = parameter.grad.clone()
        with torch.no_grad():
            for pooling in model.poolings:
                results[pooling] = model.embed_cells(model.embed_inputs(cells), pooling)
            results["genes"] = model.gene_states(model.embed_inputs(cells)).states_ND
        return results

    expected = found()
    model.packing = packing
    assert len(model.embed_inputs(cells)["tokens"]) > len(model.embed_inputs(cells)["tokens"].unique())
    if way is None:
        others = found()
    else:
        with attention_backend(way):
            others = found()
    assert others.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1)  # of a gradient: that of its largest entry
        torch.testing.assert_close(others[name] / scale, value / scale, atol=1e-5, rtol=1e-5, msg=name)


def test_only_cls_is_the_state_of_cls(model, blood):
    inputs = model.embed_inputs(blood.take([0, 1, 2]))
    with torch.no_grad():
        every, cls = model.states(inputs), model.states(inputs, only_cls=True)
    torch.testing.assert_close(cls, every[inputs["layout"].starts], atol=1e-5, rtol=1e-5)


def test_each_value_is_encoded_as_by_itself(model):
    """The table of values is the network written out."""
    encoder = model.value_encoder
    values = torch.tensor([PAD_VALUE, 1, 50, 7, 7], dtype=torch.int32)
    with torch.no_grad():
        hidden = torch.relu(encoder.linear1(values[:, None].float()))
        torch.testing.assert_close(encoder(values), encoder.norm(encoder.linear2(hidden)))
    huge = Scgpt(replace(TINY, n_bins=700), 8).eval().value_encoder(torch.tensor([511, 512, 513, 699]))
    assert torch.equal(huge[1], huge[2])
    assert torch.equal(huge[1], huge[3])
    assert not torch.equal(huge[0], huge[1])


def test_loss_counts(model, blood):
    inputs = model.pretrain_inputs(blood.take([0, 1, 2]), seed=0, step=9)
    for step in (9, 10, None):
        counts = model.loss_counts(inputs, step=step)
        assert counts == {name: term.count for name, term in model(inputs, step=step).items()}
    assert counts["gep"] == len(inputs["asked"])


@pytest.mark.parametrize("quirk", [False, True])
def test_flops_are_those_of_the_products(blood, quirk, monkeypatch):
    """Counted by torch while the objective is computed, but for attention, which is asked for its queries and keys."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Scgpt(replace(TINY, hidden=24, released_gen_stream=quirk), N_GENES).eval()
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    pairs = []

    def counted(q, k, v, queries, keys, *, own=None, dropout=0.0):
        pairs.append(int((queries.lengths * (keys.lengths + (own is not None))).sum()))
        return torch.zeros_like(q).flatten(1)

    assert attend is scgpt.attend
    monkeypatch.setattr(scgpt, "attend", counted)
    for step, passes in ((9, 1), (None, 2)):
        pairs.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs, step=step)
        products = counter.get_total_flops() + 4 * 16 * sum(pairs)
        products -= 2 * (TINY.n_bins - PAD_VALUE) * (16 + 16 * 16)  # the table of values is an embedding
        products += 2 * 16 * len(inputs["asked"])  # an inner product by hand
        assert model.body_flops(inputs, step=step) == products
        assert len(pairs) == 2 * TINY.n_layers * passes


def test_in_bfloat16_states_are_half_as_wide_and_losses_are_not(model, blood):
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    widths = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: widths.extend(h.dtype for h in out)) for layer in model.layers
    ]
    with torch.no_grad():
        expected = model(inputs)
        assert set(widths) == {torch.float32}
        widths.clear()
        with torch.autocast("cpu", torch.bfloat16):
            losses, predicted = model(inputs), model.predict(inputs)
    for hook in hooks:
        hook.remove()
    assert set(widths) == {torch.bfloat16}
    assert predicted.gep_G.dtype == predicted.mvc_G.dtype == torch.float32
    for name, term in losses.items():
        assert term.sum.dtype == torch.float32
        torch.testing.assert_close(term.sum, expected[name].sum, rtol=1e-3, atol=0)


def test_terms_and_cell_prompt(model, blood):
    cells = blood.take([0, 1])
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    assert list(model(inputs, step=0)) == ["gep", "mvc"]
    assert list(model(inputs, step=9)) == ["gep", "mvc"]
    assert list(model(inputs, step=10)) == ["gep", "mvc", "gep_prompt"]
    assert list(model(inputs, step=None)) == ["gep", "mvc", "gep_prompt"]
    losses = model(inputs)
    assert losses["gep_prompt"].sum != losses["gep"].sum


def test_predictions_are_what_the_terms_judge(model, blood):
    inputs = model.pretrain_inputs(blood.take([0, 1]), seed=0, step=None)
    with torch.no_grad():
        losses, first = model(inputs), model.predict(inputs)
        second = model.predict(inputs, first.cls_BD)
    for name, bins in {"gep": first.gep_G, "mvc": first.mvc_G, "gep_prompt": second.gep_G}.items():
        torch.testing.assert_close((bins - inputs["targets"]).square().sum(), losses[name].sum, rtol=1e-5, atol=0)
    assert torch.equal(second.mvc_G, first.mvc_G)


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
    with torch.no_grad():
        cls = model.predict(inputs).cls_BD[0]
        genes = model.gene_norm(model.gene_embedding(inputs["asked"]))
        query = model.mvc_weight(torch.sigmoid(model.mvc_query(genes)))
        expected = ((query @ cls - inputs["targets"]) ** 2).sum()
        torch.testing.assert_close(model(inputs)["mvc"].sum, expected, rtol=1e-5, atol=0)


def test_objective_by_hand():
    """A network of zeros but for the decoder's last bias says 3 for every gene, and its <cls> state says 0."""
    model = Scgpt(replace(TINY, n_bins=5, n_layers=1), 8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder[-1].bias.fill_(3.0)
    cells = make_batch([{0: 1, 1: 2, 2: 3, 3: 4}])  # bins 1, 2, 3, 4
    inputs = model.pretrain_inputs(cells, seed=0, step=None)
    targets = inputs["targets"]
    assert sorted(targets.tolist()) == [gene + 1 for gene in sorted(inputs["asked"].tolist())]
    losses = model(inputs)
    assert losses["gep"] == losses["gep_prompt"] == ((targets - 3).square().sum(), 2)
    assert losses["mvc"] == (targets.square().sum(), 2)


def test_flag_of_hidden_genes(model, blood):
    """With a flag, hidden genes go in as gene plus row 1; without, as the gene alone."""
    bare = Scgpt(replace(TINY, flag_embedding=False), N_GENES).eval()
    bare.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("flag")})
    inputs = model.pretrain_inputs(blood.take([0]), seed=0, step=None)
    flagged = Scgpt(TINY, N_GENES).eval()
    flagged.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert model(inputs)["gep"].sum != bare(inputs)["gep"].sum
        flagged.flag_embedding.weight[1] = 0
        torch.testing.assert_close(flagged(inputs)["gep"].sum, bare(inputs)["gep"].sum)
    assert torch.equal(
        bare.embed_cells(bare.embed_inputs(blood.take([0]))), model.embed_cells(model.embed_inputs(blood.take([0])))
    )


def test_spread_values_switch_units_on_all_over_the_bins():
    """As released, all units switch within the first bin: linear1 has inputs up to 50 and biases below 1."""
    switching = {}
    for init in ("released", "spread"):
        torch.manual_seed(0)
        linear = Scgpt(replace(TINY, width=64, value_init=init), 8).value_encoder.linear1
        kinks = -linear.bias.detach() / linear.weight.detach()[:, 0]
        switching[init] = int(((kinks > 10) & (kinks < 50)).sum())
    assert switching["released"] <= 4
    assert 40 < switching["spread"] < 60


def test_released_gen_stream_skips_the_projection_of_hidden_genes(model, blood):
    quirk = Scgpt(replace(TINY, released_gen_stream=True), N_GENES).eval()
    quirk.load_state_dict(model.state_dict())
    inputs = model.pretrain_inputs(blood.take([0]), seed=0, step=None)
    a, b = model(inputs), quirk(inputs)
    assert a["gep"].sum != b["gep"].sum
    torch.testing.assert_close(a["mvc"].sum, b["mvc"].sum)  # <cls> sees perceived genes only
    inputs = model.embed_inputs(blood.take([0]))
    assert torch.equal(model.embed_cells(inputs), quirk.embed_cells(inputs))


@pytest.mark.parametrize(
    "packing", [Packing(), Packing("padded"), Packing(grain=64)], ids=["packed", "padded", "grain"]
)
@pytest.mark.parametrize("prompted", [False, True])
def test_asked_in_pieces_genes_get_the_same_answers(model, blood, packing, prompted, monkeypatch):
    """Of cells that are asked for few genes, and for many in several pieces; the pieces are all that is attended."""
    monkeypatch.setattr(model, "packing", packing)
    short = make_batch([{gene: 1 + gene % 7 for gene in range(0, 400, 10)}])
    inputs = model.pretrain_inputs(
        type(blood).concatenate([blood.take([0, 1]), short, blood.take([2])]), seed=0, step=None
    )
    asked = inputs["layout_asked"]
    assert asked.lengths.min() < 30 < 2 * 30 < asked.longest
    states_BD = torch.randn(4, 16) if prompted else None
    with torch.no_grad():
        whole = model.predict(inputs, states_BD)
        monkeypatch.setattr(scgpt, "ASKED_AT_ONCE", 30)
        longest = []
        monkeypatch.setattr(scgpt, "attend", lambda *of, **kinds: longest.append(of[3].longest) or attend(*of, **kinds))
        pieces = model.predict(inputs, states_BD)
    used_G = asked.used_N
    torch.testing.assert_close(pieces.gep_G[used_G], whole.gep_G[used_G], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pieces.mvc_G[used_G], whole.mvc_G[used_G], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pieces.cls_BD, whole.cls_BD, atol=1e-5, rtol=1e-5)
    assert longest.count(30) >= TINY.n_layers * (asked.longest // 30)


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
    asked = torch.tensor([3, model.pad, 3, 5])
    batch = {
        "asked": asked,
        "targets": trivial[asked] + torch.tensor([1.0, 9.0, 2.0, 3.0]),
        "layout_asked": Packing("padded").layout([1, 2]),
    }
    losses = model.trivial_losses(batch, trivial)
    assert {name: (term.sum.item(), term.count.item()) for name, term in losses.items()} == dict.fromkeys(
        ("gep", "mvc", "gep_prompt"), (14, 3)
    )


def test_poolings(model, blood):
    cells = type(blood).concatenate([make_batch([{}, {5: 3}]), blood.take([0])])
    inputs = model.embed_inputs(cells)
    cls, mean = (model.embed_cells(inputs, pooling) for pooling in ("cls", "mean"))
    assert torch.equal(cls, model.embed_cells(inputs))
    with torch.no_grad():
        h = model.states(inputs)
    torch.testing.assert_close(cls, torch.nn.functional.normalize(h[[0, 1, 3]], dim=1))
    torch.testing.assert_close(mean[1], torch.nn.functional.normalize(h[2], dim=0))
    torch.testing.assert_close(mean[2], torch.nn.functional.normalize(h[4:].mean(0), dim=0))
    assert mean[0].abs().max() == 0


def test_gene_states(model, blood):
    cells = blood.take([3, 4])
    inputs = model.embed_inputs(cells)
    found = model.gene_states(inputs)
    assert len(found.cells_N) == 600
    assert torch.bincount(found.cells_N).tolist() == [300, 300]
    assert found.genes_N[300:].tolist() == cell_of(inputs, "tokens", 1)[1:].tolist()
    place = 301 + 1 + 150  # behind the first cell and the second one's <cls>
    assert found.genes_N[450] == inputs["tokens"][place]
    assert torch.equal(found.states_ND[450], model.states(inputs)[place])


def test_values_of_bins_by_hand():
    """Five bins: edges 1, 2, 3 and 5 of the counts 1 1 2 3 3 4 5 (places 0, 2, 4, 6), linear in between."""
    cells = make_batch([{0: 1, 1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 6: 5}, {}, {2: 9}])
    edges = count_edges(cells, 4)
    assert edges.tolist() == [[1, 2, 3, 5], [0, 0, 0, 0], [9, 9, 9, 9]]
    bins = torch.tensor([[0.5, 1.0, 1.5, 3.0, 3.25, 9.0]])
    assert value_of_bins(bins, torch.from_numpy(edges[:1])).tolist() == [[1, 1, 1.5, 3, 3.5, 5]]


def test_edges_of_real_cells_are_numpys_quantiles(blood):
    edges = count_edges(blood, 50)
    for cell in range(0, len(blood), 40):
        counts = blood.counts[blood.offsets[cell] : blood.offsets[cell + 1]]
        np.testing.assert_allclose(edges[cell], np.quantile(counts, np.linspace(0, 1, 50)))


def test_true_bins_give_back_the_values(model, blood):
    """The values of a cell's own bins are its values, but for what a bin of 50 cannot tell."""
    cell = blood.take([0])
    inputs = model.impute_inputs(cell, np.zeros((1, 1)))
    bins = torch.from_numpy(model.bin_counts(cell, 0, 0).astype(np.float32))[None]
    values = value_of_bins(bins, inputs["edges"])[0].numpy()
    truth = log1p_cp10k(cell)
    assert np.corrcoef(values, truth)[0, 1] > 0.99
    assert np.abs(values - truth).mean() < 0.1


def test_imputation_asks_the_trained_output(model, blood):
    """Answers are the bins that gep predicts, one by one: in other company and order the same."""
    shown = blood.take([0, 1])
    asked = np.stack([np.setdiff1d(np.arange(3000), shown.genes[shown.cell_of == row])[:500] for row in (0, 1)])
    with torch.no_grad():
        inputs = model.impute_inputs(shown, asked)
        answer = model.impute(inputs)
        assert torch.equal(answer.detection_BQ.flatten(), model.predict(inputs).gep_G)
        few = model.impute(model.impute_inputs(shown.take([1]), asked[1:, ::-5].copy()))
    torch.testing.assert_close(few.values_BQ[0], answer.values_BQ[1].flip(0)[::5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(few.detection_BQ[0], answer.detection_BQ[1].flip(0)[::5], atol=1e-5, rtol=1e-5)
    scale = torch.from_numpy(log1p_cp10k(shown))
    assert answer.values_BQ.min() >= scale.min()
    assert answer.values_BQ.max() <= scale.max() + 1e-5


def test_learns_below_the_trivial_baseline(blood):
    torch.manual_seed(0)
    cells = blood.take(np.arange(8))
    model = Scgpt(replace(TINY, dropout=0.0, max_length=101), N_GENES)
    validation = model.pretrain_inputs(cells, seed=0, step=None)
    untrained = total_loss(model(validation)).item()
    bins = validation["targets"]
    constant = 3 * (bins - bins.mean()).square().mean().item()
    assert train(model, cells, steps=100, learning_rate=1e-2) < constant < untrained
