"""scGPT: a transformer over a cell's expressed genes and their binned counts, which learns to generate hidden counts.

Cui et al., Nature Methods 21, 1470 (2024), with the objective of the authors' pretraining branches.

A cell is <cls> and its nonzero genes, each with the per-cell quantile bin (1..50) of its count; genes have no position.
In training a part of the genes hides its bin ("generated", the others are "perceived"): every token attends to the
perceived ones and to itself, so hidden genes are predicted independently of each other. Three losses: from each hidden
gene's own state (gep), from the state of <cls> and the gene's embedding (mvc), and from each hidden gene's state in a
second pass that is given the first pass's <cls> state as its <cls> input (gep_prompt).

Token ids: gene g is g; then pad V, cls V + 1, eoc V + 2 (unused, kept for the released weights).

Legend: B cells, L tokens, D width, V genes, M hidden positions, N nonzeros, Q quantile edges.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention import MultiHeadAttention, key_mask
from cellmill.models.base import CellModel, GeneStatistics, Inputs, Losses, LossTerm
from cellmill.shards.batch import CellBatch
from cellmill.views import scgpt as views
from cellmill.views.ragged import Genes, hash_genes, pad, padded_index, place_within, spread

N_SPECIALS = 3
PAD_VALUE = -2.0
MAX_VALUE = 512.0
EMBEDDING_RANGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an scGPT."""

    n_layers: int = field(metadata={"description": "Transformer layers.", "ge": 1})
    width: int = field(metadata={"description": "Width of a token's state.", "ge": 1})
    n_heads: int = field(metadata={"description": "Attention heads; divides width.", "ge": 1})
    hidden: int = field(metadata={"description": "Width of a layer's feed-forward network.", "ge": 1})
    max_length: int = field(metadata={"description": "Longest cell in tokens, <cls> included.", "ge": 2})
    dropout: float = field(
        default=0.2, metadata={"description": "Dropout, also of attention weights.", "ge": 0, "lt": 1}
    )
    n_bins: int = field(default=51, metadata={"description": "Bins of a count; bin 0 stands for zero.", "ge": 3})
    cell_prompt_after: int = field(
        default=1000, metadata={"description": "Training steps before the second pass (gep_prompt) joins.", "ge": 0}
    )
    released_gen_stream: bool = field(
        default=False,
        metadata={
            "description": "As the released weights were trained: hidden genes skip attention's output projection."
        },
    )

    def __post_init__(self):
        if self.width % self.n_heads:
            raise CellmillError(
                f"scgpt: width {self.width} is no multiple of n_heads {self.n_heads}; change one of them"
            )


class ValueEncoder(nn.Module):
    """A scalar value to a vector: clamped, two linear layers, norm, dropout."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.linear1 = nn.Linear(1, sizes.width)
        self.linear2 = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, values_BL: Tensor) -> Tensor:
        """[B, L, D]."""
        x_BLD = F.relu(self.linear1(values_BL.clamp(max=MAX_VALUE).unsqueeze(2)))
        return self.dropout(self.norm(self.linear2(x_BLD)))


class Layer(nn.Module):
    """One post-norm transformer layer, with ReLU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.released_gen_stream = sizes.released_gen_stream
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout)
        self.linear1 = nn.Linear(sizes.width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor, generated_BL: Tensor) -> Tensor:
        """[B, L, D]; `mask` as for `MultiHeadAttention`, `generated_BL` marks the hidden genes."""
        context_BLD = self.attention.context(x_BLD, mask)
        attended_BLD = self.attention.out(context_BLD)
        if self.released_gen_stream:
            attended_BLD = torch.where(generated_BL.unsqueeze(2), context_BLD, attended_BLD)
        x_BLD = self.norm1(x_BLD + self.dropout(attended_BLD))
        return self.norm2(x_BLD + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x_BLD))))))


