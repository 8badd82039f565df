"""scFoundation: an autoencoder that reads a cell's expressed genes and predicts hidden values of all genes.

Hao et al., Nature Methods 21, 1481 (2024); the network is xTrimoGene, Gong et al., NeurIPS 2023.

A value, log1p(CP10k), is embedded as a soft mixture of learned bins and added to its gene's embedding; genes have no
order. The encoder, a post-norm transformer, reads the nonzero values that are not hidden, and two depth tokens: T, the
log10 of the counts that are asked for, and S, of the counts that the input has. The decoder has a position for every
gene: the encoder's state where it read one, else the embedding of zero or of the mask, and in each case the gene's
embedding (again). Its attention over all genes is a Performer's: linear in their number, by random features. Trained is
the squared error at the masked positions, zeros and nonzeros, against the cell before it was thinned.

Token ids: gene g is g; then T is V, S is V + 1, padding V + 2.

Legend: B cells, E tokens that the encoder reads, U tokens that it does not, D width of the encoder, C of the decoder,
V genes, P = V + 2 positions of the decoder, S = B P of all cells, R rows that are written over, Q asked positions, N
nonzeros. Tokens and asked positions of all cells lie one after the other, as their layouts say; the decoder's positions
are dense.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

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
from cellmill.models.packing import Layout, uniform
from cellmill.models.performer import draw_projection, performer, performer_flops
from cellmill.shards.batch import CellBatch
from cellmill.views import scfoundation as views
from cellmill.views.ragged import (
    Genes,
    argsort_within,
    hash_genes,
    join,
    keep_first,
    log1p_cp10k,
    spread,
)

EMBEDDING_STD = 0.02
T, S = 0, 1
"""Places of the depth tokens in a cell."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an scFoundation."""

    n_layers: int = field(metadata={"description": "Transformer layers of the encoder.", "ge": 1})
    width: int = field(metadata={"description": "Width of a token's state in the encoder.", "ge": 1})
    n_heads: int = field(metadata={"description": "Attention heads of the encoder; divides width.", "ge": 1})
    hidden: int = field(metadata={"description": "Width of an encoder layer's feed-forward network.", "ge": 1})
    max_length: int = field(
        metadata={
            "description": "Most tokens that the encoder reads, T and S included; of a longer cell a random part, "
            "while the decoder sees the values of the rest.",
            "ge": 3,
        }
    )
    decoder_layers: int = field(metadata={"description": "Layers of the decoder.", "ge": 1})
    decoder_width: int = field(metadata={"description": "Width of a position's state in the decoder.", "ge": 1})
    decoder_heads: int = field(
        metadata={"description": "Attention heads of the decoder; divides decoder_width.", "ge": 1}
    )
    decoder_hidden: int = field(metadata={"description": "Width of a decoder layer's feed-forward network.", "ge": 1})
    dropout: float = field(default=0.1, metadata={"description": "Dropout of the encoder's states.", "ge": 0, "lt": 1})
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "description": "Dropout of the encoder's attention weights; null: as dropout. Any but 0 rules out the fast "
            "attention of GPUs.",
            "ge": 0,
            "lt": 1,
        },
    )
    n_bins: int = field(default=100, metadata={"description": "Bins that a value's embedding is mixed from.", "ge": 1})
    bin_alpha: float = field(
        default=1.0, metadata={"description": "Weight of the short way through a value's network.", "ge": 0}
    )
    decoder_attention: Literal["performer", "dense"] = field(
        default="performer",
        metadata={"description": "performer: by random features, linear in the genes; dense: exact."},
    )
    n_features: int = field(
        default=0,
        metadata={"description": "Random features of a decoder head; 0: k ln k for heads of width k.", "ge": 0},
    )
    redraw_every: int = field(
        default=1000,
        metadata={"description": "Training steps between draws of the random features; 0: never again.", "ge": 0},
    )
    released_depth_tokens: bool = field(
        default=False,
        metadata={
            "description": "As the released code: T or S of value 0 (one count) is not read, and the last two tokens "
            "of a cell are taken for T and S, whatever they are."
        },
    )
    embedding_depth: float = field(
        default=0.0,
        metadata={
            "description": "log10 of the counts that T asks for in embeddings, as the released script's t4; "
            "0: the cell's own depth.",
            "ge": 0,
            "le": 12,
        },
    )

    def __post_init__(self):
        for width, heads in (("width", "n_heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise CellmillError(
                    f"scfoundation: {width} {getattr(self, width)} is no multiple of {heads} {getattr(self, heads)}; "
                    "change one of them"
                )

    @property
    def dropout_of_attention(self) -> float:
        """Dropout of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @property
    def features(self) -> int:
        """Random features of a decoder head."""
        head = self.decoder_width // self.decoder_heads
        return self.n_features or max(1, int(head * math.log(head)))


class ValueEmbedding(nn.Module):
    """A scalar to a mixture of learned bins, whose weights a small network gives ("auto-discretisation")."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        n_bins, width, self.alpha = sizes.n_bins, sizes.width, sizes.bin_alpha
        self.linear1 = nn.Linear(1, n_bins)
        self.linear2 = nn.Linear(n_bins, n_bins)
        self.bins = nn.Embedding(n_bins, width)
        self.mask = nn.Embedding(1, width)
        # nothing attends to padding, so its vector does nothing; the released weights hold it
        self.pad = nn.Embedding(1, width)
        for embedding in (self.bins, self.mask, self.pad):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)

    def forward(self, values: Tensor) -> Tensor:
        """[..., D], from values of any shape; never in bfloat16, whose steps near 8 are 1/16."""
        with torch.autocast(values.device.type, enabled=False):
            a = F.leaky_relu(self.linear1(values.float().unsqueeze(-1)), 0.1)
            return torch.softmax(self.alpha * a + self.linear2(a), -1) @ self.bins.weight


