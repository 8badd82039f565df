"""scFoundation: an autoencoder that reads a cell's expressed genes and predicts hidden values of all genes.

Hao et al., Nature Methods 21, 1481 (2024); the network is xTrimoGene, Gong et al., NeurIPS 2023.

A value, log1p(CP10k), is embedded as a soft mixture of learned bins and added to its gene's embedding; genes have no
order. The encoder, a post-norm transformer, reads the nonzero values that are not hidden, and two depth tokens: T, the
log10 of the counts that are asked for, and S, of the counts that the input has. The decoder has a position for every
gene: the encoder's state where it read one, else the embedding of zero or of the mask, and in each case the gene's
embedding (again). Its attention over all genes is a Performer's: linear in their number, by random features. Trained is
the squared error at the masked positions, zeros and nonzeros, against the cell before it was thinned.

Token ids: gene g is g; then T is V, S is V + 1, padding V + 2.

Legend: B cells, E tokens that the encoder reads, U tokens of all cells that it does not, D width of the encoder, C of
the decoder, V genes, P = V + 2 positions of the decoder, R rows that are written over, Q asked positions, H heads,
K width of a head, F random features, N nonzeros of all cells.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention_padded import MultiHeadAttention, attend, key_mask
from cellmill.models.base import CellModel, GeneStates, GeneStatistics, Imputed, Inputs, Losses, LossTerm
from cellmill.randomness import hash64
from cellmill.shards.batch import CellBatch
from cellmill.views import scfoundation as views
from cellmill.views.ragged import (
    Genes,
    argsort_within,
    hash_genes,
    join,
    keep_first,
    log1p_cp10k,
    pad,
    spread,
)

FEATURE_FLOOR = 1e-4
"""Added to every random feature, as in the Performer's code, so that no query's weights are all zero."""
EMBEDDING_STD = 0.02
T, S = 0, 1
"""Columns of the depth tokens."""


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
    dropout: float = field(
        default=0.1, metadata={"description": "Dropout of the encoder, also of attention weights.", "ge": 0, "lt": 1}
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
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout)
        self.linear1 = nn.Linear(sizes.width, sizes.hidden)
        self.linear2 = nn.Linear(sizes.hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x_BED: Tensor, mask: Tensor) -> Tensor:
        """[B, E, D]; `mask` as for `MultiHeadAttention`."""
        x_BED = self.norm1(x_BED + self.dropout(self.attention(x_BED, mask)))
        return self.norm2(x_BED + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x_BED))))))


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

    def forward(self, x_BPC: Tensor, asked_BQ: Tensor | None = None) -> Tensor:
        """[B, Q, C] at the asked positions, or [B, P, C] at all; keys and values are those of all positions."""
        y_BPC = self.norm1(x_BPC)
        if asked_BQ is None:
            qkv = self.attention.project(y_BPC)
        else:
            qkv = self.attention.project_across(_take(y_BPC, asked_BQ), y_BPC)
            x_BPC = _take(x_BPC, asked_BQ)
        attended = performer(*qkv, self.projection) if hasattr(self, "projection") else attend(*qkv)
        x_BPC = x_BPC + self.attention.out(attended)
        return x_BPC + self.linear2(F.gelu(self.linear1(self.norm2(x_BPC))))


def performer(q_BHQK: Tensor, k_BHPK: Tensor, v_BHPK: Tensor, projection_FK: Tensor) -> Tensor:
    """Attention whose softmax kernel is estimated by positive random features: [B, Q, H K], the heads side by side.

    FAVOR+ of Choromanski et al., ICLR 2021. What is subtracted from the exponents of the keys is one number a cell, as
    in the published code when it is given cells one by one; it matters through `FEATURE_FLOOR` alone.
    """
    with torch.autocast(q_BHQK.device.type, enabled=False):
        q_BHQF = _features(q_BHQK.float(), projection_FK, (3,))
        k_BHPF = _features(k_BHPK.float(), projection_FK, (1, 2, 3))
        context_BHFK = k_BHPF.transpose(2, 3) @ v_BHPK.float()
        weight_BHF1 = k_BHPF.sum(2).unsqueeze(3)
        return (q_BHQF @ context_BHFK / (q_BHQF @ weight_BHF1)).transpose(1, 2).flatten(2)


def _features(x_BHPK: Tensor, projection_FK: Tensor, over: tuple[int, ...]) -> Tensor:
    """[B, H, P, F]; exponents are lowered by the largest of the products `over` these dimensions."""
    scale = x_BHPK.shape[3] ** -0.25
    product_BHPF = x_BHPK @ (projection_FK.T * scale)
    norm_BHP1 = x_BHPK.square().sum(3, keepdim=True) * (scale**2 / 2)
    largest = product_BHPF.detach().amax(over, keepdim=True)
    return torch.exp(product_BHPF - (norm_BHP1 + largest)) + FEATURE_FLOOR


def draw_projection(n_features: int, width: int, *keys) -> Tensor:
    """Random directions, float32 [F, K], orthogonal within each block of K, of lengths as normal vectors have.

    A function of `keys` (integers or strings) alone. The signs of the QR decomposition are set so that directions are
    uniform (Mezzadri, Notices of the AMS 54, 592, 2007); as LAPACK leaves them, the estimated kernel is biased.
    """
    generator = torch.Generator("cpu").manual_seed(int(hash64("scfoundation projection", *keys).view(np.int64)[0]))
    n_blocks = -(-n_features // width)
    normal = torch.randn(n_blocks, width, width, generator=generator, device="cpu", dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    directions_FK = (q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).mT.flatten(0, 1)[:n_features]
    lengths_F = torch.randn(n_features, width, generator=generator, device="cpu", dtype=torch.float64).norm(dim=1)
    return (directions_FK * lengths_F[:, None]).float()


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
            **{"n_layers": 4, "width": 128, "n_heads": 4, "hidden": 512, "max_length": 1024},
            **{"decoder_layers": 2, "decoder_width": 96, "decoder_heads": 3, "decoder_hidden": 384},
        ),
        "small": Sizes(
            **{"n_layers": 8, "width": 288, "n_heads": 8, "hidden": 1152, "max_length": 1024},
            **{"decoder_layers": 3, "decoder_width": 192, "decoder_heads": 6, "decoder_hidden": 768},
        ),
        "base": Sizes(
            **{"n_layers": 12, "width": 512, "n_heads": 8, "hidden": 2048, "max_length": 1024},
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
        self._drawn: int | None = None
        self._draw_projections(0)

    def _draw_projections(self, draw: int) -> None:
        """Put the random features of the draw into every decoder layer; they depend on its number alone."""
        for number, layer in enumerate(self.decoder):
            if hasattr(layer, "projection") and not layer.projection.is_meta:
                layer.projection.copy_(draw_projection(*layer.projection.shape, draw, number))

    def _redraw(self, step: int) -> None:
        """The random features of a training step."""
        draw, since = divmod(step, self.sizes.redraw_every)
        if draw != self._drawn:
            self._draw_projections(draw)
            self._drawn = draw
        if self.sizes.decoder_attention == "performer":
            self.steps_since_redraw.fill_(since)

    def _inputs(self, encoded: views.Encoded, *keys) -> Inputs:
        """`tokens`, `values` [B, E], which the encoder reads: T, S, genes; `unread`, `unread_values` [U], the rest.

        Which genes are left where a cell has too many is random by `keys`. `unread` are places among B (P + 1).
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
        first_N = spread(np.arange(len(genes.joinids)) * (self.n_positions + 1), genes.offsets)
        read, unread = order[kept], order[is_unread_N]
        return {
            "tokens": torch.from_numpy(pad(offsets, genes.genes[read], self.pad, dtype=np.int64)),
            "values": torch.from_numpy(pad(offsets, values_N[read], 0, dtype=np.float32)),
            "unread": torch.from_numpy(first_N[unread] + genes.genes[unread]),
            "unread_values": torch.from_numpy(values_N[unread]),
        }

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """Thinned and masked cells.

        Beside what is shown (`_inputs`): `asked` [B, Q], the masked positions; `hidden` [B, Q], whether the decoder
        sees the mask there; `targets` [B, Q], the raw cell's values. See `cellmill.views.scfoundation.pretrain`.
        """
        encoded, *masked = views.pretrain(cells, n_genes=self.n_genes, seed=seed, step=step)
        offsets, places = join([part.genes.offsets for part in masked])
        genes_N, hidden_N, targets_N = (np.empty(offsets[-1], kind) for kind in (np.int64, bool, np.float32))
        for part, place in zip(masked, places, strict=True):
            genes_N[place], hidden_N[place], targets_N[place] = part.genes.genes, part.hidden, part.targets
        return self._inputs(encoded, seed, -1 if step is None else step) | {
            "asked": torch.from_numpy(pad(offsets, genes_N, self.pad)),
            "hidden": torch.from_numpy(pad(offsets, hidden_N, False)),
            "targets": torch.from_numpy(pad(offsets, targets_N, 0)),
        }

    def embed_inputs(self, cells: CellBatch, target_counts: np.ndarray | None = None) -> Inputs:
        """What is shown (`_inputs`), and `asked` [B, Q], the genes that each cell expresses.

        `target_counts` [B] is the depth that T asks for, by default `embedding_depth`, or the cell's own.
        """
        if target_counts is None and self.sizes.embedding_depth:
            target_counts = np.full(len(cells), 10.0**self.sizes.embedding_depth)
        shown = self._inputs(views.embed(cells, n_genes=self.n_genes, target_counts=target_counts))
        return shown | {"asked": torch.from_numpy(pad(cells.offsets, cells.genes, self.pad, dtype=np.int64))}

    def encode(self, inputs: Inputs) -> Tensor:
        """[B, E, D], the normalised states of the tokens that the encoder reads, T and S first."""
        tokens_BE = inputs["tokens"]
        x_BED = self.value_embedding(inputs["values"]) + self.gene_embedding(tokens_BE)
        mask = key_mask(tokens_BE != self.pad)
        for layer in self.encoder:
            x_BED = layer(x_BED, mask)
        return self.encoder_norm(x_BED)

    def decode(self, inputs: Inputs, asked_BQ: Tensor, hidden_BQ: Tensor) -> Tensor:
        """[B, Q, C], the decoder's normalised states at the asked positions; it sees the mask where `hidden_BQ` holds.

        The map from the encoder's width to the decoder's is linear, so genes are mapped once, not once a cell. Of the
        last layer only the asked positions are computed.
        """
        weight, n_rows = self.to_decoder.weight, self.n_positions + 1
        read_BED, tokens_BE = self.encode(inputs), inputs["tokens"]
        unread_UD = self.value_embedding(inputs["unread_values"])
        zero_1D = self.value_embedding(torch.zeros(1, device=weight.device))
        mask_1C = F.linear(self.value_embedding.mask.weight, weight)
        # the row after the last position takes what is written for padding, and is cut off
        first_B1 = torch.arange(len(tokens_BE), device=weight.device).unsqueeze(1) * n_rows
        masked_BQ = torch.where(hidden_BQ, asked_BQ, self.pad) + first_B1
        index_R = torch.cat([(tokens_BE + first_B1).flatten(), inputs["unread"], masked_BQ.flatten()])
        shown_RC = F.linear(torch.cat([read_BED.flatten(0, 1), unread_UD.to(read_BED.dtype)]), weight)
        values_RC = torch.cat([shown_RC, mask_1C.to(shown_RC.dtype).expand(masked_BQ.numel(), -1)])
        x_RC = F.linear(zero_1D, weight).to(shown_RC.dtype).expand(len(tokens_BE) * n_rows, -1)
        x_BPC = x_RC.index_copy(0, index_R, values_RC).unflatten(0, (-1, n_rows))[:, : self.n_positions]
        x_BPC = x_BPC + self.to_decoder(self.gene_embedding.weight[: self.n_positions])
        for layer in self.decoder[:-1]:
            x_BPC = layer(x_BPC)
        x_BQC = self.decoder[-1](x_BPC, asked_BQ.clamp(max=self.n_positions - 1))
        return self.final_norm(self.decoder_norm(x_BQC))

    def predict(self, inputs: Inputs, asked_BQ: Tensor, hidden_BQ: Tensor) -> Tensor:
        """float32 [B, Q], log1p(CP10k) at depth T of the asked genes."""
        x_BQC = self.decode(inputs, asked_BQ, hidden_BQ)
        with torch.autocast(x_BQC.device.type, enabled=False):
            return self.head(x_BQC.float()).squeeze(2)

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`mse`: squared error of log1p(CP10k) at the masked positions, zeros and nonzeros.

        In training the random features are those of the step: drawn again every `redraw_every` steps.
        """
        if self.training and step is not None and self.sizes.redraw_every:
            self._redraw(step)
        return {"mse": self._term(self.predict(inputs, inputs["asked"], inputs["hidden"]), inputs)}

    def _term(self, predicted_BQ: Tensor, inputs: Inputs) -> LossTerm:
        valid_BQ = inputs["asked"] != self.pad
        error_BQ = (predicted_BQ - inputs["targets"]) * valid_BQ
        return LossTerm(error_BQ.square().sum(), valid_BQ.sum().float())

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """Of the encoder's states: `all`, [B, 4 D], those of S and T, and maximum and mean over genes; or one of these.

        `max` is over T and S, too, as published; over genes alone within `all`. A cell without genes has zeros.
        """
        pooling = self.check_pooling(pooling)
        x_BED = self.encode(inputs).float()
        is_token_BE1 = (inputs["tokens"] != self.pad).unsqueeze(2)
        if pooling == "max":
            return _maximum(x_BED, is_token_BE1)
        x_BED, depths_B2D, is_gene_BE1 = x_BED[:, 2:], x_BED[:, :2], is_token_BE1[:, 2:]
        mean_BD = (x_BED * is_gene_BE1).sum(1) / is_gene_BE1.sum(1).clamp(min=1)
        parts = {"source": depths_B2D[:, S], "target": depths_B2D[:, T], "mean": mean_BD}
        if pooling in parts:
            return parts[pooling]
        return torch.cat([parts["source"], parts["target"], _maximum(x_BED, is_gene_BE1), mean_BD], 1)

    def embed_genes(self) -> Tensor:
        """[V, D], the gene embeddings."""
        return self.gene_embedding.weight[: self.n_genes].detach().float().clone()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The decoder's states before the final linear, of width C: the paper's gene context embeddings.

        The paper has them for all V genes of each cell; here are those that the cell expresses.
        """
        asked_BQ = inputs["asked"]
        is_gene_BQ = asked_BQ != self.pad
        states_BQC = self.decode(inputs, asked_BQ, torch.zeros_like(is_gene_BQ))
        return GeneStates(is_gene_BQ.nonzero()[:, 0], asked_BQ[is_gene_BQ], states_BQC[is_gene_BQ].float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """What is visible (`_inputs`), T and S the whole cell's depth; `asked` [B, Q], the genes."""
        return self.embed_inputs(cells, cells.totals) | {"asked": torch.from_numpy(np.asarray(genes_BQ, np.int64))}

    def impute(self, inputs: Inputs) -> Imputed:
        """The predicted values, the mask in the genes' places; a gene is the likelier detected the larger its value."""
        values_BQ = self.predict(inputs, inputs["asked"], torch.ones_like(inputs["asked"], dtype=torch.bool))
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
        asked_BQ = inputs["asked"]
        return {"mse": self._term(trivial.to(asked_BQ.device)[asked_BQ.clamp(max=self.n_genes - 1)], inputs)}


def mask_probability(cells: CellBatch) -> np.ndarray:
    """float64 [N], how probable it is that training masks each expressed gene."""
    # (1 - b)^count is the probability to lose all molecules; its mean over b of Beta(2, 2) is this ratio
    lost_N = 6 / ((cells.counts + 2.0) * (cells.counts + 3.0))
    lost_N *= spread(np.where(cells.totals >= views.MIN_COUNTS, views.THINNED_SHARE, 0), cells.offsets)
    return views.NONZERO_RATE * (1 - lost_N) + views.ZERO_RATE * lost_N


def _take(x_BPC: Tensor, index_BQ: Tensor) -> Tensor:
    return x_BPC.gather(1, index_BQ.unsqueeze(2).expand(-1, -1, x_BPC.shape[2]))


def _maximum(x_BED: Tensor, valid_BE1: Tensor) -> Tensor:
    """[B, D], over the valid tokens; zeros if there are none."""
    if not x_BED.shape[1]:
        return x_BED.new_zeros(len(x_BED), x_BED.shape[2])
    largest_BD = x_BED.masked_fill(~valid_BE1, -torch.inf).amax(1)
    return largest_BD.masked_fill(~valid_BE1.any(1), 0)


MODEL = Scfoundation
