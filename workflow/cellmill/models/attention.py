"""The one place for attention: every architecture attends through `attend`, within packed cells.

Legend: N slots of queries, S slots of keys, H heads, K width of a head, D = H K width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.models.attention_backends import BACKENDS, Own, Pattern
from cellmill.models.graphs import outside_graphs
from cellmill.models.packing import Layout

_backend: ContextVar[str | None] = ContextVar("backend", default=None)
SHORT = 2**18
"""Multiplications of a padded cell's queries and keys, up to which a CPU is faster with all cells in one matrix."""


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Attend by this way of `cellmill.models.attention_backends` instead of the one that `attend` would choose."""
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def _choose(q_NHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> str:
    """The fastest way for a device and mask that can do what is asked: measured on a CPU, careful on a GPU."""
    n_heads, width = q_NHK.shape[1:]
    if q_NHK.device.type == "cpu":
        if 0 < n_heads * width * pattern.queries.longest * pattern.keys.longest <= SHORT:
            return "padded"
        trained = torch.is_grad_enabled() and q_NHK.requires_grad
        return "cells" if own or (trained and (q_NHK.dtype == torch.bfloat16 or dropout)) else "sdpa"
    holes = any(layout.width is not None and not layout.full for layout in (pattern.queries, pattern.keys))
    if dropout or holes or q_NHK.dtype not in (torch.bfloat16, torch.float16):
        return "padded"  # the only one on a GPU that drops weights, and sure in float32
    if width % 8 or (own and width < 16):
        return "padded"  # what the kernels of the others ask of a head's width
    return "flex" if own else "varlen"


@outside_graphs
def attend(
    q_NHK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    queries: Layout,
    keys: Layout | None = None,
    *,
    own: Own = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of each cell's queries to its keys: [N, H K], the heads side by side.

    Parameters
    ----------
    queries, keys
        Where each cell's tokens lie; by default keys lie where the queries do.
    own
        A key and a value [N, H, K] that each query has for itself, beside those of its cell.
    causal
        The last query of a cell looks at all its keys, the one before at all but the last, and so on.
    dropout
        Probability of dropping an attention weight.

    Returns
    -------
    Tensor
        Zeros for the queries of a cell without keys; anything finite in unused slots.
    """
    pattern = Pattern(queries, queries if keys is None else keys, causal)
    name = _backend.get() or _choose(q_NHK, own, pattern, dropout)
    return BACKENDS[name](q_NHK, k_SHK, v_SHK, own, pattern, dropout).flatten(1)


def attention_flops(width: int, queries: Layout, keys: Layout | None = None, *, own: bool = False) -> float:
    """Floating-point operations of both products of one layer's attention, forward: 4 D for every query and key."""
    keys = queries if keys is None else keys
    return 4.0 * width * float((queries.lengths * (keys.lengths + own)).sum())


class MultiHeadAttention(nn.Module):
    """Multi-head attention of a cell's tokens to each other, or to those of another layout.

    Parameters
    ----------
    width
        D; a multiple of `n_heads`.
    n_heads
        H.
    dropout
        Probability of dropping an attention weight, in training only.
    bias
        Whether the projections have biases.

    Attributes
    ----------
    qkv
        Linear(D, 3 D); rows ordered query, key, value, as torch's `in_proj_weight` and scGPT's `Wqkv`.
    out
        Linear(D, D), the output projection.
    """

    def __init__(self, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def project(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, each [N, H, K]."""
        return self._heads(self.qkv(x_ND), 3)

    def project_across(self, x_ND: Tensor, y_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, K] of `x_ND`, keys and values [S, H, K] of `y_SD`."""
        width = x_ND.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q_ND = F.linear(x_ND, weight[:width], None if bias is None else bias[:width])
        kv = F.linear(y_SD, weight[width:], None if bias is None else bias[width:])
        return *self._heads(q_ND, 1), *self._heads(kv, 2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(1, (parts, self.n_heads, -1)).unbind(1)

    @property
    def dropout_now(self) -> float:
        """Probability of dropping an attention weight in the module's mode."""
        return self.dropout if self.training else 0.0

    def context(self, x_ND: Tensor, layout: Layout, *, causal: bool = False) -> Tensor:
        """[N, D], the heads side by side, before the output projection; see `attend`."""
        return attend(*self.project(x_ND), layout, causal=causal, dropout=self.dropout_now)

    def forward(
        self,
        x_ND: Tensor,
        layout: Layout,
        *,
        others: Tensor | None = None,
        others_layout: Layout | None = None,
        causal: bool = False,
    ) -> Tensor:
        """[N, D], of a cell's tokens to each other, or to its tokens among `others` [S, D]; see `attend`."""
        if others is None:
            return self.out(self.context(x_ND, layout, causal=causal))
        qkv = self.project_across(x_ND, others)
        return self.out(attend(*qkv, layout, others_layout, dropout=self.dropout_now))
