"""Ways to compute softmax attention within packed cells; `cellmill.models.attention` chooses among them.

Each takes the same arguments and gives the same numbers, forward and backward, to rounding:

* ``reference``: plain products and a float32 softmax, cell after cell. For tests.
* ``padded``: torch's scaled_dot_product_attention over a padded matrix with a mask. Runs everywhere, drops attention
  weights where asked, and pays for padding.
* ``cells``: cell after cell, by matrix products of the tensors' own type, the weights computed again in the backward
  pass. For CPUs: there torch's flash kernel takes 2 to 3 times as long in bfloat16, as it does not use the matrix unit
  in its backward pass (``tests/bench/run.py attention``).
* ``varlen``: torch's variable-length flash attention. For bfloat16 on a GPU.
* ``flex``: torch's FlexAttention with a mask of cells; compiled on a GPU.

Legend: B cells, N query slots, S key slots, L queries and P keys of one cell, H heads, K width of a head.
"""

import inspect
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cellmill.models.packing import Layout

ALIGNED = 32
"""Rows of attention weights are as long as a multiple of this many values: matrix units like it."""


@dataclass(frozen=True)
class Pattern:
    """Who looks at whom.

    Attributes
    ----------
    queries, keys
        Where each cell's tokens lie. A query looks at the keys of its own cell.
    causal
        The last query of a cell looks at all its keys, the one before at all but the last, and so on.
    """

    queries: Layout
    keys: Layout
    causal: bool = False


Own = tuple[Tensor, Tensor] | None
"""Key and value [N, H, K] that each query has for itself, beside those of its cell."""


# --- reference -------------------------------------------------------------------------------------------------------


