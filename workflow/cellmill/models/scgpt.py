"""scGPT: a transformer over a cell's expressed genes and their binned counts, which learns to generate hidden counts.

Cui et al., Nature Methods 21, 1470 (2024), with the objective of the authors' pretraining branches.

A cell is <cls> and its nonzero genes, each with the per-cell quantile bin (1..50) of its count; genes have no position.
In training a part of the genes hides its bin ("generated", the others are "perceived"): every token attends to the
perceived ones and to itself, so hidden genes are predicted independently of each other. Three losses: from each hidden
gene's own state (gep), from the state of <cls> and the gene's embedding (mvc), and from each hidden gene's state in a
second pass that is given the first pass's <cls> state as its <cls> input (gep_prompt).

Token ids: gene g is g; then pad V, cls V + 1, eoc V + 2 (unused, kept for the released weights).

Legend: B cells, P slots of perceived tokens of all cells together (<cls> in front of each cell), G slots of generated
ones, D width, V genes, N nonzeros, Q genes that a cell is asked for, E quantile edges.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention import MultiHeadAttention, attend, attention_flops
from cellmill.models.base import (
    CellModel,
    GeneStates,
    GeneStatistics,
    Imputed,
    Inputs,
    Losses,
    LossTerm,
    in_compute_dtype,
)
from cellmill.models.packing import PACKED, Layout, uniform
from cellmill.shards.batch import CellBatch
from cellmill.views import scgpt as views
from cellmill.views.ragged import hash_genes, offsets_of, place_within, spread

N_SPECIALS = 3
"""<pad>, <cls> and <eoc>."""
PAD_VALUE = -2
"""Of <cls>, and of unused slots."""
MAX_VALUE = 512
ASKED_AT_ONCE = 2048
"""Genes of a cell that are generated at once where no gradients are: a mask may hold each one's pairs with all others.
"""
EMBEDDING_RANGE = 0.1


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an scGPT."""

    n_layers: int = field(metadata={"description": "Transformer layers.", "ge": 1})
    width: int = field(metadata={"description": "Width of a token's state.", "ge": 1})
    n_heads: int = field(metadata={"description": "Attention heads; divides width.", "ge": 1})
    hidden: int = field(metadata={"description": "Width of a layer's feed-forward network.", "ge": 1})
    max_length: int = field(metadata={"description": "Longest cell in tokens, <cls> included.", "ge": 2})
    dropout: float = field(default=0.2, metadata={"description": "Dropout of states.", "ge": 0, "lt": 1})
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "description": "Dropout of attention weights; null: as dropout. Any but 0 rules out the fast attention "
            "of GPUs.",
            "ge": 0,
            "lt": 1,
        },
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

    @property
    def dropout_of_attention(self) -> float:
        """Dropout of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


class ValueEncoder(nn.Module):
    """A scalar value to a vector: clamped, two linear layers, norm, dropout."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.n_bins = sizes.n_bins
        self.linear1 = nn.Linear(1, sizes.width)
        self.linear2 = nn.Linear(sizes.width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)
        if sizes.value_init == "spread":
            with torch.no_grad():
                kinks_D = torch.rand(sizes.width) * (sizes.n_bins - 1)
                self.linear1.bias.copy_(-self.linear1.weight[:, 0] * kinks_D)

    def forward(self, values_P: Tensor) -> Tensor:
        """float32 [P, D], of whole values from `PAD_VALUE` to the highest bin.

        They are few, and tokens many: the network computes each value once.
        """
        device = values_P.device
        every_W = torch.arange(PAD_VALUE, self.n_bins, device=device).clamp(max=MAX_VALUE)
        with torch.autocast(device.type, enabled=False):
            table_WD = self.norm(self.linear2(F.relu(self.linear1(every_W.float().unsqueeze(1)))))
        return self.dropout(F.embedding(values_P - PAD_VALUE, table_WD))