class Scgpt(CellModel):
    """scGPT.

    Parameters
    ----------
    sizes
        See `Sizes`.
    n_genes
        V.
    statistics
        Not used.
    """

    Sizes = Sizes
    presets: ClassVar[dict[str, Sizes]] = {
        "demo": Sizes(n_layers=2, width=32, n_heads=2, hidden=32, max_length=301, dropout=0.0, cell_prompt_after=1000),
        "whole-human": Sizes(n_layers=12, width=512, n_heads=8, hidden=512, max_length=1200),
    }
    published_genes: ClassVar[dict[str, int]] = {"whole-human": 60694}
    poolings = ("cls",)

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.pad, self.cls = n_genes, n_genes + 1
        width = sizes.width
        self.gene_embedding = nn.Embedding(n_genes + N_SPECIALS, width, padding_idx=self.pad)
        nn.init.uniform_(self.gene_embedding.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        self.gene_norm = nn.LayerNorm(width)
        self.value_encoder = ValueEncoder(sizes)
        self.flag_embedding = nn.Embedding(2, width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.decoder = nn.Sequential(
            nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)
        )
        self.mvc_query = nn.Linear(width, width)
        self.mvc_weight = nn.Linear(width, width, bias=False)
        # pretraining does not use it; the released weights hold it, and fine-tuning starts from it
        self.cls_decoder = nn.Sequential(
            *(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)),
            *(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)),
            nn.Linear(width, 1),
        )

    def bin_counts(self, cells: CellBatch, *keys) -> np.ndarray:
        """Quantile bin of each count among its cell's nonzero counts, int32 [N] in 1..n_bins - 1.

        Parameters
        ----------
        *keys
            Seed and step of the draw among the bins of a count that several edges equal.
        """
        return views.bin_counts(cells, self.sizes.n_bins - 1, hash_genes(cells, "scgpt genes", *keys))

    def _matrix(self, genes: Genes, values_N: np.ndarray) -> Inputs:
        """`tokens` and `values` [B, L], with <cls> in front."""
        tokens_BL = pad(genes.offsets, genes.genes, self.pad, before=1, dtype=np.int64)
        tokens_BL[:, 0] = self.cls
        values_BL = pad(genes.offsets, values_N, PAD_VALUE, before=1, dtype=np.float32)
        return {"tokens": torch.from_numpy(tokens_BL), "values": torch.from_numpy(values_BL)}

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """`tokens`, `values` [B, L]; `positions` [M] of hidden genes in flat tokens; `targets` [M], their bins.

        See `cellmill.views.scgpt.pretrain`. Hidden genes carry the padding value, which the network does not read.
        """
        genes, bins_N, perceived_B = views.pretrain(
            cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1, seed=seed, step=step
        )
        hidden_M = np.flatnonzero(place_within(genes.offsets) >= spread(perceived_B, genes.offsets))
        inputs = self._matrix(genes, bins_N)
        positions_M = padded_index(genes.offsets, inputs["tokens"].shape[1], before=1)[hidden_M]
        inputs["positions"] = torch.from_numpy(positions_M)
        inputs["targets"] = torch.from_numpy(bins_N[hidden_M].astype(np.float32))
        inputs["values"].view(-1)[inputs["positions"]] = PAD_VALUE
        return inputs

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens`, `values` [B, L]; subset and ties are drawn by a fixed seed, so they depend on the cell alone."""
        genes, bins_N, _ = views.embed(cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1)
        return self._matrix(genes, bins_N)

    def encode(self, x_BLD: Tensor, tokens_BL: Tensor, generated_BL: Tensor) -> Tensor:
        """[B, L, D], the last layer's states: each token attends to the perceived tokens and to itself."""
        perceived_BL = (tokens_BL != self.pad) & ~generated_BL
        itself_LL = torch.eye(tokens_BL.shape[1], dtype=torch.bool, device=tokens_BL.device)
        mask = (perceived_BL[:, None, :] | itself_LL).unsqueeze(1)
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask, generated_BL)
        return x_BLD

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """Squared errors of the bins: `gep`, `mvc` and `gep_prompt`.

        The second pass differs from the first in the input of <cls> alone; both see the same dropout of the inputs.
        `gep_prompt` joins after `cell_prompt_after` training steps; validation (step None) always has it, so that its
        total means the same throughout.
        """
        tokens_BL, positions_M, targets_M = inputs["tokens"], inputs["positions"], inputs["targets"]
        generated_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
        generated_BL.view(-1)[positions_M] = True
        genes_BLD = self.gene_norm(self.gene_embedding(tokens_BL))
        x_BLD = genes_BLD + torch.where(
            generated_BL.unsqueeze(2), self.flag_embedding.weight[1], self.value_encoder(inputs["values"])
        )
        h_BLD = self.encode(x_BLD, tokens_BL, generated_BL)
        cls_BD = h_BLD[:, 0]
        gep_M = self._decode(h_BLD, positions_M)
        # <W q, h> for all hidden genes of a cell: fold W into the cell's state once, not into every gene's query
        query_MD = torch.sigmoid(self.mvc_query(genes_BLD.flatten(0, 1).index_select(0, positions_M)))
        cell_BD = cls_BD @ self.mvc_weight.weight
        mvc_M = (query_MD.float() * cell_BD.float()[positions_M // tokens_BL.shape[1]]).sum(1)
        losses = {"gep": _term(gep_M, targets_M), "mvc": _term(mvc_M, targets_M)}
        if step is None or step >= self.sizes.cell_prompt_after:
            x_BLD = torch.cat([cls_BD.detach().unsqueeze(1).to(x_BLD.dtype), x_BLD[:, 1:]], dim=1)
            h_BLD = self.encode(x_BLD, tokens_BL, generated_BL)
            prompt_M = self._decode(h_BLD, positions_M)
            losses["gep_prompt"] = _term(prompt_M, targets_M)
        return losses

    def _decode(self, h_BLD: Tensor, positions_M: Tensor) -> Tensor:
        """float32 [M], bins read from the states; the last product never in bfloat16, whose steps near 50 are 1/4."""
        hidden_MD = self.decoder[:-1](h_BLD.flatten(0, 1).index_select(0, positions_M))
        with torch.autocast(h_BLD.device.type, enabled=False):
            return self.decoder[-1](hidden_MD.float()).squeeze(1)

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], the last state of <cls>, of length 1."""
        self.check_pooling(pooling)
        tokens_BL = inputs["tokens"]
        x_BLD = self.gene_norm(self.gene_embedding(tokens_BL)) + self.value_encoder(inputs["values"])
        nothing_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
        for layer in self.layers:
            x_BLD = layer(x_BLD, key_mask(tokens_BL != self.pad), nothing_BL)
        return F.normalize(x_BLD[:, 0].float(), dim=1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings after their norm."""
        with torch.no_grad():
            return self.gene_norm(self.gene_embedding.weight[: self.n_genes]).float()

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V], mean bin of each gene over the cells that express it; the mean over all genes where none does."""
        sums_V, counts_V = np.zeros(self.n_genes), np.zeros(self.n_genes)
        for cells in batches:
            sums_V += np.bincount(cells.genes, self.bin_counts(cells, "trivial"), minlength=self.n_genes)
            counts_V += np.bincount(cells.genes, minlength=self.n_genes)
        overall = sums_V.sum() / max(counts_V.sum(), 1)
        means_V = np.divide(sums_V, counts_V, out=np.full(self.n_genes, overall), where=counts_V > 0)
        return torch.from_numpy(means_V).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """All three terms when every hidden gene is predicted by its mean bin in the corpus."""
        genes_M = inputs["tokens"].flatten()[inputs["positions"]]
        term = _term(trivial.to(genes_M.device)[genes_M], inputs["targets"])
        return {"gep": term, "mvc": term, "gep_prompt": term}


def _term(predicted_M: Tensor, targets_M: Tensor) -> LossTerm:
    error_M = predicted_M.float() - targets_M
    return LossTerm(error_M.square().sum(), torch.full((), len(targets_M), device=targets_M.device))


MODEL = Scgpt
