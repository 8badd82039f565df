"""Exceiver: a Perceiver IO that reads all detected genes into a few latents, and asks them for hidden ones.

Connell, Khan and Keiser, "A single-cell gene expression language model", arXiv:2210.14330 (2022); keiserlab/exceiver.

A gene's value is its standardised log1p(CP10k), shifted so that the average is 1, and multiplies the gene's embedding:
these are the keys and values of a cross-attention whose queries are learned latents. Self-attention layers process the
latents; a second cross-attention, whose queries are the embeddings of hidden genes, reads the answers from them, so the
cost is linear in the number of genes. A fixed number of detected genes is hidden in each cell: 15 % of the median
number that a training cell expresses.

A hidden gene is a key with the zero vector. Undetected genes are no keys (``mask_mode`` "paper"), so they are not
computed at all. The released code passes its padding mask as floats, which torch adds to the logits: there all genes
are keys, and undetected ones are looked at e times as much as the others (``mask_mode`` "released").

The original's process layers start as copies of one prototype layer, which stays in its module unused (size
``prototype_layer``, for equal counts); ours start independently.

Legend: B cells, N keys of all cells one after the other, V genes, D width, M latents, H hidden genes of a cell, Q genes
asked for of all cells, X queries of all cells, Z = L + V keys of a matrix, L of the cell with most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention import MultiHeadAttention, attention_flops
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
from cellmill.models.packing import Layout, uniform
from cellmill.shards.batch import CellBatch
from cellmill.views import exceiver as views
from cellmill.views.ragged import spread

RELEASED_LOGIT = 1.0
"""What the released code adds to the logits of undetected genes."""
GENE_STD = 0.1
LINEAR_GELU = 2.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an Exceiver."""

    width: int = field(metadata={"description": "Width of genes and latents.", "ge": 1})
    n_latents: int = field(metadata={"description": "Latents that a cell is read into.", "ge": 1})
    n_layers: int = field(metadata={"description": "Self-attention layers of the latents.", "ge": 1})
    n_heads: int = field(metadata={"description": "Heads of the self-attention layers; divides width.", "ge": 1})
    hidden: int = field(metadata={"description": "Width of a layer's feed-forward network.", "ge": 1})
    n_cross_heads: int = field(
        default=4, metadata={"description": "Heads of both cross-attentions; 4 in the released code.", "ge": 1}
    )
    min_cells: int = field(
        default=1,
        metadata={
            "description": "A gene that fewer training cells express is not read: its z is near the clip.",
            "ge": 1,
        },
    )
    mask_mode: Literal["paper", "released"] = field(
        default="paper",
        metadata={"description": "paper: undetected genes are not read; released: they are, one added to the logit."},
    )
    prototype_layer: bool = field(
        default=False, metadata={"description": "Keep the released code's unused layer, for equal parameter counts."}
    )

    def __post_init__(self):
        for name, number in (("n_heads", self.n_heads), ("n_cross_heads", self.n_cross_heads)):
            if self.width % number:
                raise CellmillError(f"exceiver: width {self.width} is no multiple of {name} {number}; change one")