class Layer(nn.Module):
    """One post-norm transformer layer, with ReLU, over perceived and generated tokens."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.released_gen_stream = sizes.released_gen_stream
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout_of_attention)
        self.linear1 = nn.Linear(sizes.width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self,
        x_PD: Tensor,
        layout: Layout,
        g_GD: Tensor | None = None,
        layout_asked: Layout | None = None,
        cls_BD: Tensor | None = None,
        layout_cls: Layout | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Perceived tokens attend to each other, every generated one to its cell's perceived ones and to itself.

        Parameters
        ----------
        x_PD, layout
            Perceived tokens.
        g_GD, layout_asked
            Generated tokens; there may be none.
        cls_BD, layout_cls
            Those of the perceived tokens whose new states alone are wanted; by default all are.

        Returns
        -------
        The new states of perceived tokens, and of generated ones.
        """
        dropout = self.attention.dropout_now
        if cls_BD is None:
            cls_BD, layout_cls = x_PD, layout
            q, k, v = self.attention.project(x_PD)
        else:
            q, k, v = self.attention.project_across(cls_BD, x_PD)
        context_BD = attend(q, k, v, layout_cls, layout, dropout=dropout)
        x_PD = self._after(cls_BD, self.attention.out(context_BD))
        if g_GD is None:
            return x_PD, None
        q, own_k, own_v = self.attention.project(g_GD)
        context_GD = attend(q, k, v, layout_asked, layout, own=(own_k, own_v), dropout=dropout)
        return x_PD, self._after(g_GD, context_GD if self.released_gen_stream else self.attention.out(context_GD))

    def _after(self, x_ND: Tensor, attended_ND: Tensor) -> Tensor:
        x_ND = in_compute_dtype(self.norm1(x_ND + self.dropout(attended_ND)))
        hidden_ND = self.linear2(self.dropout(F.relu(self.linear1(x_ND))))
        return in_compute_dtype(self.norm2(x_ND + self.dropout(hidden_ND)))

    def flops(self, layout: Layout, layout_asked: Layout, layout_cls: Layout | None = None) -> float:
        """Floating-point operations of `forward`; see `CellModel.body_flops`."""
        layout_cls = layout if layout_cls is None else layout_cls
        width, hidden = self.linear2.out_features, self.linear2.in_features
        asked, project = layout_asked.n_tokens, 0 if self.released_gen_stream else width**2
        products = 2.0 * (
            2 * width**2 * layout.n_tokens
            + (2 * width**2 + 2 * width * hidden) * layout_cls.n_tokens
            + (3 * width**2 + 2 * width * hidden + project) * asked
        )
        attention = attention_flops(width, layout_cls, layout) + attention_flops(width, layout_asked, layout, own=True)
        return products + attention


