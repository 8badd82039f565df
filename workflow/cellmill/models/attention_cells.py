"""Softmax attention cell after cell: the ways of the CPU.

`sdpa_cells` is torch's kernel for each cell. Its backward pass is slow in bfloat16; `attend_cells` takes dense matrix
products there. Products run at full speed only on matrices that lie dense: on slices of larger tensors that of queries
and keys took about twice as long. So each cell's queries, keys and values are copied to rooms that all cells use in
turn, which costs less than a tenth of the products. Causal cells go in blocks of queries, without the keys that come
after a block; very long ones go in blocks, too. The weights are computed again in the backward pass: kept in bfloat16,
they would take 2 H bytes for every pair of a query and a key, in every layer. Which of them are dropped is not kept
either, but drawn again: torch's own dropout keeps a byte for every weight, and its draws cost more than the products.

Legend: N query slots, S key slots, L queries and P keys of a block, W keys rounded up, H heads, K width of a head.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cellmill.models.packing import Layout

ALIGNED = 32
"""Rows of attention weights are as long as a multiple of this many values: matrix units like it."""
LONG = {torch.bfloat16: 2**24, torch.float32: 2**21}
"""Weights of a block, all heads, at most; but never fewer than `ROWS` queries."""
ROWS = 128
CAUSAL_ROWS = 256
"""Queries of a causal block at most."""


def sdpa_cells(
    q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Layout, keys: Layout, causal: bool, dropout: float = 0.0
) -> Tensor:
    """As `attend_cells`, by torch's scaled_dot_product_attention, for queries without a key of their own."""
    parts = (_parts(q_NHK, queries), _parts(k_SHK, keys)[::2], _parts(v_SHK, keys)[::2])
    found = [torch.zeros_like(part) for part in parts[0]]
    for cell, (q_LHK, k_PHK, v_PHK) in enumerate(zip(parts[0][::2], *parts[1:], strict=True)):
        n_queries, n_keys = len(q_LHK), len(k_PHK)
        if n_queries and n_keys:
            # torch's own causal mask begins with the first key, ours ends with the last one
            same = n_queries == n_keys
            mask = ~hidden_keys(n_queries, n_keys, q_LHK.device) if causal and not same else None
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHK, k_PHK, v_PHK))
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal and same)
            found[2 * cell] = context.squeeze(0).transpose(0, 1)
    return torch.cat(found) if found else torch.zeros_like(q_NHK)