class CrossAttention(nn.Module):
    """Pre-norm attention of queries to another sequence, then an MLP; residual to the queries as they came in."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.keys_norm = nn.LayerNorm(sizes.width)
        self.queries_norm = nn.LayerNorm(sizes.width)
        self.attention = MultiHeadAttention(sizes.width, sizes.n_cross_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, sizes.width),
            nn.GELU(),
            nn.LayerNorm(sizes.width),
            nn.Linear(sizes.width, sizes.width),
        )

    def forward(
        self,
        queries_XD: Tensor,
        layout: Layout,
        keys_ND: Tensor,
        layout_keys: Layout,
        zeros_VD: Tensor | None = None,
        undetected_BV: Tensor | None = None,
    ) -> Tensor:
        """[X, D], of each cell's queries to its keys; with `zeros_VD` also to those of them that it has not detected.

        Those are the same keys in every cell, and `RELEASED_LOGIT` is added to their logits.
        """
        queries_ND, keys_ND = self.queries_norm(queries_XD), self.keys_norm(keys_ND)
        if zeros_VD is None:
            attended_XD = self.attention(queries_ND, layout, others=keys_ND, others_layout=layout_keys)
        else:
            zeros_VD = self.keys_norm(zeros_VD)
            attended_XD = self._attend_to_all(queries_ND, layout, keys_ND, layout_keys, zeros_VD, undetected_BV)
        x_XD = in_compute_dtype(queries_XD + attended_XD)
        return in_compute_dtype(x_XD + self.mlp(x_XD))

    def _attend_to_all(self, queries_XD, layout, keys_ND, layout_keys, zeros_VD, undetected_BV) -> Tensor:
        """[X, D]. A number on each logit is beyond `attend`, which knows keys that are seen and others that are not."""
        q_XHK, k_NHK, v_NHK = self.attention.project_across(queries_XD, keys_ND)
        _, k_VHK, v_VHK = self.attention.project_across(queries_XD[:0], zeros_VD)
        k, v = (
            torch.cat([layout_keys.to_matrix(of_keys), of_zeros.expand(len(layout), -1, -1, -1)], 1).transpose(1, 2)
            for of_keys, of_zeros in ((k_NHK, k_VHK), (v_NHK, v_VHK))
        )
        place_L = torch.arange(k.shape[2] - len(zeros_VD), device=k.device)
        logit_BL = torch.where(place_L < layout_keys.lengths_B[:, None], 0.0, -torch.inf)
        logit_BV = torch.where(undetected_BV, RELEASED_LOGIT, -torch.inf)
        logit_BZ = torch.cat([logit_BL, logit_BV], 1).to(q_XHK.dtype)
        q = layout.to_matrix(q_XHK).transpose(1, 2)
        context_BHMK = F.scaled_dot_product_attention(q, k, v, attn_mask=logit_BZ[:, None, None])
        return self.attention.out(layout.from_matrix(context_BHMK.transpose(1, 2)).flatten(1))

    def flops(self, layout: Layout, layout_keys: Layout, n_others: int = 0) -> float:
        """See `CellModel.body_flops`; `n_others` further keys of every cell are the same in all."""
        width, n_queries, n_keys = self.mlp[1].in_features, layout.n_tokens, layout_keys.n_tokens
        weights = 4 * width * width * n_queries + 2 * width * width * (n_keys + n_others)
        return 2.0 * weights + attention_flops(width, layout, layout_keys) + 4.0 * width * n_queries * n_others


class Layer(nn.Module):
    """One post-norm transformer layer with GELU, without dropout, as published."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads)
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.intermediate = nn.Linear(sizes.width, sizes.hidden)
        self.output = nn.Linear(sizes.hidden, sizes.width)
        self.output_norm = nn.LayerNorm(sizes.width)

    def forward(self, x_XD: Tensor, layout: Layout) -> Tensor:
        """[X, D]."""
        x_XD = in_compute_dtype(self.attention_norm(x_XD + self.attention(x_XD, layout)))
        return in_compute_dtype(self.output_norm(x_XD + self.output(F.gelu(self.intermediate(x_XD)))))

    def flops(self, layout: Layout) -> float:
        """See `CellModel.body_flops`."""
        hidden, width = self.intermediate.weight.shape
        return layout.n_tokens * 2.0 * (4 * width * width + 2 * width * hidden) + attention_flops(width, layout)