def reference(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """[N, H, K]; zeros for queries without keys and in unused slots."""
    out_NHK = torch.zeros_like(q_NHK)
    queries, keys = pattern.queries, pattern.keys
    for q0, q1, k0, k1 in zip(queries.starts, queries.ends, keys.starts, keys.ends, strict=True):
        q, k, v = (x.transpose(0, 1).float() for x in (q_NHK[q0:q1], k_SHK[k0:k1], v_SHK[k0:k1]))
        logits_HLP = q @ k.mT * q.shape[2] ** -0.5
        if pattern.causal:
            logits_HLP = logits_HLP.masked_fill(_hidden(q1 - q0, k1 - k0, q.device), -torch.inf)
        if own is not None:
            own_k, own_v = (x[q0:q1].transpose(0, 1).float() for x in own)
            logits_HLP = torch.cat([logits_HLP, (q * own_k).sum(2, keepdim=True) * q.shape[2] ** -0.5], 2)
        if not logits_HLP.shape[2]:
            continue
        weights_HLP = F.dropout(logits_HLP.softmax(2), dropout)
        context_HLK = weights_HLP[:, :, : k1 - k0] @ v
        if own is not None:
            context_HLK = context_HLK + weights_HLP[:, :, -1:] * own_v
        index = torch.arange(q0, q1, device=q.device)
        out_NHK = out_NHK.index_copy(0, index, context_HLK.transpose(0, 1).to(out_NHK.dtype))
    return out_NHK


def _hidden(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bool [L, P], the keys that a causal query does not see."""
    ones_LP = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return ones_LP.triu(n_keys - n_queries + 1)


# --- padded ----------------------------------------------------------------------------------------------------------


def padded(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`."""
    queries, keys = pattern.queries, pattern.keys
    q, k, v = (queries.to_matrix(q_NHK), keys.to_matrix(k_SHK), keys.to_matrix(v_SHK))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    n_queries, n_keys = q.shape[2], k.shape[2]
    place_P = torch.arange(n_keys, device=q.device)
    mask = (place_P < keys.lengths_B[:, None])[:, None, None, :]
    if pattern.causal:
        # a query may look at as many keys as there are beyond the cell's queries, and one more for each in front
        more_B = (keys.lengths_B - queries.lengths_B)[:, None, None]
        place_L = torch.arange(n_queries, device=q.device)[:, None]
        mask = mask & (place_P <= place_L + more_B)[:, None]
    empty_B111 = (keys.lengths_B == 0)[:, None, None, None]
    if own is not None:
        own_k, own_v = (queries.to_matrix(x).transpose(1, 2) for x in own)
        k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
        itself = torch.eye(n_queries, dtype=torch.bool, device=q.device).expand(len(queries), 1, -1, -1)
        mask = torch.cat([mask.expand(-1, -1, n_queries, -1), itself], 3)
    else:
        mask = mask | (empty_B111 & (place_P == 0))  # a softmax over nothing would be no number
    context_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if own is None:
        context_BHLK = context_BHLK.masked_fill(empty_B111, 0)
    return queries.from_matrix(context_BHLK.transpose(1, 2))


# --- cells -----------------------------------------------------------------------------------------------------------


def cells(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`, without dropout."""
    if dropout:
        raise ValueError("attention by cells drops no weights")
    q_HNK = (q_NHK * q_NHK.shape[2] ** -0.5).transpose(0, 1).contiguous()
    k_HSK, v_HSK = k_SHK.transpose(0, 1).contiguous(), v_SHK.transpose(0, 1).contiguous()
    own_logit_HN = own_v_HNK = None
    if own is not None:
        own_v_HNK = own[1].transpose(0, 1)
        own_logit_HN = (q_HNK * own[0].transpose(0, 1)).sum(2)
    return _Cells.apply(q_HNK, k_HSK, v_HSK, own_logit_HN, own_v_HNK, pattern).transpose(0, 1)


class _Cells(torch.autograd.Function):
    """Context [H, N, K] of scaled queries."""

    @staticmethod
    def forward(ctx, q_HNK, k_HSK, v_HSK, own_logit_HN, own_v_HNK, pattern):
        ctx.save_for_backward(q_HNK, k_HSK, v_HSK, own_logit_HN, own_v_HNK)
        ctx.pattern = pattern
        out_HNK = torch.zeros_like(q_HNK)
        room = _room(q_HNK, pattern, own_logit_HN is not None)
        for q, k in _ranges(pattern, own_logit_HN is not None):
            p_HLP = _weights(q_HNK[:, q], k_HSK[:, k], _cut(own_logit_HN, q), pattern.causal, room)
            n_keys = k.stop - k.start
            out_HNK[:, q] = torch.bmm(p_HLP[:, :, :n_keys], v_HSK[:, k])
            if own_v_HNK is not None:
                out_HNK[:, q] += p_HLP[:, :, n_keys : n_keys + 1] * own_v_HNK[:, q]
        return out_HNK

    @staticmethod
    def backward(ctx, grad_HNK):
        q_HNK, k_HSK, v_HSK, own_logit_HN, own_v_HNK = ctx.saved_tensors
        pattern, has_own = ctx.pattern, own_logit_HN is not None
        grad_HNK = grad_HNK.contiguous()
        dq, dk, dv = torch.zeros_like(q_HNK), torch.zeros_like(k_HSK), torch.zeros_like(v_HSK)
        d_logit = torch.zeros_like(own_logit_HN) if has_own else None
        d_own_v = torch.zeros_like(grad_HNK) if has_own else None
        room, other = (_room(q_HNK, pattern, has_own) for _ in range(2))
        for q, k in _ranges(pattern, has_own):
            p_HLP = _weights(q_HNK[:, q], k_HSK[:, k], _cut(own_logit_HN, q), pattern.causal, room)
            n_keys, g_HLK = k.stop - k.start, grad_HNK[:, q]
            d_HLP = other[: p_HLP.numel()].view(p_HLP.shape)
            d_HLP[:, :, n_keys:] = 0
            torch.bmm(g_HLK, v_HSK[:, k].mT, out=d_HLP[:, :, :n_keys])
            if has_own:
                d_HLP[:, :, n_keys] = (g_HLK * own_v_HNK[:, q]).sum(2)
                d_own_v[:, q] = p_HLP[:, :, n_keys : n_keys + 1] * g_HLK
            dv[:, k] = torch.bmm(p_HLP[:, :, :n_keys].mT, g_HLK)
            torch.ops.aten._softmax_backward_data.out(d_HLP, p_HLP, -1, d_HLP.dtype, grad_input=d_HLP)
            dq[:, q] = torch.bmm(d_HLP[:, :, :n_keys], k_HSK[:, k])
            dk[:, k] = torch.bmm(d_HLP[:, :, :n_keys].mT, q_HNK[:, q])
            if has_own:
                d_logit[:, q] = d_HLP[:, :, n_keys]
        return dq, dk, dv, d_logit, d_own_v, None


def _weights(q_HLK: Tensor, k_HPK: Tensor, own_logit_HL: Tensor | None, causal: bool, room: Tensor) -> Tensor:
    """Attention weights of one cell [H, L, at least P], in `room`: of the keys, of a query itself, then zeros."""
    n_heads, n_queries, _ = q_HLK.shape
    n_keys = k_HPK.shape[1]
    width = _aligned(n_keys + (own_logit_HL is not None))
    p_HLP = room[: n_heads * n_queries * width].view(n_heads, n_queries, width)
    p_HLP[:, :, n_keys:] = -torch.inf
    torch.bmm(q_HLK, k_HPK.mT, out=p_HLP[:, :, :n_keys])
    if causal:
        p_HLP[:, :, :n_keys].masked_fill_(_hidden(n_queries, n_keys, p_HLP.device), -torch.inf)
    if own_logit_HL is not None:
        p_HLP[:, :, n_keys] = own_logit_HL
    return torch.softmax(p_HLP, -1, out=p_HLP)


def _aligned(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


def _room(q_HNK: Tensor, pattern: Pattern, has_own: bool) -> Tensor:
    """Room for the weights of any one cell, used by all in turn: new memory costs more than the arithmetic."""
    sizes_B = pattern.queries.lengths * (-(-(pattern.keys.lengths + has_own) // ALIGNED) * ALIGNED)
    return q_HNK.new_empty(q_HNK.shape[0] * int(sizes_B.max(initial=0)))


def _ranges(pattern: Pattern, has_own: bool):
    """Slices of the queries and keys of each cell that has any."""
    queries, keys = pattern.queries, pattern.keys
    bounds = (queries.starts, queries.ends, keys.starts, keys.ends)
    for q0, q1, k0, k1 in zip(*(bound.tolist() for bound in bounds), strict=True):
        if q1 > q0 and (k1 > k0 or has_own):
            yield slice(q0, q1), slice(k0, k1)


def _cut(x_HN: Tensor | None, q: slice) -> Tensor | None:
    return None if x_HN is None else x_HN[:, q]


# --- varlen ----------------------------------------------------------------------------------------------------------


def varlen(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`, without dropout, for packed layouts, and queries without a key of their own."""
    if dropout or own is not None:
        raise ValueError("variable-length attention drops no weights and gives queries no key of their own")
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = pattern.queries, pattern.keys
    # the keyword of torch 2.10, and of later ones
    kind = {}
    if pattern.causal:
        later = "window_size" in inspect.signature(varlen_attn).parameters
        kind = {"window_size": (-1, 0)} if later else {"is_causal": True}
    longest_query = max(queries.longest, queries.n_slots - queries.n_tokens)
    longest_key = max(keys.longest, keys.n_slots - keys.n_tokens)
    return varlen_attn(
        *(x.contiguous() for x in (q_NHK, k_SHK, v_SHK)),
        queries.bounds,
        keys.bounds,
        longest_query,
        longest_key,
        **kind,
    )


# --- flex ------------------------------------------------------------------------------------------------------------


def flex(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`, without dropout."""
    if dropout:
        raise ValueError("FlexAttention drops no weights")
    if own is not None:
        k_SHK, v_SHK = torch.cat([k_SHK, own[0]]), torch.cat([v_SHK, own[1]])
    attention, mask = _flex_attention(q_NHK.device.type), _block_mask(pattern, own is not None)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHK, k_SHK, v_SHK))
    return attention(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)


@cache
def _flex_attention(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _block_mask(pattern: Pattern, has_own: bool):
    """Which keys each query sees; remembered by the layout of the queries, since every layer asks for it."""
    from torch.nn.attention.flex_attention import create_block_mask

    queries, keys = pattern.queries, pattern.keys
    key = (id(keys), pattern.causal, has_own)
    if key not in queries.masks:
        query_rows, query_places, key_rows, key_places = queries.rows_N, queries.places_N, keys.rows_N, keys.places_N
        n_cells, n_keys = len(queries), keys.n_slots
        more_B = torch.cat([keys.lengths_B - queries.lengths_B, keys.lengths_B.new_zeros(1)])

        def sees(batch, head, query, key):
            place = torch.clamp(key, max=n_keys - 1)
            row = query_rows[query]
            found = (row == key_rows[place]) & (row < n_cells) & (key < n_keys)
            if pattern.causal:
                found = found & (key_places[place] <= query_places[query] + more_B[row])
            return found | (key - n_keys == query) if has_own else found

        n_all = n_keys + (queries.n_slots if has_own else 0)
        mask = create_block_mask(sees, None, None, queries.n_slots, n_all, device=query_rows.device)
        queries.masks[key] = (keys, mask)  # the keys' layout is kept, so that its id stays its own
    return queries.masks[key][1]


BACKENDS = {"reference": reference, "padded": padded, "cells": cells, "varlen": varlen, "flex": flex}
