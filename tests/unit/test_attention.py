"""Attention: every way against the plain one, forward and backward, on cells of real lengths, in every layout."""

from functools import partial

import numpy as np
import pytest
import torch
from cellmill.models.attention import MultiHeadAttention, _choose, attend, attention_backend, attention_flops
from cellmill.models.attention_backends import Pattern
from cellmill.models.graphs import keep_outside
from cellmill.models.packing import Packing, uniform
from shard_cells import real_cells
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYOUTS = {"packed": Packing(), "grain": Packing("packed", 256), "padded": Packing("padded")}
N_HEADS, WIDTH = 2, 16
HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU here, and has no CPU kernel for it")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def lengths(data) -> np.ndarray:
    """How many of the first 3,000 genes real cells express, and two cells without any."""
    cells, _ = real_cells(data, "baron_h1")
    n_genes = np.bincount(cells.cell_of[cells.genes < 3000])[:6]
    return np.concatenate([n_genes[:3], [0], n_genes[3:], [0, 1]])


def cases(lengths: np.ndarray) -> dict[str, dict]:
    """Lengths of the keys (None: those of the queries), whether causal, whether queries have their own keys."""
    other = lengths[::-1] // 2
    return {
        "self": {"keys": None},
        "causal": {"keys": None, "causal": True},
        "cross": {"keys": other},
        "causal cross": {"keys": lengths + other, "causal": True},
        "own": {"keys": None, "own": True},
        "own cross": {"keys": other, "own": True},
    }


CASES = tuple(cases(np.zeros(1, dtype=int)))


class Problem:
    """Leaf tensors of a case in a layout; used slots hold the same numbers in every layout."""

    def __init__(self, lengths, packing, *, keys=None, causal=False, own=False, dtype=torch.float32, device="cpu"):
        self.queries = packing.layout(lengths).to(device)
        self.keys = self.queries if keys is None else packing.layout(keys).to(device)
        self.causal, self.dtype = causal, dtype
        generator = torch.Generator().manual_seed(0)
        sides = [self.queries, self.keys, self.keys, *[self.queries] * (3 if own else 1)]
        *leaves, self.gradient = [self._fill(side, generator) for side in sides]
        self.leaves, self.sides = [leaf.requires_grad_() for leaf in leaves], sides[:-1]

    def _fill(self, layout, generator):
        x = torch.full((layout.n_slots, N_HEADS, WIDTH), 7.0)  # unused slots must reach nothing
        used_N = layout.used_N.cpu()
        x[used_N] = torch.randn(int(used_N.sum()), N_HEADS, WIDTH, generator=generator)
        return x.to(layout.device, self.dtype)

    def attend(self, backend, dropout=0.0):
        q, k, v, *own = self.leaves
        with attention_backend(backend):
            return attend(q, k, v, self.queries, self.keys, own=own or None, causal=self.causal, dropout=dropout)

    def forward(self, backend) -> torch.Tensor:
        """Of the queries' tokens."""
        self.leaves = [leaf.detach() for leaf in self.leaves]  # flex asks this on a CPU
        return self.attend(backend)[self.queries.used_N]

    def solve(self, backend) -> list[torch.Tensor]:
        """The context of the queries' tokens, and the gradients of all tokens that went in."""
        out = self.attend(backend)
        loss = (out * self.gradient.flatten(1))[self.queries.used_N].sum()
        gradients = torch.autograd.grad(loss, self.leaves)
        for gradient, side in zip(gradients, self.sides, strict=True):
            assert not gradient[~side.used_N].any(), "an unused slot reaches a token"
        return [out[self.queries.used_N], *(g[side.used_N] for g, side in zip(gradients, self.sides, strict=True))]


def ways(case: str) -> tuple[str, ...]:
    return ("padded", "cells") if "own" in case else ("padded", "cells", "sdpa")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_way_is_the_plain_one_in_float32(lengths, case, layout):
    given = cases(lengths)[case]
    plain = Problem(lengths, Packing(), **given).solve("reference")
    problem = Problem(lengths, LAYOUTS[layout], **given)
    for way in ("reference", *ways(case)):
        for ours, theirs in zip(problem.solve(way), plain, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda said, way=way: f"{way}: {said}")


@pytest.mark.parametrize("case", CASES)
def test_every_way_is_the_plain_one_within_rounding_in_bfloat16(lengths, case):
    """Not much further from the float32 numbers than a rounding of them: 2^-8 of their size."""
    given = cases(lengths)[case] | {"dtype": torch.bfloat16}
    problem = Problem(lengths, Packing(), **given)
    exact = problem.solve("reference")  # computes in float32, rounds at the end
    for way in ways(case):
        for ours, theirs in zip(problem.solve(way), exact, strict=True):
            assert ours.dtype == torch.bfloat16
            error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            assert error < 2**-6, (way, error)


