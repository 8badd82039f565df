"""The one place for attention: every architecture attends through `attend`.

Legend: B cells, L queries, S keys, H heads, K width of a head, D = H K width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    q_BHLK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention: [B, L, H K], the heads side by side.

    Parameters
    ----------
    mask
        Broadcasts to [B, H, L, S]: bool, True where the query may look, every query at one key at least; or float,
        added to the logits.
    causal
        The last query looks at all keys, the one before at all but the last, and so on; then `mask` is None.
    dropout
        Probability of dropping an attention weight.
    """
    if causal and q_BHLK.shape[2] != k_BHSK.shape[2]:  # keys of earlier calls are in front
        ones_LS = torch.ones(q_BHLK.shape[2], k_BHSK.shape[2], dtype=torch.bool, device=q_BHLK.device)
        mask, causal = ones_LS.tril(k_BHSK.shape[2] - q_BHLK.shape[2]), False
    context_BHLK = F.scaled_dot_product_attention(
        q_BHLK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )
    return context_BHLK.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tokens to each other, or to those of another sequence.

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

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the same tokens, each [B, H, L, K]."""
        return self._heads(self.qkv(x_BLD), 3)

    def project_across(self, x_BLD: Tensor, y_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, L, K] of `x_BLD`, keys and values [B, H, S, K] of `y_BSD`."""
        width = x_BLD.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q_BLD = F.linear(x_BLD, weight[:width], None if bias is None else bias[:width])
        kv = F.linear(y_BSD, weight[width:], None if bias is None else bias[width:])
        return *self._heads(q_BLD, 1), *self._heads(kv, 2)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        x = x.view(batch, length, parts, self.n_heads, width // (parts * self.n_heads))
        return x.permute(2, 0, 3, 1, 4).unbind()

    def context(self, x_BLD: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """[B, L, D], the heads side by side, before the output projection; see `attend` for the mask."""
        return attend(*self.project(x_BLD), mask, causal=causal, dropout=self.dropout if self.training else 0.0)

    def forward(
        self, x_BLD: Tensor, mask: Tensor | None = None, *, others: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """[B, L, D], of the tokens to each other or to `others` [B, S, D]; see `attend` for the mask."""
        if others is None:
            return self.out(self.context(x_BLD, mask, causal=causal))
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(*self.project_across(x_BLD, others), mask, dropout=dropout))


def key_mask(valid_BL: Tensor) -> Tensor:
    """Every query may look at the valid keys: bool [B, 1, 1, L].

    The first key is always open: it is valid in every cell that has a token, and keeps an empty cell's softmax finite.
    """
    first_L = torch.arange(valid_BL.shape[1], device=valid_BL.device) == 0
    return (valid_BL | first_L)[:, None, None, :]