class EncoderLayer(nn.Module):
    """One post-norm transformer layer, with ReLU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout_of_attention)
        self.linear1 = nn.Linear(sizes.width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x_ED: Tensor, layout: Layout) -> Tensor:
        """[E, D]."""
        x_ED = in_compute_dtype(self.norm1(x_ED + self.dropout(self.attention(x_ED, layout))))
        hidden_ED = self.linear2(self.dropout(F.relu(self.linear1(x_ED))))
        return in_compute_dtype(self.norm2(x_ED + self.dropout(hidden_ED)))

    def flops(self, layout: Layout) -> float:
        """See `CellModel.body_flops`."""
        hidden, width = self.linear1.weight.shape
        return layout.n_tokens * 2.0 * (4 * width * width + 2 * width * hidden) + attention_flops(width, layout)


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer with GELU, of random-feature attention or exact one."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.decoder_width
        self.attention = MultiHeadAttention(width, sizes.decoder_heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, sizes.decoder_hidden)
        self.linear2 = nn.Linear(sizes.decoder_hidden, width)
        if sizes.decoder_attention == "performer":
            empty_FK = torch.zeros(sizes.features, width // sizes.decoder_heads)
            self.register_buffer("projection", empty_FK)

    def forward(
        self, x_SC: Tensor, positions: Layout, asked_Q: Tensor | None = None, layout_asked: Layout | None = None
    ) -> Tensor:
        """[S, C], or [Q, C] at the asked positions `asked_Q` among S; keys and values are those of all positions."""
        y_SC = self.norm1(x_SC)
        if asked_Q is None:
            qkv, queries = self.attention.project(y_SC), positions
        else:
            qkv, queries = self.attention.project_across(y_SC.index_select(0, asked_Q), y_SC), layout_asked
            x_SC = x_SC.index_select(0, asked_Q)
        if hasattr(self, "projection"):
            attended = performer(*qkv, self.projection, queries, positions)
        else:
            attended = attend(*qkv, queries, positions)
        x_SC = x_SC + self.attention.out(attended)
        return x_SC + self.linear2(F.gelu(self.linear1(self.norm2(x_SC))))

    def flops(self, positions: Layout, layout_asked: Layout | None = None) -> float:
        """See `CellModel.body_flops`."""
        queries = layout_asked or positions
        hidden, width = self.linear1.weight.shape
        weights = queries.n_tokens * (2 * width * width + 2 * width * hidden) + positions.n_tokens * 2 * width * width
        if hasattr(self, "projection"):
            n_features = len(self.projection)
            return 2.0 * weights + performer_flops(width, self.attention.n_heads, n_features, queries, positions)
        return 2.0 * weights + attention_flops(width, queries, positions)


class Scfoundation(CellModel):
    """scFoundation.

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
        "demo": Sizes(
            **{"n_layers": 1, "width": 32, "n_heads": 2, "hidden": 64, "max_length": 258, "dropout": 0.0, "n_bins": 16},
            **{"decoder_layers": 1, "decoder_width": 16, "decoder_heads": 1, "decoder_hidden": 32, "n_features": 16},
        ),
        "tiny": Sizes(
            **{"n_layers": 4, "width": 128, "n_heads": 4, "hidden": 512, "max_length": 1024, "attention_dropout": 0.0},
            **{"decoder_layers": 2, "decoder_width": 96, "decoder_heads": 3, "decoder_hidden": 384},
        ),
        "small": Sizes(
            **{"n_layers": 8, "width": 288, "n_heads": 8, "hidden": 1152, "max_length": 1024, "attention_dropout": 0.0},
            **{"decoder_layers": 3, "decoder_width": 192, "decoder_heads": 6, "decoder_hidden": 768},
        ),
        "base": Sizes(
            **{
                "n_layers": 12,
                "width": 512,
                "n_heads": 8,
                "hidden": 2048,
                "max_length": 1024,
                "attention_dropout": 0.0,
            },
            **{"decoder_layers": 6, "decoder_width": 384, "decoder_heads": 6, "decoder_hidden": 1536},
        ),
        "published": Sizes(
            **{"n_layers": 12, "width": 768, "n_heads": 12, "hidden": 3072, "max_length": 19_266},
            **{"decoder_layers": 6, "decoder_width": 512, "decoder_heads": 8, "decoder_hidden": 2048},
        ),
    }
    published_genes: ClassVar[dict[str, int]] = {"published": 19_264}
    impute_cells = 8  # the decoder holds a state for every gene: at 20,000 genes a third of a GB a cell of `small`
    released_totals = "known"  # the authors' script sums over the genes of the model
    poolings = ("all", "max", "mean", "source", "target")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.n_positions, self.pad = n_genes + 2, n_genes + 2
        # what P positions take in memory beside one token of the encoder: states of so many layers and so wide
        decoder, encoder = sizes.decoder_layers * sizes.decoder_width, sizes.n_layers * sizes.width
        self.decoder_tokens = -(-self.n_positions * decoder // encoder)
        self.value_embedding = ValueEmbedding(sizes)
        self.gene_embedding = nn.Embedding(n_genes + 3, sizes.width)
        self.encoder = nn.ModuleList(EncoderLayer(sizes) for _ in range(sizes.n_layers))
        self.encoder_norm = nn.LayerNorm(sizes.width)
        self.to_decoder = nn.Linear(sizes.width, sizes.decoder_width)
        self.decoder = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.decoder_layers))
        self.decoder_norm = nn.LayerNorm(sizes.decoder_width)
        self.final_norm = nn.LayerNorm(sizes.decoder_width)
        self.head = nn.Linear(sizes.decoder_width, 1)
        nn.init.normal_(self.gene_embedding.weight, std=EMBEDDING_STD)
        if sizes.decoder_attention == "performer":
            self.register_buffer("steps_since_redraw", torch.zeros((), dtype=torch.int64))
        self._drawn: tuple[int, ...] | None = None
        self._draw_projections(0)

    def _draw_projections(self, draw: int) -> None:
        """Put the random features of the draw into every decoder layer; they depend on its number alone."""
        for number, layer in enumerate(self.decoder):
            if hasattr(layer, "projection") and not layer.projection.is_meta:
                layer.projection.copy_(draw_projection(*layer.projection.shape, draw, number))

    def _redraw(self, step: int) -> None:
        """The random features of a training step."""
        draw, since = divmod(step, self.sizes.redraw_every)
        if (draw, *self._writes()) != self._drawn:
            self._draw_projections(draw)
            self._drawn = (draw, *self._writes())
        if self.sizes.decoder_attention == "performer":
            self.steps_since_redraw.fill_(since)

    def _writes(self) -> list[int]:
        """How often each layer's random features were written to: whoever puts others there makes `_drawn` untrue."""
        return [layer.projection._version for layer in self.decoder if hasattr(layer, "projection")]

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B], the tokens of the encoder at most, and what the decoder's P positions come to.

        A position holds a state in every layer of the decoder as a token does in every layer of the encoder, so it
        counts as the share of an encoder's token that layers times width are (0.38 in the presets of the dial): the
        decoder takes most of a cell's memory, the same for every cell.
        """
        # a zero that shows a random value is read, too: a binomial number, here eight deviations above its mean
        n_zeros = views.ZERO_RATE * views.RANDOM_SHARE * self.n_genes
        n_read_B = cells.lengths + math.ceil(n_zeros + 8 * n_zeros**0.5) + 2
        return np.minimum(n_read_B, self.sizes.max_length) + self.decoder_tokens

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """See `CellModel`."""
        return {"mse": self._count(inputs)}

    def _count(self, inputs: Inputs) -> Tensor:
        return torch.full((), float(inputs["layout_asked"].n_tokens), device=inputs["targets"].device)

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """See `CellModel`. The map from the encoder's width to the decoder's counts for tokens, not for genes."""
        layout, positions = inputs["layout"], uniform(len(inputs["layout"]), self.n_positions)
        flops = sum(layer.flops(layout) for layer in self.encoder)
        flops += 2.0 * self.to_decoder.weight.numel() * (layout.n_tokens + len(inputs["unread"]))
        flops += sum(layer.flops(positions) for layer in self.decoder[:-1])
        return flops + self.decoder[-1].flops(positions, inputs["layout_asked"])

    def _inputs(self, encoded: views.Encoded, *keys) -> Inputs:
        """What is shown.

        ``tokens``, ``values`` [E], which the encoder reads, T, S and genes of each cell, where ``layout`` says;
        ``unread``, ``unread_values`` [U], the rest, as positions among S; ``positions``, the layout of S.

        Which genes are left where a cell has too many is random by `keys`.
        """
        genes, values_N = encoded
        if self.sizes.released_depth_tokens:
            index = np.flatnonzero(values_N > 0)
            genes = Genes(genes.joinids, np.searchsorted(index, genes.offsets), genes.genes[index])
            values_N = values_N[index]
            if (np.diff(genes.offsets) < 2).any():
                raise CellmillError(
                    "released_depth_tokens: a cell of at most one count has fewer than the two tokens that the "
                    "released code takes for T and S (it fails, too); leave such cells out, or set it to false"
                )
        # T and S, the last two of each cell, become the first two
        from_end_N = spread(genes.offsets[1:], genes.offsets) - np.arange(len(values_N))
        hash_N = hash_genes(genes, "scfoundation encoder", *keys) >> np.uint64(32)
        order = argsort_within(genes.offsets, np.where(from_end_N <= 2, 0, hash_N | np.uint64(1)).astype(np.uint32))
        kept, offsets = keep_first(genes.offsets, self.sizes.max_length)
        is_unread_N = np.ones(len(order), bool)
        is_unread_N[kept] = False
        positions = uniform(len(genes.joinids), self.n_positions)
        first_N = spread(positions.starts, genes.offsets)
        read, unread = order[kept], order[is_unread_N]
        layout = self.packing.layout(np.diff(offsets))
        return {
            "tokens": torch.from_numpy(layout.place(offsets, genes.genes[read], self.pad, dtype=np.int64)),
            "values": torch.from_numpy(layout.place(offsets, values_N[read], 0, dtype=np.float32)),
            "layout": layout,
            "unread": torch.from_numpy(first_N[unread] + genes.genes[unread]),
            "unread_values": torch.from_numpy(values_N[unread]),
            "positions": positions,
        }

    def _layout_asked(self, lengths_B: np.ndarray) -> Layout:
        """Of asked positions; where there are no cells it has no unused slot, as that would be of no position."""
        return self.packing.layout(lengths_B) if len(lengths_B) else uniform(0, 1)

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """Thinned and masked cells.

        Beside what is shown (`_inputs`), where ``layout_asked`` says: ``asked`` [Q], the masked genes; ``hidden`` [Q],
        whether the decoder sees the mask there; ``targets`` [Q], the raw cell's values. See
        `cellmill.views.scfoundation.pretrain`.
        """
        encoded, *masked = views.pretrain(cells, n_genes=self.n_genes, seed=seed, step=step)
        offsets, places = join([part.genes.offsets for part in masked])
        genes_N, hidden_N, targets_N = (np.empty(offsets[-1], kind) for kind in (np.int64, bool, np.float32))
        for part, place in zip(masked, places, strict=True):
            genes_N[place], hidden_N[place], targets_N[place] = part.genes.genes, part.hidden, part.targets
        layout = self._layout_asked(np.diff(offsets))
        return self._inputs(encoded, seed, -1 if step is None else step) | {
            "asked": torch.from_numpy(layout.place(offsets, genes_N, 0)),
            "hidden": torch.from_numpy(layout.place(offsets, hidden_N, False)),
            "targets": torch.from_numpy(layout.place(offsets, targets_N, 0)),
            "layout_asked": layout,
        }

    def embed_inputs(self, cells: CellBatch, target_counts: np.ndarray | None = None) -> Inputs:
        """What is shown (`_inputs`), and ``asked`` [Q], the genes that each cell expresses, by ``layout_asked``.

        `target_counts` [B] is the depth that T asks for, by default `embedding_depth`, or the cell's own.
        """
        if target_counts is None and self.sizes.embedding_depth:
            target_counts = np.full(len(cells), 10.0**self.sizes.embedding_depth)
        layout = self._layout_asked(cells.lengths)
        return self._inputs(views.embed(cells, n_genes=self.n_genes, target_counts=target_counts)) | {
            "asked": torch.from_numpy(layout.place(cells.offsets, cells.genes, 0, dtype=np.int64)),
            "layout_asked": layout,
        }

    def encode(self, inputs: Inputs) -> Tensor:
        """[E, D], the normalised states of the tokens that the encoder reads, T and S of each cell first."""
        x_ED = in_compute_dtype(self.value_embedding(inputs["values"]) + self.gene_embedding(inputs["tokens"]))
        for layer in self.encoder:
            x_ED = layer(x_ED, inputs["layout"])
        return in_compute_dtype(self.encoder_norm(x_ED))

    def decode(self, inputs: Inputs, hidden_Q: Tensor) -> Tensor:
        """[Q, C], the decoder's normalised states at the positions ``asked``; it sees the mask where `hidden_Q` holds.

        The map from the encoder's width to the decoder's is linear, so genes are mapped once, not once a cell. Of the
        last layer only the asked positions are computed.
        """
        layout, positions, layout_asked = inputs["layout"], inputs["positions"], inputs["layout_asked"]
        asked_Q = self._among_all(inputs["asked"], layout_asked)
        read_ED, unread_UD = self.encode(inputs), self.value_embedding(inputs["unread_values"])
        index_R = torch.cat([self._among_all(inputs["tokens"], layout), inputs["unread"], asked_Q])
        is_unread_U = torch.ones_like(inputs["unread"], dtype=torch.bool)
        written_R = torch.cat([layout.used_N, is_unread_U, hidden_Q & layout_asked.used_N])

        gene_PC = self.to_decoder(self.gene_embedding.weight[: self.n_positions])
        to_C = partial(F.linear, weight=self.to_decoder.weight)
        shown_RC = to_C(torch.cat([read_ED, unread_UD.to(read_ED.dtype)]))
        mask_1C = to_C(self.value_embedding.mask.weight)
        zero_1C = to_C(self.value_embedding(torch.zeros(1, device=gene_PC.device)))
        rows_RC = torch.cat([shown_RC, mask_1C.expand(len(hidden_Q), -1)])
        rows_RC = rows_RC + gene_PC.index_select(0, index_R % self.n_positions)
        x_SC = _write_rows((gene_PC + zero_1C).repeat(len(layout), 1), index_R, rows_RC, written_R)
        for layer in self.decoder[:-1]:
            x_SC = layer(x_SC, positions)
        x_QC = self.decoder[-1](x_SC, positions, asked_Q, layout_asked)
        return self.final_norm(self.decoder_norm(x_QC))

    def _among_all(self, tokens_N: Tensor, layout: Layout) -> Tensor:
        """int64 [N], each token's position among S; that of an unused slot is the first cell's, and means nothing."""
        return tokens_N + torch.where(layout.used_N, layout.rows_N, 0) * self.n_positions

    def predict(self, inputs: Inputs, hidden_Q: Tensor) -> Tensor:
        """float32 [Q], log1p(CP10k) at depth T of the genes ``asked``; see `decode`."""
        x_QC = self.decode(inputs, hidden_Q)
        with torch.autocast(x_QC.device.type, enabled=False):
            return self.head(x_QC.float()).squeeze(1)

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`mse`: squared error of log1p(CP10k) at the masked positions, zeros and nonzeros.

        In training the random features are those of the step: drawn again every `redraw_every` steps.
        """
        if self.training and step is not None and self.sizes.redraw_every:
            self._redraw(step)
        return {"mse": self._term(self.predict(inputs, inputs["hidden"]), inputs)}

    def _term(self, predicted_Q: Tensor, inputs: Inputs) -> LossTerm:
        error_Q = torch.where(inputs["layout_asked"].used_N, predicted_Q - inputs["targets"], 0)
        return LossTerm(error_Q.square().sum(), self._count(inputs))

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """Of the encoder's states: `all`, [B, 4 D], those of S and T, and maximum and mean over genes; or one of these.

        `max` is over T and S, too, as published; over genes alone within `all`. A cell without genes has zeros.
        """
        pooling = self.check_pooling(pooling)
        layout, x_ED = inputs["layout"], self.encode(inputs).float()
        is_gene_E = layout.places_N >= 2
        parts = {
            "source": lambda: x_ED[layout.starts_B + S],
            "target": lambda: x_ED[layout.starts_B + T],
            "max": lambda: layout.max(x_ED),
            "mean": lambda: layout.mean(x_ED, is_gene_E),
        }
        if pooling in parts:
            return parts[pooling]()
        return torch.cat([parts["source"](), parts["target"](), layout.max(x_ED, is_gene_E), parts["mean"]()], 1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings."""
        return self.gene_embedding.weight[: self.n_genes].detach().float().clone()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The decoder's states before the final linear, of width C: the paper's gene context embeddings.

        The paper has them for all V genes of each cell; here are those that the cell expresses.
        """
        layout = inputs["layout_asked"]
        used_Q = layout.used_N
        states_QC = self.decode(inputs, torch.zeros_like(used_Q))
        return GeneStates(layout.rows_N[used_Q], inputs["asked"][used_Q], states_QC[used_Q].float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """What is visible (`_inputs`), T and S the whole cell's depth; ``asked``, the genes, as many of each cell."""
        shown = self.embed_inputs(cells, cells.totals)
        return shown | self.asked_inputs(np.asarray(genes_BQ, np.int64))

    @staticmethod
    def asked_inputs(genes_BQ: np.ndarray) -> Inputs:
        """``asked`` and ``layout_asked`` of as many genes of each cell."""
        return {"asked": torch.from_numpy(genes_BQ.flatten()), "layout_asked": uniform(*genes_BQ.shape)}

    def impute(self, inputs: Inputs) -> Imputed:
        """The predicted values, the mask in the genes' places; a gene is the likelier detected the larger its value."""
        values_Q = self.predict(inputs, torch.ones_like(inputs["asked"], dtype=torch.bool))
        values_BQ = inputs["layout_asked"].to_matrix(values_Q)
        return Imputed(values_BQ, values_BQ)

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V], each gene's mean value over the positions that training masks: nonzeros ten times as often as zeros.

        Each cell counts with the probability that its gene is masked, over all draws of thinning and masking.
        """
        sums_V, weights_V, n_cells = np.zeros(self.n_genes), np.zeros(self.n_genes), 0
        for cells in batches:
            weights_N = mask_probability(cells)
            sums_V += np.bincount(cells.genes, weights_N * log1p_cp10k(cells), minlength=self.n_genes)
            weights_V += np.bincount(cells.genes, weights_N - views.ZERO_RATE, minlength=self.n_genes)
            n_cells += len(cells)
        return torch.from_numpy(sums_V / (weights_V + views.ZERO_RATE * max(n_cells, 1))).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """`mse` when every masked gene is predicted by its mean."""
        asked_Q = inputs["asked"]
        return {"mse": self._term(trivial.to(asked_Q.device)[asked_Q], inputs)}


def _write_rows(x_SC: Tensor, index_R: Tensor, rows_RC: Tensor, written_R: Tensor) -> Tensor:
    """[S, C], `x_SC` with the rows `rows_RC` at `index_R`, those of them where `written_R` holds."""
    # the others go into a row behind the last, which is cut off: so no shape depends on what is written
    x_SC = torch.cat([x_SC, x_SC.new_zeros(1, x_SC.shape[1])])
    return x_SC.index_copy(0, torch.where(written_R, index_R, len(x_SC) - 1), rows_RC)[:-1]


def mask_probability(cells: CellBatch) -> np.ndarray:
    """float64 [N], how probable it is that training masks each expressed gene."""
    # (1 - b)^count is the probability to lose all molecules; its mean over b of Beta(2, 2) is this ratio
    lost_N = 6 / ((cells.counts + 2.0) * (cells.counts + 3.0))
    lost_N *= spread(np.where(cells.totals >= views.MIN_COUNTS, views.THINNED_SHARE, 0), cells.offsets)
    return views.NONZERO_RATE * (1 - lost_N) + views.ZERO_RATE * lost_N


MODEL = Scfoundation
