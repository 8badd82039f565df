"""The one place for attention: every architecture attends through `MultiHeadAttention`.

Legend: B cells, L tokens, H heads, K width of a head, D = H K width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention with a boolean mask, over torch's scaled_dot_product_attention.

    Parameters
    ----------
    width
        D; a multiple of `n_heads`.
    n_heads
        H.
    dropout
        Probability of dropping an attention weight, in training only.

    Attributes
    ----------
    qkv
        Linear(D, 3 D); rows ordered query, key, value, as torch's `in_proj_weight` and scGPT's `Wqkv`.
    out
        Linear(D, D), the output projection.
    """

    def __init__(self, width: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def context(self, x_BLD: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D], the heads side by side, before the output projection.

        Parameters
        ----------
        mask
            bool, broadcasts to [B, H, L, L] (query, key): True where the query may look. Every query needs one key.
        """
        batch, length, width = x_BLD.shape
        q_BHLK, k_BHLK, v_BHLK = (
            self.qkv(x_BLD).view(batch, length, 3, self.n_heads, width // self.n_heads).permute(2, 0, 3, 1, 4)
        )
        context_BHLK = F.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return context_BHLK.transpose(1, 2).reshape(batch, length, width)

    def forward(self, x_BLD: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D]; see `context` for the mask."""
        return self.out(self.context(x_BLD, mask))


def key_mask(valid_BL: Tensor) -> Tensor:
    """Every query may look at the valid keys: bool [B, 1, 1, L].

    The first key is always open: it is valid in every cell that has a token, and keeps an empty cell's softmax finite.
    """
    first_L = torch.arange(valid_BL.shape[1], device=valid_BL.device) == 0
    return (valid_BL | first_L)[:, None, None, :]
