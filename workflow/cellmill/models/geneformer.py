"""Geneformer: a BERT that reads a cell as its genes in the order of their relative expression.

Theodoris et al., Nature 618, 616 (2023) (V1); Chen et al., Nat. Comput. Sci. (2026) (V2).

A gene's value is its count over the cell's total, over the gene's nonzero median in the corpus; the cell is the list of
its genes by falling value, and the value itself is dropped. The network is the plain BERT of Devlin et al. (2019):
learned absolute positions, post-norm layers, a decoder tied to the token embedding; it learns to name masked genes.

Token ids: the specials first (V1 pad 0, mask 1; V2 also cls 2, eos 3), then gene g at ``g + n_specials``.
An empty cell has no token in V1: its embedding is zero. In V2 it is <cls><eos>.

Embeddings come from the second-to-last layer, as in the papers' zero-shot use; the poolings that end in `_last` read
the last one, as V2's papers do for perturbations and after fine-tuning.

Legend: B cells, L tokens, D width, V genes, T = V + specials tokens in the vocabulary, M masked positions, N nonzeros,
Q genes asked for, K masks put into a cell to ask for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention_padded import MultiHeadAttention, key_mask
from cellmill.models.base import CellModel, GeneStates, GeneStatistics, Imputed, Inputs, Losses, LossTerm
from cellmill.shards.batch import CellBatch
from cellmill.views import geneformer as views
from cellmill.views.ragged import Genes, pad, padded_index

PAD, MASK, CLS, EOS = 0, 1, 2, 3
NORM_EPS = 1e-12
INIT_STD = 0.02
LOGIT_ROWS = 1024
"""Masks that are named at once when many are asked, so that memory stays small."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a Geneformer."""

    version: Literal["V1", "V2"] = field(
        metadata={"description": "V1: no <cls>/<eos>, mean pooling; V2: both, <cls> pooling."}
    )
    n_layers: int = field(metadata={"description": "Transformer layers.", "ge": 1})
    width: int = field(metadata={"description": "Width of a token's state.", "ge": 1})
    n_heads: int = field(metadata={"description": "Attention heads; divides width.", "ge": 1})
    hidden: int = field(metadata={"description": "Width of a layer's feed-forward network.", "ge": 1})
    max_length: int = field(metadata={"description": "Longest cell in tokens, specials included.", "ge": 3})
    dropout: float = field(
        default=0.02, metadata={"description": "Dropout, also of attention weights.", "ge": 0, "lt": 1}
    )
    mask_rate: float = field(default=0.15, metadata={"description": "Share of genes to predict.", "gt": 0, "lt": 1})

    def __post_init__(self):
        if self.width % self.n_heads:
            raise CellmillError(f"geneformer: width {self.width} is no multiple of n_heads {self.n_heads}; change one")


class Layer(nn.Module):
    """One post-norm transformer layer of BERT, with ReLU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout)
        self.attention_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.intermediate = nn.Linear(sizes.width, sizes.hidden)
        self.output = nn.Linear(sizes.hidden, sizes.width)
        self.output_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D]; `mask` as for `MultiHeadAttention`."""
        x_BLD = self.attention_norm(x_BLD + self.dropout(self.attention(x_BLD, mask)))
        return self.output_norm(x_BLD + self.dropout(self.output(F.relu(self.intermediate(x_BLD)))))