@pytest.mark.parametrize("case", CASES)
def test_flex_is_the_plain_one_forward(lengths, case):
    problem = Problem(np.minimum(lengths, 60), Packing("packed", 128), **cases(np.minimum(lengths, 60))[case])
    torch.testing.assert_close(problem.forward("flex"), problem.forward("reference"), **EXACT)


@on_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["varlen", "flex", "padded"])
def test_a_gpus_ways_are_the_plain_one(lengths, case, way):
    if way == "varlen" and "own" in case:
        pytest.skip("variable-length attention gives queries no key of their own")
    problem = Problem(lengths, Packing("packed", 256), **cases(lengths)[case], dtype=torch.bfloat16, device="cuda")
    for ours, theirs in zip(problem.solve(way), problem.solve("reference"), strict=True):
        assert (ours.float() - theirs.float()).norm() < 2**-6 * theirs.float().norm()


def test_blocks_of_queries_change_nothing(lengths, monkeypatch):
    from cellmill.models import attention_cells

    monkeypatch.setattr(attention_cells, "LONG", {torch.float32: 1})
    monkeypatch.setattr(attention_cells, "ROWS", 48)
    for case, given in cases(lengths).items():
        problem = Problem(lengths, Packing(), **given)
        for ours, theirs in zip(problem.solve("cells"), problem.solve("reference"), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda said, case=case: f"{case}: {said}")


def test_queries_without_keys_get_zeros(lengths):
    problem = Problem(np.array([3, 4]), Packing(), keys=np.array([0, 2]))
    for way in ("reference", "padded", "cells", "sdpa", "flex"):
        out = problem.forward(way)
        assert not out[:3].any(), way
        assert out[3:].all(), way


def test_a_causal_query_sees_the_keys_up_to_itself():
    """Values that say their own place: the mean of those up to a query is half of its place."""
    layout = uniform(1, 5)
    q = torch.zeros(5, 1, 8)
    v = torch.arange(5.0).view(5, 1, 1).expand(5, 1, 8)
    for way in ("reference", "padded", "cells", "sdpa"):
        with attention_backend(way):
            out = attend(q, q, v, layout, causal=True)
            later = attend(q[3:], q, v, uniform(1, 2), layout, causal=True)
        torch.testing.assert_close(out[:, 0], torch.arange(5.0) / 2)
        torch.testing.assert_close(later[:, 0], torch.tensor([1.5, 2.0]))


@pytest.mark.parametrize("way", ["padded", "sdpa", "cells"])
def test_dropout_drops_its_share_of_weights_and_keeps_the_mean(way):
    """Values are an identity matrix, so the context is the weights: each 1 / 16, or 0, or 1 / 16 / (1 - p)."""
    layout = uniform(40, 16)
    q = torch.zeros(layout.n_slots, N_HEADS, 16)
    v = torch.eye(16).repeat(40, 1).unsqueeze(1).expand(-1, N_HEADS, -1)
    torch.manual_seed(0)
    with attention_backend(way):
        weights = attend(q, q, v, layout, dropout=0.25) * 16
    torch.testing.assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 4 / 3))
    # 20,480 weights: the share's standard deviation is 0.003
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.015)


@pytest.mark.parametrize("case", ["self", "causal cross", "own cross"])
def test_dropped_weights_have_the_gradients_of_their_own_mask(case):
    """Finite differences in float64, where the seed and so the mask are always the same; own keys are dropped, too."""
    lengths = np.array([5, 0, 3, 1])
    problem = Problem(lengths, Packing(), **cases(lengths)[case], dtype=torch.float64)

    def solve(*leaves):
        torch.manual_seed(1)
        problem.leaves = leaves
        return problem.attend("cells", dropout=0.4)

    leaves = problem.leaves
    assert torch.autograd.gradcheck(solve, leaves, fast_mode=True)
    kept = Problem(lengths, Packing(), **cases(lengths)[case], dtype=torch.float64).attend("cells")
    assert not torch.allclose(solve(*leaves), kept)


