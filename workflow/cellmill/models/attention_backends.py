"""Ways to compute softmax attention within packed cells; `cellmill.models.attention` chooses among them.

Each takes the same arguments and gives the same numbers, forward and backward, to rounding:

* ``reference``: plain products and a float32 softmax, cell after cell. For tests.
* ``padded``: torch's scaled_dot_product_attention over a padded matrix with a mask. Runs everywhere, and pays for
  padding. On a CPU it is the fastest for very short cells, on a GPU the only one that drops attention weights.
* ``sdpa``: the same function cell after cell, without padding. On a CPU it is the fastest in float32 and, forward, in
  bfloat16.
* ``cells``: cell after cell; forward as ``sdpa``, backward by matrix products of the tensors' own type, from weights
  that are computed again. On a CPU for bfloat16, where the backward pass of torch's kernel does not use the matrix unit
  (``tests/bench/run.py attention``), for queries with a key of their own, and where weights are dropped in training: a
  query's own key is dropped as often as any other.
* ``varlen``: torch's variable-length flash attention. For bfloat16 and float16 on a GPU; never drops weights.
* ``flex``: torch's FlexAttention with a mask of cells; compiled on a GPU, forward only on a CPU. Never drops weights.

Untested as yet, for want of a GPU: ``varlen``, and ``flex`` compiled and backward; ``tests/unit/test_attention.py``
runs them where there is one.

Legend: B cells, N query slots, S key slots, L queries and P keys of one cell, H heads, K width of a head.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cellmill.models.attention_cells import attend_cells, hidden_keys, sdpa_cells
from cellmill.models.packing import Layout


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
            logits_HLP = logits_HLP.masked_fill(hidden_keys(q1 - q0, k1 - k0, q.device), -torch.inf)
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


# --- padded ----------------------------------------------------------------------------------------------------------


def padded(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`."""
    queries, keys = pattern.queries, pattern.keys
    q, k, v = (queries.to_matrix(q_NHK), keys.to_matrix(k_SHK), keys.to_matrix(v_SHK))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if own is not None:
        own_k, own_v = (queries.to_matrix(x).transpose(1, 2) for x in own)
        k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
    mask = _remembered(_padded_mask, pattern, own is not None)
    context_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if own is None and len(keys) and not keys.lengths.all():
        context_BHLK = context_BHLK.masked_fill((keys.lengths_B == 0)[:, None, None, None], 0)
    return queries.from_matrix(context_BHLK.transpose(1, 2))


def _padded_mask(pattern: Pattern, has_own: bool) -> Tensor | None:
    """Bool [B, 1, L or 1, P] of the keys that a query sees, its own behind those of the cell; None for all."""
    queries, keys = pattern.queries, pattern.keys
    n_queries, n_keys = (layout.width or max(layout.longest, 1) for layout in (queries, keys))
    if keys.n_tokens == len(keys) * n_keys and not pattern.causal and not has_own:
        return None
    place_P = torch.arange(n_keys, device=keys.device)
    mask = (place_P < keys.lengths_B[:, None])[:, None, None, :]
    if pattern.causal:
        # a query may look at as many keys as there are beyond the cell's queries, and one more for each in front
        more_B = (keys.lengths_B - queries.lengths_B)[:, None, None]
        place_L = torch.arange(n_queries, device=keys.device)[:, None]
        mask = mask & (place_P <= place_L + more_B)[:, None]
    if not has_own:
        # a softmax over nothing would be no number
        return mask | ((keys.lengths_B == 0)[:, None, None, None] & (place_P == 0))
    itself = torch.eye(n_queries, dtype=torch.bool, device=keys.device).expand(len(queries), 1, -1, -1)
    return torch.cat([mask.expand(-1, -1, n_queries, -1), itself], 3)


def _remembered(make: Callable, pattern: Pattern, has_own: bool):
    """What `make` gives for a pattern, kept with the layout of the queries, since every layer asks for it."""
    queries, keys = pattern.queries, pattern.keys
    key = (make, id(keys), pattern.causal, has_own)
    if key not in queries.masks:
        # another layout of keys is kept, so that its id stays its own; what is made must hold no layout, or it would
        # hold itself
        queries.masks[key] = (None if keys is queries else keys, make(pattern, has_own))
    return queries.masks[key][1]


# --- sdpa ------------------------------------------------------------------------------------------------------------


def sdpa(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`, for queries without a key of their own."""
    if own is not None:
        raise ValueError("torch's attention cell after cell gives queries no key of their own")
    return sdpa_cells(q_NHK, k_SHK, v_SHK, pattern.queries, pattern.keys, pattern.causal, dropout)


# --- cells -----------------------------------------------------------------------------------------------------------


def cells(q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, own: Own, pattern: Pattern, dropout: float) -> Tensor:
    """As `reference`; see `cellmill.models.attention_cells`."""
    return attend_cells(q_NHK, k_SHK, v_SHK, own, pattern.queries, pattern.keys, pattern.causal, dropout)


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
    attention, mask = _flex_attention(q_NHK.device.type), _remembered(_block_mask, pattern, own is not None)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHK, k_SHK, v_SHK))
    return attention(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)


@cache
def _flex_attention(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def _block_mask(pattern: Pattern, has_own: bool):
    """Which keys each query sees; `own` keys stand behind the others."""
    from torch.nn.attention.flex_attention import create_block_mask

    queries, keys, causal = pattern.queries, pattern.keys, pattern.causal
    query_rows, query_places, key_rows, key_places = queries.rows_N, queries.places_N, keys.rows_N, keys.places_N
    n_cells, n_keys = len(queries), keys.n_slots
    more_B = torch.cat([keys.lengths_B - queries.lengths_B, keys.lengths_B.new_zeros(1)])

    def sees(batch, head, query, key):
        place = torch.clamp(key, max=n_keys - 1)
        row = query_rows[query]
        found = (row == key_rows[place]) & (row < n_cells) & (key < n_keys)
        if causal:
            found = found & (key_places[place] <= query_places[query] + more_B[row])
        return found | (key - n_keys == query) if has_own else found

    n_all = n_keys + (queries.n_slots if has_own else 0)
    on_gpu = query_rows.device.type == "cuda"  # compiled, the mask is never a whole matrix
    return create_block_mask(sees, None, None, queries.n_slots, n_all, query_rows.device, _compile=on_gpu)


BACKENDS = {"reference": reference, "padded": padded, "sdpa": sdpa, "cells": cells, "varlen": varlen, "flex": flex}