class Exceiver(CellModel):
    """Exceiver.

    Parameters
    ----------
    sizes
        See `Sizes`.
    n_genes
        V.
    statistics
        Mean and standard deviation of log1p(CP10k) and the median number of genes are kept as buffers; a gene without a
        mean, which no training cell expresses, is never read. None leaves them empty, to be loaded from a checkpoint or
        given to `set_statistics`.
    """

    Sizes = Sizes
    presets: ClassVar[dict[str, Sizes]] = {
        "demo": Sizes(width=16, n_latents=16, n_layers=2, n_heads=2, hidden=32),
        "tiny": Sizes(width=128, n_latents=64, n_layers=4, n_heads=4, hidden=512),
        "small": Sizes(width=320, n_latents=64, n_layers=7, n_heads=5, hidden=1280),
        "base": Sizes(width=576, n_latents=64, n_layers=12, n_heads=9, hidden=2304),
        "published": Sizes(width=4, n_latents=128, n_layers=8, n_heads=4, hidden=2048, prototype_layer=True),
    }
    published_genes: ClassVar[dict[str, int]] = {"published": 19_067}
    released_totals = "known"
    poolings = ("latents", "mean")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.gene_embedding = nn.Embedding(n_genes + 1, sizes.width, padding_idx=n_genes)  # the last: a hidden gene
        self.latents = nn.Parameter(torch.randn(sizes.n_latents, sizes.width))
        self.encoder = CrossAttention(sizes)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.decoder = CrossAttention(sizes)
        self.head = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, 1), nn.GELU(), nn.Linear(1, 1))
        self.prototype = Layer(sizes) if sizes.prototype_layer else None
        self.apply(_initialise)
        _initialise_genes_and_head(self.gene_embedding, self.head)
        self.register_buffer("mean", torch.full((n_genes,), torch.nan))
        self.register_buffer("std", torch.full((n_genes,), torch.nan))
        self.register_buffer("n_hidden", torch.zeros((), dtype=torch.int64))  # 0: not known
        self._of_views: tuple[np.ndarray, np.ndarray, int] | None = None
        if statistics is not None:
            self.set_statistics(statistics)

    def set_statistics(self, statistics: GeneStatistics) -> None:
        """Standardise by other cells' mean and standard deviation, and hide by their median number of genes.

        The original standardises its validation cells by their own statistics; a user of released weights, which hold
        none, gives those of their cells.
        """
        median = float(statistics.median_genes)
        self.mean.copy_(statistics.mean_log1p_cp10k)
        rare_V = statistics.nonzero_cells < self.sizes.min_cells
        self.std.copy_(statistics.std_log1p_cp10k.masked_fill(rare_V, torch.nan))  # the view leaves them out
        self.n_hidden.fill_(0 if np.isnan(median) else views.hidden_genes(median))
        self._of_views = None

    def _view_statistics(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Mean and standard deviation, float32 [V], and H; copied once, as a copy from a GPU waits for all its work."""
        if self._of_views is None:
            mean_V, std_V = self.mean.cpu().numpy().copy(), self.std.cpu().numpy().copy()
            if np.isnan(mean_V).all():
                raise CellmillError(
                    "this exceiver has no mean and standard deviation of genes; build it with the corpus statistics, "
                    "load a checkpoint or call set_statistics"
                )
            if np.isnan(std_V).all():
                raise CellmillError(
                    f"this exceiver reads no gene: none is expressed by min_cells {self.sizes.min_cells} training "
                    "cells; lower min_cells"
                )
            self._of_views = mean_V, std_V, int(self.n_hidden)
        return self._of_views

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B], detected genes and latents: both are states of D numbers. Genes that are not read count, too."""
        return cells.lengths + self.sizes.n_latents

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """See `CellModel`."""
        return {"mse": _count(inputs)}

    def blocks(self) -> list[nn.Module]:
        """See `CellModel`: most of the work is in the cross-attentions."""
        return [self.encoder, *self.layers, self.decoder]

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """See `CellModel`."""
        latents, n_others = inputs["layout_latents"], self.n_genes if self.sizes.mask_mode == "released" else 0
        flops = self.encoder.flops(latents, inputs["layout"], n_others) + sum(x.flops(latents) for x in self.layers)
        return flops + (self.decoder.flops(inputs["layout_asked"], latents) if "layout_asked" in inputs else 0.0)

    def _keys(self, shown: views.Standardised, n_nulls_B: np.ndarray | int = 0, asked_BQ=None) -> Inputs:
        """The encoder's keys.

        Parameters
        ----------
        shown
            Genes that are keys.
        n_nulls_B
            Further keys of each cell with the zero vector, as hidden genes are.
        asked_BQ
            Genes that are hidden, and so not undetected.

        Returns
        -------
        dict
            ``genes`` and ``values`` [N], where ``layout`` says; ``layout_latents``, where the latents of each cell lie;
            in the released mode ``undetected`` bool [B, V].
        """
        (_, offsets, genes_N), values_N = shown
        layout = self.packing.layout(np.diff(offsets) + n_nulls_B)
        inputs = {
            "genes": torch.from_numpy(layout.place(offsets, genes_N, self.n_genes, dtype=np.int64)),
            "values": torch.from_numpy(layout.place(offsets, values_N, views.HIDDEN_VALUE)),
            "layout": layout,
            "layout_latents": uniform(len(layout), self.sizes.n_latents),
        }
        if self.sizes.mask_mode == "released":
            undetected = np.ones((len(layout), self.n_genes + 1), bool)  # a column for hidden genes
            undetected[spread(np.arange(len(layout)), offsets), genes_N] = False
            if asked_BQ is not None:
                np.put_along_axis(undetected, asked_BQ, False, axis=1)
            inputs["undetected"] = torch.from_numpy(undetected[:, :-1].copy())
        return inputs

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """The keys, as in `_keys`, ``asked`` [Q], the H hidden genes of each cell, ``targets`` [Q], their shifted z.

        Cells with fewer than 2 H detected genes are left out, as in the original. See `cellmill.views.exceiver`.
        """
        mean_V, std_V, n_hidden = self._view_statistics()
        if n_hidden == 0:
            raise CellmillError(
                "this exceiver does not know how many genes to hide; give it statistics with the median number of "
                "genes of a cell, of at least 7"
            )
        out = views.pretrain(cells, mean_V, std_V, n_hidden=n_hidden, seed=seed, step=step)
        asked_BH = out.genes_BH.astype(np.int64)
        targets_Q = torch.from_numpy(out.targets_BH.flatten())
        return self._keys(out.shown, asked_BQ=asked_BH) | _asked(asked_BH) | {"targets": targets_Q}

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """The keys of all detected genes, as in `_keys`; every cell has some inputs, however few its genes."""
        return self._keys(views.embed(cells, *self._view_statistics()[:2]))

    def encode(self, inputs: Inputs) -> Tensor:
        """[B M, D], the latents after the process layers, those of each cell one after the other."""
        layout, layout_latents = inputs["layout"], inputs["layout_latents"]
        keys_ND = in_compute_dtype(inputs["values"][:, None] * self.gene_embedding(inputs["genes"]))
        x_XD = in_compute_dtype(self.latents.repeat(len(layout), 1))
        if self.sizes.mask_mode == "released":
            zeros_VD = in_compute_dtype(self._value_of_zero()[:, None] * self.gene_embedding.weight[:-1])
            x_XD = self.encoder(x_XD, layout_latents, keys_ND, layout, zeros_VD, inputs["undetected"])
        else:
            x_XD = self.encoder(x_XD, layout_latents, keys_ND, layout)
        for layer in self.layers:
            x_XD = layer(x_XD, layout_latents)
        return x_XD

    def _value_of_zero(self) -> Tensor:
        """[V], the value of a gene with no count."""
        z_V = -self.mean / torch.where(self.std == 0, 1.0, self.std)
        return torch.nan_to_num(z_V, nan=0.0).clamp(max=views.CLIP) + views.SHIFT

    def decode(self, inputs: Inputs, genes_Q: Tensor, layout: Layout) -> Tensor:
        """[Q, D], the states of genes that each cell's latents are asked for, where `layout` says."""
        asked_QD = in_compute_dtype(self.gene_embedding(genes_Q))
        return self.decoder(asked_QD, layout, self.encode(inputs), inputs["layout_latents"])

    def _predict(self, inputs: Inputs) -> Tensor:
        """float32 [Q], the shifted z of the genes ``asked``."""
        states_QD = self.decode(inputs, inputs["asked"], inputs["layout_asked"])
        with torch.autocast(states_QD.device.type, enabled=False):  # in bfloat16 answers would be of few values
            return self.head(states_QD.float()).squeeze(1)

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`mse`: squared error of the shifted z of hidden genes."""
        return {"mse": _squared_error(self._predict(inputs), inputs)}

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, M D], the latents side by side ("latents"), or [B, D], their mean ("mean")."""
        pooling = self.check_pooling(pooling)
        latents_BMD = self.encode(inputs).float().unflatten(0, (-1, self.sizes.n_latents))
        return latents_BMD.flatten(1) if pooling == "latents" else latents_BMD.mean(1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings."""
        return self.gene_embedding.weight[:-1].detach().float().clone()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The decoder's states of the genes that each cell expresses, before the head."""
        layout, genes_N = inputs["layout"], inputs["genes"]
        is_gene_N = layout.used_N & (genes_N < self.n_genes)
        states_ND = self.decode(inputs, genes_N, layout)
        return GeneStates(layout.rows_N[is_gene_N], genes_N[is_gene_N], states_ND[is_gene_N].float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """The keys of the visible genes and, as in training, of H hidden ones, at most as many as are visible."""
        mean_V, std_V, n_hidden = self._view_statistics()
        shown = views.embed(cells, mean_V, std_V)
        asked_BQ = np.asarray(genes_BQ, dtype=np.int64)
        n_nulls_B = np.minimum(np.diff(shown.genes.offsets), n_hidden)
        return self._keys(shown, n_nulls_B, asked_BQ) | _asked(asked_BQ)

    def impute(self, inputs: Inputs) -> Imputed:
        """The head's answer, standardised back, at least 0; it is the detection, too.

        The objective asks for detected genes alone, so z says how high a gene would be: highest for rare ones. The
        value itself, which holds the gene's mean, says which genes a cell likely expresses. Of genes that are not read
        the answer is their mean.
        """
        asked_BQ = inputs["layout_asked"].to_matrix(inputs["asked"])
        z_BQ = self._predict(inputs).view(asked_BQ.shape) - views.SHIFT
        std_V = torch.where(self.std == 0, 1.0, self.std)
        value_BQ = torch.nan_to_num(torch.nan_to_num(z_BQ * std_V[asked_BQ]) + self.mean[asked_BQ])
        return Imputed(value_BQ.clamp(min=0), value_BQ)

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V], the mean of each gene's shifted z where it is detected, over the cells that training takes.

        The mean over all genes counts as one more cell: it steadies genes that few cells express.
        """
        mean_V, std_V, n_hidden = self._view_statistics()
        sum_V, n_V = np.zeros(self.n_genes), np.zeros(self.n_genes)
        for cells in batches:
            cells = cells.take(np.flatnonzero(cells.lengths >= 2 * n_hidden))
            (_, _, genes_N), values_N = views.embed(cells, mean_V, std_V)
            sum_V += np.bincount(genes_N, values_N, self.n_genes)
            n_V += np.bincount(genes_N, minlength=self.n_genes)
        overall = sum_V.sum() / max(n_V.sum(), 1)
        return torch.from_numpy((sum_V + overall) / (n_V + 1)).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """`mse` when every hidden gene is predicted by its mean over the training cells that express it."""
        return {"mse": _squared_error(trivial.to(inputs["asked"].device)[inputs["asked"]], inputs)}


def _asked(genes_BQ: np.ndarray) -> Inputs:
    """``asked`` and ``layout_asked`` of as many genes of each cell."""
    return {"asked": torch.from_numpy(genes_BQ.flatten()), "layout_asked": uniform(*genes_BQ.shape)}


def _squared_error(predicted_Q: Tensor, inputs: Inputs) -> LossTerm:
    return LossTerm(F.mse_loss(predicted_Q, inputs["targets"], reduction="sum"), _count(inputs))


def _count(inputs: Inputs) -> Tensor:
    return torch.full((), len(inputs["targets"]), device=inputs["targets"].device)


def _initialise(module: nn.Module) -> None:
    """As torch's own MultiheadAttention: Xavier's uniform projections, zero biases. The rest is torch's default."""
    if isinstance(module, MultiHeadAttention):
        nn.init.xavier_uniform_(module.qkv.weight)
        nn.init.zeros_(module.qkv.bias)
        nn.init.zeros_(module.out.bias)


@torch.no_grad()
def _initialise_genes_and_head(genes: nn.Embedding, head: nn.Sequential) -> None:
    """Ours: short gene embeddings, which take in fewer steps what sets genes apart (the published ones ended as short);
    and a head whose one GELU starts in its linear part, since where that unit dies no gradient gets past it.
    """
    genes.weight.mul_(GENE_STD)
    head[1].bias.fill_(LINEAR_GELU)
    head[3].weight.fill_(1.0)
    head[3].bias.fill_(views.SHIFT - LINEAR_GELU)


MODEL = Exceiver
