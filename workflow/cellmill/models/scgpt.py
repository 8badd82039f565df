"""scGPT: a transformer over a cell's expressed genes and their binned counts, which learns to generate hidden counts.

Cui et al., Nature Methods 21, 1470 (2024), with the objective of the authors' pretraining branches.

A cell is <cls> and its nonzero genes, each with the per-cell quantile bin (1..50) of its count; genes have no position.
In training a part of the genes hides its bin ("generated", the others are "perceived"): every token attends to the
perceived ones and to itself, so hidden genes are predicted independently of each other. Three losses: from each hidden
gene's own state (gep), from the state of <cls> and the gene's embedding (mvc), and from each hidden gene's state in a
second pass that is given the first pass's <cls> state as its <cls> input (gep_prompt).

Token ids: gene g is g; then pad V, cls V + 1, eoc V + 2 (unused, kept for the released weights).

Legend: B cells, P perceived tokens (<cls> in front), G generated tokens, C of them at a time, D width, V genes,
N nonzeros, Q genes that a cell is asked for, E quantile edges.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention_padded import MultiHeadAttention, attend, key_mask
from cellmill.models.base import CellModel, GeneStates, GeneStatistics, Imputed, Inputs, Losses, LossTerm
from cellmill.shards.batch import CellBatch
from cellmill.views import scgpt as views
from cellmill.views.ragged import hash_genes, offsets_of, pad, place_within, spread

N_SPECIALS = 3
"""<pad>, <cls> and <eoc>."""
PAD_VALUE = -2.0
MAX_VALUE = 512.0
EMBEDDING_RANGE = 0.1
CHUNK = 128
"""Generated tokens that attend at once. They do not see each other: it bounds memory and changes nothing."""


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
    flag_embedding: bool = field(
        default=True,
        metadata={
            "description": "Hidden genes carry a learned flag beside their embedding, as in the pretraining branches."
        },
    )
    cell_prompt_after: int = field(
        default=1000, metadata={"description": "Training steps before the second pass (gep_prompt) joins.", "ge": 0}
    )
    value_init: Literal["released", "spread"] = field(
        default="released",
        metadata={
            "description": "Initial biases of the value encoder: as released, where high bins look alike for long, or "
            "such that its units switch on all over the bins, which lets short trainings use the counts."
        },
    )
    n_classes: int = field(
        default=1, metadata={"description": "Classes of the head that fine-tuning starts from.", "ge": 1}
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
        if sizes.value_init == "spread":
            with torch.no_grad():
                kinks_D = torch.rand(sizes.width) * (sizes.n_bins - 1)
                self.linear1.bias.copy_(-self.linear1.weight[:, 0] * kinks_D)

    def forward(self, values_BP: Tensor) -> Tensor:
        """[B, P, D]."""
        x_BPD = F.relu(self.linear1(values_BP.clamp(max=MAX_VALUE).unsqueeze(2)))
        return self.dropout(self.norm(self.linear2(x_BPD)))


class Layer(nn.Module):
    """One post-norm transformer layer, with ReLU, over perceived and generated tokens."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.released_gen_stream = sizes.released_gen_stream
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout)
        self.linear1 = nn.Linear(sizes.width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self, x_BPD: Tensor, g_BGD: Tensor | None, masks: dict[int, Tensor], n_perceived: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Perceived tokens attend to each other, every generated one to them and to itself.

        Parameters
        ----------
        x_BPD, g_BGD
            Perceived and generated tokens; there may be no generated ones.
        masks
            Which keys are open: to perceived tokens (0), and to C generated tokens (C), whose own keys come last.
        n_perceived
            Of how many perceived tokens, the first, the new states are wanted; by default of all.
        """
        dropout = self.attention.dropout if self.training else 0.0
        q, k, v = self.attention.project(x_BPD)
        context_BPD = attend(q[:, :, :n_perceived], k, v, masks[0], dropout=dropout)
        x_BPD = self._after(x_BPD[:, :n_perceived], self.attention.out(context_BPD))
        if g_BGD is None:
            return x_BPD, None
        parts = []
        for g_BCD in g_BGD.split(CHUNK, dim=1):
            q, own_k, own_v = self.attention.project(g_BCD)
            k_and_own, v_and_own = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
            context_BCD = attend(q, k_and_own, v_and_own, masks[g_BCD.shape[1]], dropout=dropout)
            parts.append(
                self._after(g_BCD, context_BCD if self.released_gen_stream else self.attention.out(context_BCD))
            )
        return x_BPD, torch.cat(parts, dim=1)

    def _after(self, x_BLD: Tensor, attended_BLD: Tensor) -> Tensor:
        x_BLD = self.norm1(x_BLD + self.dropout(attended_BLD))
        return self.norm2(x_BLD + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x_BLD))))))


class Predicted(NamedTuple):
    """What is predicted of generated genes."""

    gep_BG: Tensor
    """float32, bins by each gene's own state."""
    mvc_BG: Tensor
    """float32, bins by the cell's state and each gene's embedding."""
    cls_BD: Tensor
    """The cell's state: the last one of <cls>, or the prompt."""


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
        "demo": Sizes(n_layers=1, width=32, n_heads=2, hidden=32, max_length=129, dropout=0.0, value_init="spread"),
        "tiny": Sizes(n_layers=3, width=192, n_heads=3, hidden=192, max_length=1024),
        "small": Sizes(n_layers=7, width=448, n_heads=7, hidden=448, max_length=1024),
        "base": Sizes(n_layers=12, width=768, n_heads=12, hidden=768, max_length=1024),
        # the published number of parameters counts no flag embedding, and no weights with one are published
        "whole-human": Sizes(n_layers=12, width=512, n_heads=8, hidden=512, max_length=1200, flag_embedding=False),
    }
    published_genes: ClassVar[dict[str, int]] = {"whole-human": 60694}
    poolings = ("cls", "mean")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.pad, self.cls = n_genes, n_genes + 1
        width = sizes.width
        self.gene_embedding = nn.Embedding(n_genes + N_SPECIALS, width, padding_idx=self.pad)
        nn.init.uniform_(self.gene_embedding.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        self.gene_norm = nn.LayerNorm(width)
        self.value_encoder = ValueEncoder(sizes)
        self.flag_embedding = nn.Embedding(2, width) if sizes.flag_embedding else None  # row 1 flags hidden genes
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
            nn.Linear(width, sizes.n_classes),
        )
        # ids of <pad>, <cls> and <eoc> in the released vocabulary that the weights are from, if they are
        self.register_buffer("special_ids", torch.arange(n_genes, n_genes + N_SPECIALS))

    # --- views --------------------------------------------------------------------------------------------------------

    def bin_counts(self, cells: CellBatch, *keys) -> np.ndarray:
        """Quantile bin of each count among its cell's nonzero counts, int32 [N] in 1..n_bins - 1.

        Parameters
        ----------
        *keys
            Seed and step of the draw among the bins of a count that several edges equal.
        """
        return views.bin_counts(cells, self.sizes.n_bins - 1, hash_genes(cells, "scgpt genes", *keys))

    def _perceived(self, offsets: np.ndarray, genes_N: np.ndarray, bins_N: np.ndarray) -> Inputs:
        """`tokens` and `values` [B, P], with <cls> in front."""
        tokens_BP = pad(offsets, genes_N, self.pad, before=1, dtype=np.int64)
        tokens_BP[:, 0] = self.cls
        values_BP = pad(offsets, bins_N, PAD_VALUE, before=1, dtype=np.float32)
        return {"tokens": torch.from_numpy(tokens_BP), "values": torch.from_numpy(values_BP)}

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """`tokens`, `values` [B, P], perceived; `asked` [B, G], hidden genes; `targets` [B, G], their bins.

        See `cellmill.views.scgpt.pretrain`.
        """
        (_, offsets, genes_N), bins_N, perceived_B = views.pretrain(
            cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1, seed=seed, step=step
        )
        shown_N = place_within(offsets) < spread(perceived_B, offsets)
        shown_offsets = offsets_of(perceived_B)
        hidden_offsets = offsets - shown_offsets
        inputs = self._perceived(shown_offsets, genes_N[shown_N], bins_N[shown_N])
        inputs["asked"] = torch.from_numpy(pad(hidden_offsets, genes_N[~shown_N], self.pad, dtype=np.int64))
        inputs["targets"] = torch.from_numpy(pad(hidden_offsets, bins_N[~shown_N], 0, dtype=np.float32))
        return inputs

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens`, `values` [B, P]; subset and ties are drawn by a fixed seed, so they depend on the cell alone."""
        binned = views.embed(cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1)
        return self._perceived(binned.genes.offsets, binned.genes.genes, binned.bins)

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """As `embed_inputs`, with `asked` [B, Q] and `edges` [B, E], log1p(CP10k) at the edges of the visible bins."""
        edges_BE = views.count_edges(cells, self.sizes.n_bins - 1)
        edges_BE *= (1e4 / np.maximum(cells.totals, 1))[:, None]
        return {
            **self.embed_inputs(cells),
            "asked": torch.from_numpy(np.ascontiguousarray(genes_BQ, dtype=np.int64)),
            "edges": torch.from_numpy(np.log1p(edges_BE).astype(np.float32)),
        }

    # --- network ------------------------------------------------------------------------------------------------------

    def _genes(self, tokens_BL: Tensor) -> Tensor:
        return self.gene_norm(self.gene_embedding(tokens_BL))

    def _perceive(self, inputs: Inputs) -> Tensor:
        """[B, P, D], what goes in for perceived tokens."""
        return self._genes(inputs["tokens"]) + self.value_encoder(inputs["values"])

    def _flagged(self, genes_BGD: Tensor) -> Tensor:
        """[B, G, D], what goes in for generated tokens."""
        return genes_BGD if self.flag_embedding is None else genes_BGD + self.flag_embedding.weight[1]

    def encode(
        self, x_BPD: Tensor, g_BGD: Tensor | None, valid_BP: Tensor, *, only_cls: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Last states of perceived and of generated tokens (None where there are none).

        Parameters
        ----------
        x_BPD, g_BGD
            What goes in.
        valid_BP
            bool, which perceived tokens are no padding.
        only_cls
            Of the perceived tokens, the last state of <cls> alone is wanted, [B, 1, D].
        """
        masks = {0: key_mask(valid_BP)}
        sizes = () if g_BGD is None else {part.shape[1] for part in g_BGD.split(CHUNK, dim=1)}
        for size in sizes:
            itself_CC = torch.eye(size, dtype=torch.bool, device=valid_BP.device)
            parts = (masks[0].expand(-1, -1, size, -1), itself_CC.expand(len(valid_BP), 1, -1, -1))
            masks[size] = torch.cat(parts, dim=3)
        for layer in self.layers[:-1]:
            x_BPD, g_BGD = layer(x_BPD, g_BGD, masks)
        return self.layers[-1](x_BPD, g_BGD, masks, 1 if only_cls else None)

    def states(self, inputs: Inputs, *, only_cls: bool = False) -> Tensor:
        """[B, P, D], the last states of <cls> and the genes of `embed_inputs`; or [B, 1, D], of <cls> alone."""
        return self.encode(self._perceive(inputs), None, inputs["tokens"] != self.pad, only_cls=only_cls)[0]

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """Squared errors of the bins: `gep`, `mvc` and `gep_prompt`.

        The second pass differs from the first in the input of <cls> alone; both see the same dropout of the inputs.
        `gep_prompt` joins after `cell_prompt_after` training steps; validation (step None) always has it, so that its
        total means the same throughout.
        """
        x_BPD, genes_BGD = self._perceive(inputs), self._genes(inputs["asked"])
        g_BGD, valid_BP = self._flagged(genes_BGD), inputs["tokens"] != self.pad
        h_BPD, h_BGD = self.encode(x_BPD, g_BGD, valid_BP, only_cls=True)
        cls_BD = h_BPD[:, 0]
        losses = {
            "gep": self._term(self._decode(h_BGD), inputs),
            "mvc": self._term(self._decode_from_cell(cls_BD, genes_BGD), inputs),
        }
        if step is None or step >= self.sizes.cell_prompt_after:
            _, h_BGD = self.encode(_with_cls(x_BPD, cls_BD.detach()), g_BGD, valid_BP, only_cls=True)
            losses["gep_prompt"] = self._term(self._decode(h_BGD), inputs)
        return losses

    def predict(self, inputs: Inputs, cls_BD: Tensor | None = None) -> Predicted:
        """The bins of genes that are `asked` for, one by one, whatever else is asked.

        Parameters
        ----------
        inputs
            `tokens`, `values` [B, P] and `asked` [B, G].
        cls_BD
            A cell's last state of <cls>, to put in the place of <cls> ("cell prompt").
        """
        x_BPD, genes_BGD = self._perceive(inputs), self._genes(inputs["asked"])
        if cls_BD is not None:
            x_BPD = _with_cls(x_BPD, cls_BD)
        g_BGD, valid_BP = self._flagged(genes_BGD), inputs["tokens"] != self.pad
        h_BPD, h_BGD = self.encode(x_BPD, g_BGD, valid_BP, only_cls=True)
        cls_BD = h_BPD[:, 0] if cls_BD is None else cls_BD
        return Predicted(self._decode(h_BGD), self._decode_from_cell(cls_BD, genes_BGD), cls_BD)

    def _decode(self, h_BGD: Tensor) -> Tensor:
        """float32 [B, G], bins by the states; the last product never in bfloat16, whose steps near 50 are 1/4."""
        hidden_BGD = self.decoder[:-1](h_BGD)
        with torch.autocast(h_BGD.device.type, enabled=False):
            return self.decoder[-1](hidden_BGD.float()).squeeze(2)

    def _decode_from_cell(self, cls_BD: Tensor, genes_BGD: Tensor) -> Tensor:
        """float32 [B, G], <W q, h> with the genes' queries q and the cell's state h."""
        query_BGD = torch.sigmoid(self.mvc_query(genes_BGD))
        cell_BD = cls_BD @ self.mvc_weight.weight  # W is folded into the cell's state once, not into every gene's query
        return (query_BGD.float() * cell_BD.float().unsqueeze(1)).sum(2)

    def _term(self, predicted_BG: Tensor, inputs: Inputs) -> LossTerm:
        asked_BG = inputs["asked"] != self.pad
        error_BG = (predicted_BG.float() - inputs["targets"]) * asked_BG
        return LossTerm(error_BG.square().sum(), asked_BG.sum().float())

    # --- what is read out ---------------------------------------------------------------------------------------------

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], of length 1: the last state of <cls>, or the mean of those of the genes (zero for an empty cell)."""
        pooling = self.check_pooling(pooling)
        h_BPD = self.states(inputs, only_cls=pooling == "cls").float()
        if pooling == "cls":
            return F.normalize(h_BPD[:, 0], dim=1)
        is_gene_BP1 = (inputs["tokens"] < self.n_genes).unsqueeze(2)
        return F.normalize((h_BPD * is_gene_BP1).sum(1), dim=1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings after their norm."""
        with torch.no_grad():
            return self.gene_norm(self.gene_embedding.weight[: self.n_genes]).float()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The last layer's states of the genes that `embed_inputs` drew of each cell."""
        tokens_BP = inputs["tokens"]
        cells_N, places_N = torch.nonzero(tokens_BP < self.n_genes, as_tuple=True)
        states_ND = self.states(inputs)[cells_N, places_N].float()
        return GeneStates(cells_N, tokens_BP[cells_N, places_N], states_ND)

    def impute(self, inputs: Inputs) -> Imputed:
        """Asked genes are generated (`gep`); values by the visible counts' quantiles, detection by the bin."""
        bins_BQ = self.predict(inputs).gep_BG
        return Imputed(value_of_bins(bins_BQ, inputs["edges"]), bins_BQ)

    # --- trivial baseline ---------------------------------------------------------------------------------------------

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V + 3], mean bin of each gene over the cells that express it; the mean over all genes where none does."""
        sums_V, counts_V = np.zeros((2, self.n_genes + N_SPECIALS))
        for cells in batches:
            sums_V += np.bincount(cells.genes, self.bin_counts(cells, "trivial"), minlength=len(sums_V))
            counts_V += np.bincount(cells.genes, minlength=len(sums_V))
        overall = sums_V.sum() / max(counts_V.sum(), 1)
        means_V = np.divide(sums_V, counts_V, out=np.full(len(sums_V), overall), where=counts_V > 0)
        return torch.from_numpy(means_V).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """All three terms when every hidden gene is predicted by its mean bin in the corpus."""
        term = self._term(trivial.to(inputs["asked"].device)[inputs["asked"]], inputs)
        return {"gep": term, "mvc": term, "gep_prompt": term}


def _with_cls(x_BPD: Tensor, cls_BD: Tensor) -> Tensor:
    """The inputs with a cell's state in the place of <cls>."""
    return torch.cat([cls_BD.unsqueeze(1).to(x_BPD.dtype), x_BPD[:, 1:]], dim=1)


def value_of_bins(bins_BQ: Tensor, edges_BE: Tensor) -> Tensor:
    """The values at which bins lie among the edges of a cell's bins, linear between edges: [B, Q].

    Parameters
    ----------
    bins_BQ
        Real numbers; those beyond 1..E take the first and the last edge.
    edges_BE
        Ascending.
    """
    last = edges_BE.shape[1] - 1
    place_BQ = (bins_BQ - 1).clamp(0, last)
    low_BQ = place_BQ.long().clamp(max=last - 1)
    low, high = edges_BE.gather(1, low_BQ), edges_BE.gather(1, low_BQ + 1)
    return low + (place_BQ - low_BQ) * (high - low)


MODEL = Scgpt