class Predicted(NamedTuple):
    """What is predicted of generated genes."""

    gep_G: Tensor
    """float32, bins by each gene's own state."""
    mvc_G: Tensor
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
        "tiny": Sizes(n_layers=3, width=192, n_heads=3, hidden=192, max_length=1024, attention_dropout=0.0),
        "small": Sizes(n_layers=7, width=448, n_heads=7, hidden=448, max_length=1024, attention_dropout=0.0),
        "base": Sizes(n_layers=12, width=768, n_heads=12, hidden=768, max_length=1024, attention_dropout=0.0),
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
        """`tokens` and `values` [P], with <cls> in front of each cell, and their `layout`."""
        layout = self.packing.layout(np.diff(offsets) + 1)
        tokens_P = layout.place(offsets, genes_N, self.pad, before=1, dtype=np.int32)
        tokens_P[layout.starts] = self.cls
        values_P = layout.place(offsets, bins_N, PAD_VALUE, before=1, dtype=np.int32)
        return {"tokens": torch.from_numpy(tokens_P), "values": torch.from_numpy(values_P), "layout": layout}

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """`tokens`, `values` [P], perceived, in `layout`; `asked` [G], hidden genes, and `targets` [G], their bins, in
        `layout_asked`.

        See `cellmill.views.scgpt.pretrain`.
        """
        (_, offsets, genes_N), bins_N, perceived_B = views.pretrain(
            cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1, seed=seed, step=step
        )
        shown_N = place_within(offsets) < spread(perceived_B, offsets)
        shown_offsets = offsets_of(perceived_B)
        hidden_offsets = offsets - shown_offsets
        asked = self.packing.layout(np.diff(hidden_offsets))
        return {
            **self._perceived(shown_offsets, genes_N[shown_N], bins_N[shown_N]),
            "asked": torch.from_numpy(asked.place(hidden_offsets, genes_N[~shown_N], self.pad, dtype=np.int32)),
            "targets": torch.from_numpy(asked.place(hidden_offsets, bins_N[~shown_N], 0, dtype=np.float32)),
            "layout_asked": asked,
        }

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens`, `values` [P], `layout`; subset and ties are drawn by a fixed seed, so by the cell alone."""
        binned = views.embed(cells, n_edges=self.sizes.n_bins - 1, limit=self.sizes.max_length - 1)
        return self._perceived(binned.genes.offsets, binned.genes.genes, binned.bins)

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """As `embed_inputs`, with `asked` [B Q] in `layout_asked` and `edges` [B, E], log1p(CP10k) at the edges of the
        visible bins.
        """
        edges_BE = views.count_edges(cells, self.sizes.n_bins - 1)
        edges_BE *= (1e4 / np.maximum(cells.totals, 1))[:, None]
        return {
            **self.embed_inputs(cells),
            "asked": torch.from_numpy(genes_BQ.astype(np.int32).ravel()),
            "layout_asked": uniform(*genes_BQ.shape),
            "edges": torch.from_numpy(np.log1p(edges_BE).astype(np.float32)),
        }

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B], <cls> and the genes that there is room for, perceived or generated."""
        return np.minimum(cells.lengths, self.sizes.max_length - 1) + 1

    # --- network ------------------------------------------------------------------------------------------------------

    def _genes(self, tokens_N: Tensor) -> Tensor:
        return self.gene_norm(self.gene_embedding(tokens_N))

    def _perceive(self, genes_PD: Tensor, inputs: Inputs) -> Tensor:
        """[P, D], what goes in for perceived tokens."""
        return in_compute_dtype(genes_PD + self.value_encoder(inputs["values"]))

    def _enter(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """What goes in for perceived tokens [P, D] and generated ones [G, D], and the latter's embeddings."""
        tokens_P, asked_G = inputs["tokens"], inputs["asked"]
        # looked up together: the gradient of a large table is made once
        genes_ND = self._genes(torch.cat([tokens_P, asked_G]))
        genes_PD, genes_GD = genes_ND.split([len(tokens_P), len(asked_G)])
        return self._perceive(genes_PD, inputs), self._flagged(genes_GD), genes_GD

    def _flagged(self, genes_GD: Tensor) -> Tensor:
        """[G, D], what goes in for generated tokens."""
        return in_compute_dtype(genes_GD if self.flag_embedding is None else genes_GD + self.flag_embedding.weight[1])

    def encode(
        self,
        x_PD: Tensor,
        layout: Layout,
        g_GD: Tensor | None = None,
        layout_asked: Layout | None = None,
        *,
        only_cls: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Last states of perceived and of generated tokens (None where there are none).

        Parameters
        ----------
        x_PD, layout
            What goes in for perceived tokens.
        g_GD, layout_asked
            What goes in for generated tokens.
        only_cls
            Of the perceived tokens, the last state of <cls> alone is wanted, [B, D].
        """
        for layer in self.layers[:-1]:
            x_PD, g_GD = layer(x_PD, layout, g_GD, layout_asked)
        if not only_cls:
            return self.layers[-1](x_PD, layout, g_GD, layout_asked)
        cls_BD = x_PD.index_select(0, layout.starts_B)
        return self.layers[-1](x_PD, layout, g_GD, layout_asked, cls_BD, layout.one_each())

    def states(self, inputs: Inputs, *, only_cls: bool = False) -> Tensor:
        """[P, D], the last states of <cls> and the genes of `embed_inputs`; or [B, D], of <cls> alone."""
        x_PD = self._perceive(self._genes(inputs["tokens"]), inputs)
        return self.encode(x_PD, inputs["layout"], only_cls=only_cls)[0]

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """Squared errors of the bins: `gep`, `mvc` and `gep_prompt`.

        The second pass differs from the first in the input of <cls> alone; both see the same dropout of the inputs.
        `gep_prompt` joins after `cell_prompt_after` training steps; validation (step None) always has it, so that its
        total means the same throughout.
        """
        layout, layout_asked = inputs["layout"], inputs["layout_asked"]
        x_PD, g_GD, genes_GD = self._enter(inputs)
        cls_BD, h_GD = self.encode(x_PD, layout, g_GD, layout_asked, only_cls=True)
        losses = {
            "gep": _term(self._decode(h_GD), inputs),
            "mvc": _term(self._decode_from_cell(cls_BD, genes_GD, layout_asked), inputs),
        }
        if self._has_second_pass(step):
            prompted_PD = _with_cls(x_PD, cls_BD.detach(), layout)
            _, h_GD = self.encode(prompted_PD, layout, g_GD, layout_asked, only_cls=True)
            losses["gep_prompt"] = _term(self._decode(h_GD), inputs)
        return losses

    def _has_second_pass(self, step: int | None) -> bool:
        return step is None or step >= self.sizes.cell_prompt_after

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """See `CellModel.loss_counts`: each term is over all hidden genes."""
        names = ("gep", "mvc", "gep_prompt") if self._has_second_pass(step) else ("gep", "mvc")
        return dict.fromkeys(names, _count(inputs))

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """See `CellModel.body_flops`: the layers' and both decoders' products, of both passes where there are two."""
        layout, layout_asked, width = inputs["layout"], inputs["layout_asked"], self.sizes.width
        *layers, last = self.layers
        passes = sum(layer.flops(layout, layout_asked) for layer in layers)
        passes += last.flops(layout, layout_asked, layout.one_each())
        passes += 2.0 * (2 * width**2 + width) * layout_asked.n_tokens
        mvc = 2.0 * ((width**2 + width) * layout_asked.n_tokens + width**2 * len(layout))
        return passes * (2 if self._has_second_pass(step) else 1) + mvc

    def predict(self, inputs: Inputs, cls_BD: Tensor | None = None) -> Predicted:
        """The bins of genes that are `asked` for, one by one, whatever else is asked.

        Parameters
        ----------
        inputs
            `tokens`, `values` [P] in `layout`, and `asked` [G] in `layout_asked`.
        cls_BD
            A cell's last state of <cls>, to put in the place of <cls> ("cell prompt").
        """
        layout, layout_asked = inputs["layout"], inputs["layout_asked"]
        if layout_asked.longest > ASKED_AT_ONCE and not torch.is_grad_enabled():
            return self._predict_in_pieces(inputs, cls_BD)
        x_PD, g_GD, genes_GD = self._enter(inputs)
        if cls_BD is not None:
            x_PD = _with_cls(x_PD, cls_BD, layout)
        last_BD, h_GD = self.encode(x_PD, layout, g_GD, layout_asked, only_cls=True)
        cls_BD = last_BD if cls_BD is None else cls_BD
        return Predicted(self._decode(h_GD), self._decode_from_cell(cls_BD, genes_GD, layout_asked), cls_BD)

    def _predict_in_pieces(self, inputs: Inputs, prompt_BD: Tensor | None) -> Predicted:
        """As `predict`, of `ASKED_AT_ONCE` genes of each cell at a time.

        Perceived tokens do not see the generated ones: what each layer reads of them is computed once.
        """
        layout, layout_asked = inputs["layout"], inputs["layout_asked"]
        x_PD = self._perceive(self._genes(inputs["tokens"]), inputs)
        x_PD = x_PD if prompt_BD is None else _with_cls(x_PD, prompt_BD, layout)
        perceived = [x_PD]
        for layer in self.layers[:-1]:
            perceived.append(layer(perceived[-1], layout)[0])
        one_each = layout.one_each()
        gep_G, mvc_G = torch.zeros(2, layout_asked.n_slots, device=x_PD.device)
        for slots_M, part in _pieces(layout_asked):
            genes_MD = self._genes(inputs["asked"].index_select(0, slots_M))
            g_MD = self._flagged(genes_MD)
            for layer, x_PD in zip(self.layers, perceived, strict=True):
                last_BD, g_MD = layer(x_PD, layout, g_MD, part, x_PD.index_select(0, layout.starts_B), one_each)
            cls_BD = last_BD if prompt_BD is None else prompt_BD
            gep_G[slots_M], mvc_G[slots_M] = self._decode(g_MD), self._decode_from_cell(cls_BD, genes_MD, part)
        return Predicted(gep_G, mvc_G, cls_BD)

    def _decode(self, h_ND: Tensor) -> Tensor:
        """float32 [N], bins by the states; the last product never in bfloat16, whose steps near 50 are 1/4."""
        hidden_ND = self.decoder[:-1](h_ND)
        with torch.autocast(h_ND.device.type, enabled=False):
            return self.decoder[-1](hidden_ND.float()).squeeze(1)

    def _decode_from_cell(self, cls_BD: Tensor, genes_GD: Tensor, layout: Layout) -> Tensor:
        """float32 [G], <W q, h> with the genes' queries q and the state h of each gene's cell."""
        query_GD = torch.sigmoid(self.mvc_query(genes_GD))
        cell_BD = cls_BD @ self.mvc_weight.weight  # W is folded into the cell's state once, not into every gene's query
        cell_BD = F.pad(cell_BD.float(), (0, 0, 0, 1))  # a row of zeros, which unused slots read
        return (query_GD.float() * cell_BD.index_select(0, layout.rows_N)).sum(1)

    # --- what is read out ---------------------------------------------------------------------------------------------

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], of length 1: the last state of <cls>, or the mean of those of the genes (zero for an empty cell)."""
        pooling = self.check_pooling(pooling)
        if pooling == "cls":
            return F.normalize(self.states(inputs, only_cls=True).float(), dim=1)
        return F.normalize(inputs["layout"].sum(self.states(inputs), inputs["tokens"] < self.n_genes), dim=1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings after their norm."""
        with torch.no_grad():
            return self.gene_norm(self.gene_embedding.weight[: self.n_genes]).float()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The last layer's states of the genes that `embed_inputs` drew of each cell."""
        tokens_P = inputs["tokens"]
        (index_N,) = torch.nonzero(tokens_P < self.n_genes, as_tuple=True)
        return GeneStates(
            inputs["layout"].rows_N[index_N], tokens_P[index_N].long(), self.states(inputs)[index_N].float()
        )

    def impute(self, inputs: Inputs) -> Imputed:
        """Asked genes are generated (`gep`); values by the visible counts' quantiles, detection by the bin."""
        bins_BQ = inputs["layout_asked"].to_matrix(self.predict(inputs).gep_G)
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
        term = _term(trivial.to(inputs["asked"].device)[inputs["asked"]], inputs)
        return {"gep": term, "mvc": term, "gep_prompt": term}


def _with_cls(x_PD: Tensor, cls_BD: Tensor, layout: Layout) -> Tensor:
    """The inputs with a cell's state in the place of <cls>."""
    return x_PD.index_copy(0, layout.starts_B, cls_BD.to(x_PD.dtype))


def _pieces(layout: Layout) -> Iterator[tuple[Tensor, Layout]]:
    """`ASKED_AT_ONCE` tokens of each cell at a time: int64 [M], their slots, and the layout that they then have."""
    for first in range(0, layout.longest, ASKED_AT_ONCE):
        lengths_B = np.clip(layout.lengths - first, 0, ASKED_AT_ONCE)
        slots_M = layout.index(offsets_of(lengths_B), before=first)
        yield torch.from_numpy(slots_M).to(layout.device), PACKED.layout(lengths_B).to(layout.device)


def _count(inputs: Inputs) -> Tensor:
    """float32 [], the genes that a cell is asked for, of all cells."""
    return torch.full((), inputs["layout_asked"].n_tokens, dtype=torch.float32, device=inputs["asked"].device)


def _term(predicted_G: Tensor, inputs: Inputs) -> LossTerm:
    """The squared error of bins."""
    error_G = (predicted_G.float() - inputs["targets"]) * inputs["layout_asked"].used_N
    return LossTerm(error_G.square().sum(), _count(inputs))


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
