"""What scMulan remembers of the words that it has read, so that a further word costs no more than itself.

Legend: B sentences, N slots of words, S places of a sentence, H heads, K width of a head, D = H K width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cellmill.models.packing import Layout


class Cache:
    """Keys and values of each layer, in a matrix with room behind every sentence.

    Parameters
    ----------
    layout
        Of the words that are read at once.
    further
        Words that may follow, one at a time.
    """

    def __init__(self, layout: Layout, further: int):
        self.layout = layout
        self.lengths_B = layout.lengths_B
        self.filled = layout.width or layout.longest
        self.room = self.filled + further
        self.layers: list[tuple[Tensor, Tensor]] = []

    def store(self, k_NHK: Tensor, v_NHK: Tensor) -> None:
        """Keep the next layer's keys and values of the words that are read at once."""
        behind = (0, 0, 0, 0, 0, self.room - self.filled)
        self.layers.append(tuple(F.pad(self.layout.to_matrix(x), behind) for x in (k_NHK, v_NHK)))

    def open(self) -> Tensor:
        """Make room for one more word of every sentence: bool [B, S], the places that it may look at."""
        self.lengths_B = self.lengths_B + 1
        self.filled += 1
        return torch.arange(self.filled, device=self.lengths_B.device) < self.lengths_B[:, None]

    def attend(self, layer: int, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, open_BS: Tensor) -> Tensor:
        """[B, D], what the new words read of all words of their sentences, themselves among them; keeps them, too."""
        keys_BSHK, values_BSHK = self.layers[layer]
        rows_B = torch.arange(len(q_BHK), device=q_BHK.device)
        keys_BSHK[rows_B, self.lengths_B - 1] = k_BHK
        values_BSHK[rows_B, self.lengths_B - 1] = v_BHK
        k_BHSK, v_BHSK = (x[:, : self.filled].transpose(1, 2) for x in (keys_BSHK, values_BSHK))
        # one query a sentence and keys in a matrix: this is not for `cellmill.models.attention`, which packs cells
        mask_B11S = open_BS[:, None, None]
        return F.scaled_dot_product_attention(q_BHK.unsqueeze(2), k_BHSK, v_BHSK, attn_mask=mask_B11S).flatten(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sentences alone."""
        self.lengths_B = self.lengths_B[rows]
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