def test_a_layer_computed_again_drops_the_same_weights(lengths):
    """Activation checkpointing: the gradients are the same to the bit."""
    problem = Problem(lengths, Packing(), own=True, dtype=torch.bfloat16)

    def solve(*leaves):
        problem.leaves = leaves
        return problem.attend("cells", dropout=0.2)

    gradients = []
    leaves = problem.leaves
    for run in (solve, partial(checkpoint, solve, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(run(*leaves), leaves, problem.gradient.flatten(1)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["flex", "varlen"])
def test_what_drops_no_weights_says_so(way):
    with pytest.raises(ValueError, match="drops no weights"):
        Problem(np.array([4]), Packing()).attend(way, dropout=0.1)


def test_the_choice_can_do_what_is_asked(lengths):
    for given in cases(lengths).values():
        for dtype in (torch.float32, torch.bfloat16):
            for dropout in (0.0, 0.1):
                problem = Problem(lengths, Packing(), **given, dtype=dtype)
                problem.attend(None, dropout).float().sum().backward()
    problem = Problem(lengths, Packing(), dtype=torch.bfloat16)
    pattern = Pattern(problem.queries, problem.keys)
    assert _choose(problem.leaves[0], None, pattern, 0.0) == "cells"
    assert _choose(problem.leaves[0], None, pattern, 0.1) == "cells"
    assert _choose(problem.leaves[0].float(), None, pattern, 0.0) == "sdpa"
    with torch.no_grad():
        assert _choose(problem.leaves[0], None, pattern, 0.0) == "sdpa"
        assert _choose(problem.leaves[0], problem.leaves[:2], pattern, 0.0) == "cells"
    short = Problem(np.array([20, 30]), Packing())
    assert _choose(short.leaves[0], None, Pattern(short.queries, short.keys), 0.0) == "padded"


@on_gpu
@pytest.mark.parametrize("width", [8, 12, 24])
@pytest.mark.parametrize("own", [False, True])
def test_a_gpus_choice_takes_every_width_of_a_head(lengths, width, own):
    layout = Packing("packed", 256).layout(lengths).to("cuda")
    leaves = [torch.randn(layout.n_slots, N_HEADS, width, device="cuda").bfloat16().requires_grad_() for _ in range(5)]
    results = []
    for way in (None, "reference"):
        with attention_backend(way):
            out = attend(*leaves[:3], layout, own=leaves[3:] if own else None)[layout.used_N]
        gradients = torch.autograd.grad(out.float().square().sum(), leaves[: 5 if own else 3])
        results.append([out, *(gradient[layout.used_N] for gradient in gradients)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).norm() < 2**-6 * theirs.float().norm()


@pytest.mark.parametrize("packing", LAYOUTS)
def test_full_matrices_are_layouts_as_others(lengths, packing):
    """As latents and asked genes are: queries of a matrix without unused slots, to keys of cells, and to such ones."""
    latents = uniform(4, 6)
    for keys in (LAYOUTS[packing].layout(lengths[:4]), uniform(4, 3)):
        q, kv = torch.randn(latents.n_slots, N_HEADS, WIDTH), torch.randn(keys.n_slots, 2, N_HEADS, WIDTH)
        outs = {}
        for way in ("reference", "padded", "cells", "sdpa"):
            with attention_backend(way):
                outs[way] = attend(q, *kv.unbind(1), latents, keys)
            torch.testing.assert_close(
                outs[way], outs["reference"], **EXACT, msg=lambda said, way=way: f"{way}: {said}"
            )


def test_the_module_is_torchs_own_on_a_matrix():
    """Self and cross attention, against nn.MultiheadAttention with the same weights."""
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    x, y = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
    same = ours(x.flatten(0, 1), uniform(3, 7)).view(3, 7, 32)
    torch.testing.assert_close(same, theirs(x, x, x, need_weights=False)[0], **EXACT)
    across = ours(x.flatten(0, 1), uniform(3, 7), others=y.flatten(0, 1), others_layout=uniform(3, 5)).view(3, 7, 32)
    torch.testing.assert_close(across, theirs(x, y, y, need_weights=False)[0], **EXACT)


def test_flops_are_those_of_both_products():
    packed = Packing().layout(np.array([3, 5]))
    keys = Packing().layout(np.array([2, 4]))
    assert attention_flops(16, packed) == 4 * 16 * (9 + 25)
    assert attention_flops(16, packed, keys, own=True) == 4 * 16 * (3 * 3 + 5 * 5)


class Block(nn.Module):
    """A layer as architectures have it."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), MultiHeadAttention(32, 4)

    def forward(self, x_ND, layout):
        return x_ND + self.attention(self.norm(x_ND), layout)


def test_a_compiled_block_meets_new_lengths_without_compiling_again(lengths):
    """Traced by dynamo and differentiated, without a compiler of machine code: graphs break around attention."""
    torch._dynamo.reset()
    keep_outside()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    block = Block()
    compiled = torch.compile(block, dynamic=True, backend=keep)
    counts = []
    for cut in (8, 5, 3, 6):
        layout = Packing().layout(lengths[:cut])
        x_ND = torch.randn(layout.n_slots, 32, requires_grad=True)
        results = [run(x_ND, layout) for run in (block, compiled)]
        torch.testing.assert_close(results[1], results[0], **EXACT)
        gradients = [torch.autograd.grad(out.square().sum(), [x_ND, *block.parameters()]) for out in results]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[-1] == counts[0], counts
