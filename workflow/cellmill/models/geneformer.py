"""Geneformer: a BERT that reads a cell as its genes in the order of their relative expression.

Theodoris et al., Nature 618, 616 (2023) (V1); Chen et al., Nat. Comput. Sci. (2026) (V2).

A gene's value is its count over the cell's total, over the gene's nonzero median in the corpus; the cell is the list of
its genes by falling value, and the value itself is dropped. The network is the plain BERT of Devlin et al. (2019):
learned absolute positions, post-norm layers, a decoder tied to the token embedding; it learns to name masked genes.

Token ids: the specials first (V1 pad 0, mask 1; V2 also cls 2, eos 3), then gene g at ``g + n_specials``.
An empty cell has no token in V1: its embedding is zero. In V2 it is <cls><eos>.

Embeddings come from the second-to-last layer, as in the papers' zero-shot use; the poolings that end in `_last` read
the last one, as V2's papers do for perturbations and after fine-tuning.

Legend: B cells, N slots of tokens of all cells together, D width, V genes, T = V + specials tokens in the vocabulary,
M masked positions, or slots of those that are asked for; Q genes asked for, K masks put into a cell to ask for them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
from cellmill.models.packing import Layout
from cellmill.models.vocabulary_head import vocabulary_loss
from cellmill.shards.batch import CellBatch
from cellmill.views import geneformer as views
from cellmill.views.ragged import Genes

PAD, MASK, CLS, EOS = 0, 1, 2, 3
NORM_EPS = 1e-12
INIT_STD = 0.02
LOGIT_ROWS = 512
"""Masked positions that are named at once, so that memory stays small: each takes a row of T logits."""


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
    dropout: float = field(default=0.02, metadata={"description": "Dropout of states.", "ge": 0, "lt": 1})
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "description": "Dropout of attention weights; null: as dropout. Any but 0 rules out the fast attention "
            "of GPUs.",
            "ge": 0,
            "lt": 1,
        },
    )
    mask_rate: float = field(default=0.15, metadata={"description": "Share of genes to predict.", "gt": 0, "lt": 1})

    def __post_init__(self):
        if self.width % self.n_heads:
            raise CellmillError(f"geneformer: width {self.width} is no multiple of n_heads {self.n_heads}; change one")

    @property
    def dropout_of_attention(self) -> float:
        """Dropout of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