class Geneformer(CellModel):
    """Geneformer V1 and V2.

    Parameters
    ----------
    sizes
        See `Sizes`.
    n_genes
        V.
    statistics
        `median_nonzero_cp10k` is kept as a buffer; a gene without a median is never a token. None leaves the medians
        empty, to be loaded from a checkpoint.
    """

    Sizes = Sizes
    presets: ClassVar[dict[str, Sizes]] = {
        "demo": Sizes(version="V1", n_layers=2, width=64, n_heads=2, hidden=128, max_length=256, dropout=0.0),
        "tiny": Sizes(version="V2", n_layers=4, width=144, n_heads=3, hidden=576, max_length=1024),
        "small": Sizes(version="V2", n_layers=8, width=320, n_heads=5, hidden=1280, max_length=1024),
        "base": Sizes(version="V2", n_layers=12, width=576, n_heads=9, hidden=2304, max_length=1024),
        "v1-10m": Sizes(version="V1", n_layers=6, width=256, n_heads=4, hidden=512, max_length=2048),
        "v2-104m": Sizes(version="V2", n_layers=12, width=768, n_heads=12, hidden=3072, max_length=4096),
        "v2-316m": Sizes(version="V2", n_layers=18, width=1152, n_heads=18, hidden=4608, max_length=4096),
    }
    published_genes: ClassVar[dict[str, int]] = {"v1-10m": 25424, "v2-104m": 20271, "v2-316m": 20271}
    poolings = ("mean", "cls", "mean_last", "cls_last")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.n_specials = 2 if sizes.version == "V1" else 4
        self.poolings = ("mean", "mean_last") if sizes.version == "V1" else ("cls", "mean", "cls_last", "mean_last")
        n_tokens = n_genes + self.n_specials
        self.word_embeddings = nn.Embedding(n_tokens, sizes.width, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(sizes.max_length, sizes.width)
        self.token_type_embeddings = nn.Embedding(2, sizes.width)
        self.embedding_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.embedding_dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.head_transform = nn.Linear(sizes.width, sizes.width)
        self.head_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.head_bias = nn.Parameter(torch.zeros(n_tokens))
        self.apply(_initialise)
        medians = torch.full((n_genes,), torch.nan) if statistics is None else statistics.median_nonzero_cp10k.float()
        self.register_buffer("medians", medians.clone())
        self._median_V: np.ndarray | None = None

    def _medians_on_cpu(self) -> np.ndarray:
        """float32 [V]; copied once, since a copy from a GPU waits for all the work that it has queued."""
        if self._median_V is None:
            self._median_V = self.medians.cpu().numpy().copy()
            if np.isnan(self._median_V).all():
                self._median_V = None
                raise CellmillError(
                    "this geneformer has no gene medians; build it with the corpus statistics or load a checkpoint"
                )
        return self._median_V

    @property
    def _room(self) -> int:
        """Genes that fit into the longest cell."""
        return self.sizes.max_length - (0 if self.sizes.version == "V1" else 2)

    def _matrix(self, ranks: Genes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [B, L] with the version's specials, and the flat place of each gene token in it."""
        tokens_N = np.where(ranks.genes == views.MASKED, MASK, ranks.genes + self.n_specials)
        if self.sizes.version == "V1":
            tokens_BL = pad(ranks.offsets, tokens_N, PAD, dtype=np.int64)
            return tokens_BL, padded_index(ranks.offsets, tokens_BL.shape[1])
        tokens_BL = pad(ranks.offsets, tokens_N, PAD, before=1, after=1, dtype=np.int64)
        tokens_BL[:, 0] = CLS
        tokens_BL[np.arange(len(tokens_BL)), np.diff(ranks.offsets) + 1] = EOS
        return tokens_BL, padded_index(ranks.offsets, tokens_BL.shape[1], before=1)

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """Masked ranks: `tokens` [B, L]; `positions` [M] in the flattened tokens; `targets` [M], the true tokens there.

        See `cellmill.views.geneformer.pretrain`. (The original also draws specials as random tokens.)
        """
        ranks, index_M, shown_M = views.pretrain(
            cells, self._medians_on_cpu(), limit=self._room, mask_rate=self.sizes.mask_rate, seed=seed, step=step
        )
        tokens_BL, place_N = self._matrix(ranks)
        tokens_BL.ravel()[place_N[index_M]] = np.where(shown_M == views.MASKED, MASK, shown_M + self.n_specials)
        return {
            "tokens": torch.from_numpy(tokens_BL),
            "positions": torch.from_numpy(place_N[index_M]),
            "targets": torch.from_numpy(ranks.genes[index_M].astype(np.int64) + self.n_specials),
        }

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens` [B, L]."""
        ranks = views.embed(cells, self._medians_on_cpu(), limit=self._room)
        return {"tokens": torch.from_numpy(self._matrix(ranks)[0])}

    def encode(self, tokens_BL: Tensor, n_layers: int) -> Tensor:
        """[B, L, D], the states after the first `n_layers` layers."""
        position_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        x_BLD = (
            self.word_embeddings(tokens_BL)
            + self.position_embeddings(position_L)
            + self.token_type_embeddings.weight[0]
        )
        x_BLD = self.embedding_dropout(self.embedding_norm(x_BLD))
        mask = key_mask(tokens_BL != PAD)
        for layer in self.layers[:n_layers]:
            x_BLD = layer(x_BLD, mask)
        return x_BLD

    def name(self, x_MD: Tensor) -> Tensor:
        """[M, T], the logits of every token of the vocabulary, from states of the last layer."""
        x_MD = self.head_norm(F.relu(self.head_transform(x_MD)))
        return F.linear(x_MD, self.word_embeddings.weight, self.head_bias).float()

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`mlm`: cross-entropy over the vocabulary, computed at the masked positions only (nats)."""
        x_BLD = self.encode(inputs["tokens"], self.sizes.n_layers)
        logits_MT = self.name(x_BLD.flatten(0, 1).index_select(0, inputs["positions"]))
        return {"mlm": _term(F.cross_entropy(logits_MT, inputs["targets"], reduction="sum"), inputs)}

    def depth(self, pooling: str) -> int:
        """Layers that a pooling reads through."""
        return self.sizes.n_layers - (0 if pooling.endswith("_last") else 1)

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], the mean over genes or the state of <cls>, from the second-to-last layer or the last (`_last`)."""
        pooling = self.check_pooling(pooling)
        tokens_BL = inputs["tokens"]
        x_BLD = self.encode(tokens_BL, self.depth(pooling)).float()
        if pooling.startswith("cls"):
            return x_BLD[:, 0]
        is_gene_BL1 = (tokens_BL >= self.n_specials).unsqueeze(2)
        return (x_BLD * is_gene_BL1).sum(1) / is_gene_BL1.sum(1).clamp(min=1)

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The states of the second-to-last layer at the genes of each cell."""
        tokens_BL = inputs["tokens"]
        x_BLD = self.encode(tokens_BL, self.sizes.n_layers - 1)
        cells_N, place_N = (tokens_BL >= self.n_specials).nonzero(as_tuple=True)
        return GeneStates(cells_N, tokens_BL[cells_N, place_N] - self.n_specials, x_BLD[cells_N, place_N].float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """`tokens` [B, L] with masks between the genes; of those `positions` [M] and `places` [M] in a matrix [B, K].

        `log_values` and `log_ranks` [B, K] say what the masks stand for; `rest` and `rest_log_value` [B], what there is
        no room for (see `views.impute`); `genes` [B, Q] are asked.
        """
        asked = views.impute(cells, self._medians_on_cpu(), limit=self._room, mask_rate=self.sizes.mask_rate)
        tokens_BL, place_N = self._matrix(asked.ranks)
        log_ranks_BK = pad(asked.offsets, np.log(asked.n_ranks_M, dtype=np.float32), -np.inf)
        arrays = {
            "tokens": tokens_BL,
            "positions": place_N[asked.index_M],
            "places": padded_index(asked.offsets, log_ranks_BK.shape[1]),
            "log_values": pad(asked.offsets, asked.log_value_M, 0),
            "log_ranks": log_ranks_BK,
            "rest": asked.rest_B,
            "rest_log_value": asked.rest_log_value_B,
            "genes": np.ascontiguousarray(genes_BQ, dtype=np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def impute(self, inputs: Inputs) -> Imputed:
        """Genes that are not shown, by the probability that the masks give them.

        The model was trained to say which gene stands at a rank. P(gene at the mask's rank) times the ranks that the
        mask stands for is the number of times that the gene is expected there: its logarithm, summed over the masks,
        is the detection. Normalised over the masks it weighs them (Bayes' rule, all ranks being equally likely
        beforehand), and the value is the expected log1p(CP10k), where a rank means the CP10k / median that the visible
        genes have around it. Of the ranks without room the model says nothing: they count by their share in the cell.
        """
        genes_BQ, log_ranks_BK = inputs["genes"], inputs["log_ranks"]
        n_masks = log_ranks_BK.shape[1]
        x_MD = self.encode(inputs["tokens"], self.sizes.n_layers).flatten(0, 1)[inputs["positions"]]
        log_p_KQ = x_MD.new_zeros((log_ranks_BK.numel(), genes_BQ.shape[1]), dtype=torch.float32)
        for place_M, some_MD in zip(inputs["places"].split(LOGIT_ROWS), x_MD.split(LOGIT_ROWS), strict=True):
            logits_MT = self.name(some_MD)
            tokens_MQ = genes_BQ[place_M // n_masks] + self.n_specials
            log_p_KQ[place_M] = logits_MT.gather(1, tokens_MQ) - logits_MT.logsumexp(1, keepdim=True)
        score_BKQ = log_p_KQ.view(*log_ranks_BK.shape, genes_BQ.shape[1]) + log_ranks_BK[:, :, None]

        median_B1Q = self.medians[genes_BQ].nan_to_num(0)[:, None]  # no training cell expresses it: 0 is likely
        values_BKQ = torch.log1p(inputs["log_values"].exp()[:, :, None] * median_B1Q)
        values_BQ = (score_BKQ.softmax(1) * values_BKQ).sum(1)
        rest_BQ = torch.log1p(inputs["rest_log_value"].exp()[:, None] * median_B1Q[:, 0])
        return Imputed(torch.lerp(values_BQ, rest_BQ, inputs["rest"][:, None]), score_BKQ.logsumexp(1))

    def embed_genes(self) -> Tensor:
        """[V, D], the token embeddings of the genes. (The paper reads genes in context: `gene_states`.)"""
        return self.word_embeddings.weight[self.n_specials :].detach().float().clone()

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V], log frequency of each gene among the corpus's tokens, add-one smoothed."""
        counts_V = np.ones(self.n_genes)
        for cells in batches:
            ranks = views.embed(cells, self._medians_on_cpu(), limit=self._room)
            counts_V += np.bincount(ranks.genes, minlength=self.n_genes)
        return torch.from_numpy(np.log(counts_V / counts_V.sum())).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """`mlm` when every masked gene is predicted by the corpus's gene frequencies."""
        genes_M = inputs["targets"] - self.n_specials
        return {"mlm": _term(-trivial.to(genes_M.device)[genes_M].sum(), inputs)}


def _term(total: Tensor, inputs: Inputs) -> LossTerm:
    return LossTerm(total, torch.full((), len(inputs["targets"]), device=total.device))


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal weights, zero biases, a zero row for padding."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


MODEL = Geneformer