def _parts(x_NHK: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tokens of the first cell, the unused slots behind it, those of the second cell, and so on."""
    nexts = np.append(layout.starts[1:], layout.n_slots)
    sizes = np.stack([layout.lengths, nexts[: len(layout)] - layout.ends], 1)
    return x_NHK.split(sizes.ravel().tolist()) if len(layout) else ()


def hidden_keys(n_queries: int, n_keys: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool [L, P], the keys that a causal query does not see."""
    ones_LP = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones_LP.triu(n_keys - n_queries + 1)


def attend_cells(
    q_NHK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    own: tuple[Tensor, Tensor] | None,
    queries: Layout,
    keys: Layout,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """[N, H, K]; zeros for queries without keys and in unused slots. See `cellmill.models.attention.attend`."""
    own_k_NHK, own_v_NHK = own or (None, None)
    return _Attention.apply(q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK, queries, keys, causal, dropout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK, queries, keys, causal, dropout):
        ctx.save_for_backward(q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK)
        ctx.dropped = _Dropped.draw(dropout) if dropout else None
        ctx.blocks = partial(_blocks, queries, keys, causal, own_k_NHK is not None, q_NHK.dtype, q_NHK.shape[1])
        if own_k_NHK is None and not dropout:
            return sdpa_cells(q_NHK, k_SHK, v_SHK, queries, keys, causal)
        out_NHK, rooms = _zeros(q_NHK), _Rooms(q_NHK)
        keep = ctx.dropped and ctx.dropped.start(rooms)
        for block in ctx.blocks():
            q, k, v, own_k, own_v = block.read(rooms, q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK)
            p = block.weights(rooms, q, k, own_k)
            if keep:
                p.mul_(keep(p.shape))
            context = torch.bmm(p, v, out=rooms("result", q.shape))
            if own_v is not None:
                context.addcmul_(block.own(p), own_v)
            if keep:
                context.mul_(ctx.dropped.scale)
            out_NHK[block.queries] = context.transpose(0, 1)
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHK):
        saved = ctx.saved_tensors  # asked for once: where activations are checkpointed, asking computes them
        q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK = saved
        dq_NHK, dk_SHK, dv_SHK, d_own_k_NHK, d_own_v_NHK = map(_zeros, saved)
        rooms, scale = _Rooms(q_NHK), q_NHK.shape[2] ** -0.5
        keep = ctx.dropped and ctx.dropped.start(rooms)
        for block in ctx.blocks():
            q, k, v, own_k, own_v = block.read(rooms, q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK)
            g = _dense(grad_NHK[block.queries], rooms("gradient", q.shape))
            p = kept_p = block.weights(rooms, q, k, own_k)
            if keep:
                g.mul_(ctx.dropped.scale)
                kept = keep(p.shape)
                kept_p = torch.mul(p, kept, out=rooms("kept weights", p.shape))
            block.add_to_keys(torch.bmm(kept_p.mT, g, out=rooms("result", k.shape)), dv_SHK)
            d = torch.bmm(g, v.mT, out=rooms("other weights", p.shape))
            if own_v is not None:
                d_own_v_NHK[block.queries] = (block.own(kept_p) * g).transpose(0, 1)
                block.own(d).copy_((g * own_v).sum(2, keepdim=True))
            if keep:
                d.mul_(kept)
            torch.ops.aten._softmax_backward_data.out(d, p, -1, d.dtype, grad_input=d)
            block.add_to_keys(torch.bmm(d.mT, q, out=rooms("result", k.shape)), dk_SHK)
            dq = torch.bmm(d, k, out=rooms("result", q.shape))
            if own_k is not None:
                d_own_k_NHK[block.queries] = (block.own(d) * q).transpose(0, 1)
                dq.addcmul_(block.own(d), own_k)
            dq_NHK[block.queries] = dq.mul_(scale).transpose(0, 1)
        return dq_NHK, dk_SHK, dv_SHK, d_own_k_NHK, d_own_v_NHK, None, None, None, None


@dataclass(frozen=True)
class _Dropped:
    """Which weights are dropped: the same ones whenever it is started, block after block.

    The probability is rounded to a multiple of 2^-16, and the weights that are kept grow by what that one asks.
    """

    threshold: int
    seed: int

    @classmethod
    def draw(cls, probability: float) -> "_Dropped":
        """Its seed is of torch's generator: a run that goes on, or computes a layer again, draws the same one."""
        return cls(min(round(probability * 2**16), 2**16 - 1), int(torch.randint(2**62, ())))

    @property
    def scale(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 2**16 / (2**16 - self.threshold)

    def start(self, rooms: "_Rooms") -> Callable[[tuple[int, ...]], Tensor]:
        """A function that gives the next block's ones and zeros.

        Sixteen random bits a weight, and a comparison in place: a sixth of the time of `Tensor.bernoulli_`.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def keep(shape: tuple[int, ...]) -> Tensor:
            bits = rooms("bits", shape, torch.int16)
            bits.view(-1).view(torch.int64).random_(-(2**63), None, generator=generator)
            return rooms("keep", shape).copy_(bits.ge_(self.threshold - 2**15))

        return keep


def _zeros(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.new_zeros(x.shape)


def _dense(x_LHK: Tensor, room_HLK: Tensor) -> Tensor:
    """The room with the values, zeros behind them."""
    room_HLK[:, : len(x_LHK)] = x_LHK.transpose(0, 1)
    room_HLK[:, len(x_LHK) :] = 0
    return room_HLK


class _Rooms:
    """Memory that all blocks use in turn, by name: to touch new memory costs more than the arithmetic."""

    def __init__(self, like: Tensor):
        self.like, self.rooms = like, {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = self.like.new_empty(size, dtype=dtype)
        return self.rooms[name][:size].view(shape)


@dataclass(frozen=True)
class _Block:
    """Queries of one cell and the keys that any of them sees, as slots.

    Attributes
    ----------
    causal
        The last query sees all the keys, the one before all but the last, and so on.
    has_own
        Each query has a key of its own; its weight stands behind those of the keys.
    """

    queries: slice
    keys: slice
    causal: bool
    has_own: bool

    @property
    def n_keys(self) -> int:
        return self.keys.stop - self.keys.start

    def read(self, rooms: _Rooms, q_NHK, k_SHK, v_SHK, own_k_NHK, own_v_NHK) -> tuple[Tensor | None, ...]:
        """Scaled queries [H, L, K], keys and values [H, W, K], own keys and values [H, L, K]."""
        n_heads, width = q_NHK.shape[1:]
        of_queries = (n_heads, self.queries.stop - self.queries.start, width)
        of_keys = (n_heads, -(-(self.n_keys + self.has_own) // ALIGNED) * ALIGNED, width)
        q = _dense(q_NHK[self.queries], rooms("q", of_queries)).mul_(width**-0.5)
        k, v = _dense(k_SHK[self.keys], rooms("k", of_keys)), _dense(v_SHK[self.keys], rooms("v", of_keys))
        if not self.has_own:
            return q, k, v, None, None
        own_k = _dense(own_k_NHK[self.queries], rooms("own k", of_queries))
        return q, k, v, own_k, _dense(own_v_NHK[self.queries], rooms("own v", of_queries))

    def weights(self, rooms: _Rooms, q: Tensor, k: Tensor, own_k: Tensor | None) -> Tensor:
        """Attention weights [H, L, W]: of the keys, of a query's own, then zeros."""
        p = torch.bmm(q, k.mT, out=rooms("weights", (*q.shape[:2], k.shape[1])))
        p[:, :, self.n_keys :] = -torch.inf
        if self.causal:
            last = min(q.shape[1], self.n_keys)  # all queries see the keys in front of these
            p[:, :, self.n_keys - last : self.n_keys].masked_fill_(hidden_keys(q.shape[1], last), -torch.inf)
        if own_k is not None:
            self.own(p).copy_((q * own_k).sum(2, keepdim=True))
        return torch.softmax(p, -1, out=p)

    def own(self, p: Tensor) -> Tensor:
        """[H, L, 1], the place of the queries' own keys among weights [H, L, W]."""
        return p[:, :, self.n_keys, None]

    def add_to_keys(self, x_HWK: Tensor, out_SHK: Tensor) -> None:
        """Other blocks may look at the same keys."""
        out_SHK[self.keys] += x_HWK[:, : self.n_keys].transpose(0, 1)


def _blocks(
    queries: Layout, keys: Layout, causal: bool, has_own: bool, dtype: torch.dtype, n_heads: int
) -> Iterator[_Block]:
    """All that there is to compute."""
    longest = LONG.get(dtype, LONG[torch.float32]) // n_heads
    bounds = (queries.starts, queries.ends, keys.starts, keys.ends)
    for q0, q1, k0, k1 in zip(*(bound.tolist() for bound in bounds), strict=True):
        if k1 == k0 and not has_own:
            continue
        rows = max(longest // max(k1 - k0, 1) // ROWS, 1) * ROWS
        rows = min(rows, CAUSAL_ROWS) if causal else rows
        for first in range(q0, q1, rows):
            stop = min(first + rows, q1)
            seen = k1 - (q1 - stop) if causal else k1
            yield _Block(slice(first, stop), slice(k0, seen), causal, has_own)