class Layer(nn.Module):
    """One post-norm transformer layer of BERT, with ReLU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout_of_attention)
        self.attention_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.intermediate = nn.Linear(sizes.width, sizes.hidden)
        self.output = nn.Linear(sizes.hidden, sizes.width)
        self.output_norm = nn.LayerNorm(sizes.width, eps=NORM_EPS)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x_ND: Tensor, layout: Layout, at_M: Tensor | None = None, asked: Layout | None = None) -> Tensor:
        """[N, D], or [M, D] of the slots `at_M` alone, which belong to cells as `asked` says.

        The others then give only keys and values.
        """
        if asked is None:
            context_ND = self.attention(x_ND, layout)
        else:
            all_ND, x_ND = x_ND, x_ND.index_select(0, at_M)
            context_ND = self.attention(x_ND, asked, others=all_ND, others_layout=layout)
        x_ND = in_compute_dtype(self.attention_norm(x_ND + self.dropout(context_ND)))
        hidden_ND = self.output(F.relu(self.intermediate(x_ND)))
        return in_compute_dtype(self.output_norm(x_ND + self.dropout(hidden_ND)))

    def flops(self, layout: Layout, asked: Layout | None = None) -> float:
        """Floating-point operations of `forward`; see `CellModel.body_flops`."""
        asked = layout if asked is None else asked
        width, hidden = self.output_norm.normalized_shape[0], self.output.in_features
        keys_and_values, rest = 2 * width**2, 2 * width**2 + 2 * width * hidden
        products = 2.0 * (keys_and_values * layout.n_tokens + rest * asked.n_tokens)
        return products + attention_flops(width, asked, layout)


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
        "tiny": Sizes(
            version="V2", n_layers=4, width=144, n_heads=3, hidden=576, max_length=1024, attention_dropout=0.0
        ),
        "small": Sizes(
            version="V2", n_layers=8, width=320, n_heads=5, hidden=1280, max_length=1024, attention_dropout=0.0
        ),
        "base": Sizes(
            version="V2", n_layers=12, width=576, n_heads=9, hidden=2304, max_length=1024, attention_dropout=0.0
        ),
        "v1-10m": Sizes(version="V1", n_layers=6, width=256, n_heads=4, hidden=512, max_length=2048),
        "v2-104m": Sizes(version="V2", n_layers=12, width=768, n_heads=12, hidden=3072, max_length=4096),
        "v2-316m": Sizes(version="V2", n_layers=18, width=1152, n_heads=18, hidden=4608, max_length=4096),
    }
    published_genes: ClassVar[dict[str, int]] = {"v1-10m": 25424, "v2-104m": 20271, "v2-316m": 20271}
    poolings = ("mean", "cls", "mean_last", "cls_last")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.n_specials = 2 if sizes.version == "V1" else 4
        self.n_around = 0 if sizes.version == "V1" else 1  # specials in front of a cell's genes, and behind them
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
        return self.sizes.max_length - 2 * self.n_around

    def _lay_out(self, ranks: Genes) -> tuple[np.ndarray, Layout]:
        """Tokens [N] with the version's specials, and where they lie."""
        layout = self.packing.layout(np.diff(ranks.offsets) + 2 * self.n_around)
        tokens_N = np.where(ranks.genes == views.MASKED, MASK, ranks.genes + self.n_specials)
        tokens_N = layout.place(ranks.offsets, tokens_N, PAD, before=self.n_around, dtype=np.int64)
        if self.n_around:
            tokens_N[layout.starts] = CLS
            tokens_N[layout.ends - 1] = EOS
        return tokens_N, layout

    def _ask(self, ranks: Genes, layout: Layout, index_M: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, Layout]:
        """The slots of the genes `index_M` (`offsets`: of each cell), and the layout of what is asked there.

        It is packed also where the tokens are padded: nobody needs the answer of a slot that is not asked.
        """
        packing = replace(self.packing, kind="packed") if len(layout) else self.packing
        asked = packing.layout(np.diff(offsets))
        positions_M = layout.index(ranks.offsets, self.n_around)[index_M]
        return asked.place(offsets, positions_M, 0), asked

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """Masked ranks: `tokens` [N] and their `layout`; `positions` [M] in them that are to be named, and the
        `layout_asked` of those; `targets`, the true tokens there, without those of unused slots at the end.

        See `cellmill.views.geneformer.pretrain`. (The original also draws specials as random tokens.)
        """
        ranks, index_M, shown_M = views.pretrain(
            cells, self._medians_on_cpu(), limit=self._room, mask_rate=self.sizes.mask_rate, seed=seed, step=step
        )
        tokens_N, layout = self._lay_out(ranks)
        positions_M, asked = self._ask(ranks, layout, index_M, np.searchsorted(index_M, ranks.offsets))
        shown_M = np.where(shown_M == views.MASKED, MASK, shown_M + self.n_specials)
        tokens_N[positions_M[: len(index_M)]] = shown_M
        return {
            "tokens": torch.from_numpy(tokens_N),
            "layout": layout,
            "positions": torch.from_numpy(positions_M),
            "layout_asked": asked,
            "targets": torch.from_numpy(ranks.genes[index_M].astype(np.int64) + self.n_specials),
        }

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens` [N] and their `layout`."""
        tokens_N, layout = self._lay_out(views.embed(cells, self._medians_on_cpu(), limit=self._room))
        return {"tokens": torch.from_numpy(tokens_N), "layout": layout}

    def encode(
        self,
        tokens_N: Tensor,
        layout: Layout,
        n_layers: int,
        at_M: Tensor | None = None,
        asked: Layout | None = None,
    ) -> Tensor:
        """[N, D], the states after the first `n_layers` layers, or those [M, D] of the slots `at_M` (see `Layer`)."""
        x_ND = (
            self.word_embeddings(tokens_N)
            + self.position_embeddings(layout.places_N)
            + self.token_type_embeddings.weight[0]
        )
        x_ND = in_compute_dtype(self.embedding_dropout(self.embedding_norm(x_ND)))
        if not n_layers:
            return x_ND if asked is None else x_ND.index_select(0, at_M)
        for layer in self.layers[: n_layers - 1]:
            x_ND = layer(x_ND, layout)
        return self.layers[n_layers - 1](x_ND, layout, at_M, asked)

    def transform(self, x_MD: Tensor) -> Tensor:
        """[M, D], what the decoder reads, from states of the last layer."""
        return self.head_norm(F.relu(self.head_transform(x_MD)))

    def name(self, x_MD: Tensor) -> Tensor:
        """[M, T], the logits of every token of the vocabulary, from states of the last layer."""
        return F.linear(self.transform(x_MD), self.word_embeddings.weight, self.head_bias).float()

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`mlm`: cross-entropy over the vocabulary, computed at the masked positions only (nats)."""
        x_MD, targets_M = self._asked(inputs)[: len(inputs["targets"])], inputs["targets"]
        decoder = self.word_embeddings.weight, self.head_bias
        total = vocabulary_loss(self.transform(x_MD), *decoder, targets_M=targets_M, n_rows=LOGIT_ROWS)
        return {"mlm": _term(total, inputs)}

    def _asked(self, inputs: Inputs) -> Tensor:
        """[M, D], the last layer's states at the positions that are asked."""
        tokens_N, layout, asked = inputs["tokens"], inputs["layout"], inputs["layout_asked"]
        return self.encode(tokens_N, layout, self.sizes.n_layers, inputs["positions"], asked)

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """`mlm`: the masked positions."""
        return {"mlm": _count(inputs)}

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B]; a gene that has no median is counted, though it takes no token."""
        return np.minimum(cells.lengths, self._room) + 2 * self.n_around

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """The layers, the last one's queries at the masked positions only, and there the head's transform."""
        layout, asked = inputs["layout"], inputs["layout_asked"]
        *first, last = self.layers
        head = 2.0 * self.head_transform.weight.numel() * asked.n_tokens
        return sum(layer.flops(layout) for layer in first) + last.flops(layout, asked) + head

    def depth(self, pooling: str) -> int:
        """Layers that a pooling reads through."""
        return self.sizes.n_layers - (0 if pooling.endswith("_last") else 1)

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], the mean over genes or the state of <cls>, from the second-to-last layer or the last (`_last`)."""
        pooling = self.check_pooling(pooling)
        tokens_N, layout, depth = inputs["tokens"], inputs["layout"], self.depth(pooling)
        if pooling.startswith("cls"):
            return self.encode(tokens_N, layout, depth, layout.starts_B, layout.one_each()).float()
        return layout.mean(self.encode(tokens_N, layout, depth), tokens_N >= self.n_specials)

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The states of the second-to-last layer at the genes of each cell."""
        tokens_N, layout = inputs["tokens"], inputs["layout"]
        gene_M = (tokens_N >= self.n_specials).nonzero()[:, 0]
        x_MD = self.encode(tokens_N, layout, self.sizes.n_layers - 1).index_select(0, gene_M)
        return GeneStates(layout.rows_N[gene_M], tokens_N[gene_M] - self.n_specials, x_MD.float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """`tokens` [N] with masks between the genes, and their `layout`; `positions` [M] of the masks, and the
        `layout_asked` of those.

        `log_values` and `log_ranks` [M] say what the masks stand for; `rest` and `rest_log_value` [B], what there is
        no room for (see `views.impute`); `genes` [B, Q] are asked.
        """
        found = views.impute(cells, self._medians_on_cpu(), limit=self._room, mask_rate=self.sizes.mask_rate)
        tokens_N, layout = self._lay_out(found.ranks)
        positions_M, asked = self._ask(found.ranks, layout, found.index_M, found.offsets)
        arrays = {
            "tokens": tokens_N,
            "positions": positions_M,
            "log_values": asked.place(found.offsets, found.log_value_M, 0),
            "log_ranks": asked.place(found.offsets, np.log(found.n_ranks_M, dtype=np.float32), 0),
            "rest": found.rest_B,
            "rest_log_value": found.rest_log_value_B,
            "genes": np.ascontiguousarray(genes_BQ, dtype=np.int64),
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors | {"layout": layout, "layout_asked": asked}

    def impute(self, inputs: Inputs) -> Imputed:
        """Genes that are not shown, by the probability that the masks give them.

        The model was trained to say which gene stands at a rank. P(gene at the mask's rank) times the ranks that the
        mask stands for is the number of times that the gene is expected there: its logarithm, summed over the masks,
        is the detection. Normalised over the masks it weighs them (Bayes' rule, all ranks being equally likely
        beforehand), and the value is the expected log1p(CP10k), where a rank means the CP10k / median that the visible
        genes have around it. Of the ranks without room the model says nothing: they count by their share in the cell.
        """
        genes_BQ, asked = inputs["genes"], inputs["layout_asked"]
        x_MD, cell_M = self._asked(inputs)[: asked.n_tokens], asked.rows_N[: asked.n_tokens]
        log_p_MQ = x_MD.new_zeros((asked.n_slots, genes_BQ.shape[1]), dtype=torch.float32)
        for place_M in torch.arange(asked.n_tokens, device=x_MD.device).split(LOGIT_ROWS):
            logits_MT = self.name(x_MD[place_M])
            tokens_MQ = genes_BQ[cell_M[place_M]] + self.n_specials
            log_p_MQ[place_M] = logits_MT.gather(1, tokens_MQ) - logits_MT.logsumexp(1, keepdim=True)
        score_BKQ = asked.to_matrix(log_p_MQ + inputs["log_ranks"][:, None], -torch.inf)
        log_value_BK = asked.to_matrix(inputs["log_values"])

        median_B1Q = self.medians[genes_BQ].nan_to_num(0)[:, None]  # no training cell expresses it: 0 is likely
        values_BKQ = torch.log1p(log_value_BK.exp()[:, :, None] * median_B1Q)
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
    return LossTerm(total, _count(inputs))


def _count(inputs: Inputs) -> Tensor:
    return torch.full((), len(inputs["targets"]), device=inputs["targets"].device)


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
