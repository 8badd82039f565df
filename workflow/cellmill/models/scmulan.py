"""scMulan: a GPT that reads and writes a cell as a sentence of words: genes with their values, metadata, cell types.

Bian et al., scMulan: a multitask generative pre-trained language model for single-cell analysis, RECOMB (2024).

A word is a token and a value (see `cellmill.views.scmulan`); its input is the sum of both embeddings. The words of a
sentence are a set, so they have no positions: the causal mask alone says what is known when the next word is asked for.
The network is a pre-norm decoder without biases and with two heads of their own: a logit and a value for every token.

In training a task asks for the last part of a sentence. Behind each word in front of that part's words stands a
question: which word is next? Its answers are all words that remain, each alike, and <E> alone where none remains.
`entity` is a question's cross-entropy with the uniform distribution over its answers, `value` the squared error of the
value head at them, their mean; both are means over a sentence's questions. The original's pretraining code is not
published; this is the objective that its paper states in words. Two things are our own: all tokens compete in the
softmax, also words that have been said, which generation bans; and each sentence weighs the same, whatever its length,
lest the thousand words of a generated cell leave nothing to the two of an annotated one.

Tokens: <E> 0, the genes from 1, the values of each obs column after each other, <PCT> (asks for the cell type), 15 more
task tokens, of which the first asks for the other metadata. A cell type has one level here, as a Census has it; the
published set holds coarse types among the fine ones, and a sentence may have both.

How questions are laid out and summed stands in `cellmill.models.scmulan_objective`, what is remembered of a sentence
that is to go on in `cellmill.models.scmulan_cache`.

Legend: B cells, N words of all cells (packed), M questions, D width, V genes in the vocabulary, T tokens, Q genes
that a cell is asked for, K cell types.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.attention import MultiHeadAttention, attend
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
from cellmill.models.scmulan_cache import Cache
from cellmill.models.scmulan_genes import gene_tokens
from cellmill.models.scmulan_objective import objective, over_answers, questions
from cellmill.shards.batch import CellBatch
from cellmill.views import scmulan as views
from cellmill.views.ragged import keep_first, offsets_of, sum_within

END = 0
CELL_TYPE = "cell_type"
N_TASKS = 16
"""<PCT> and 15 more."""
TYPE_LEVELS = 2
"""Cell type words that an annotation has at most: a coarse one and a fine one."""
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an scMulan."""

    n_layers: int = field(metadata={"description": "Transformer layers.", "ge": 1})
    width: int = field(metadata={"description": "Width of a word's state.", "ge": 1})
    n_heads: int = field(metadata={"description": "Attention heads; divides width.", "ge": 1})
    max_length: int = field(
        metadata={
            "description": "Longest sentence in words, in training and generation; cells are read whole.",
            "ge": 16,
        }
    )
    n_model_genes: int = field(
        default=2000,
        metadata={"description": "Genes that are words: the most variable ones of a larger vocabulary.", "ge": 1},
    )
    dropout: float = field(
        default=0.0, metadata={"description": "Dropout, also of attention weights.", "ge": 0, "lt": 1}
    )
    unprompted: float = field(
        default=0.1,
        metadata={
            "description": "Share of generated sentences without metadata in front, from which imputation is learnt.",
            "ge": 0,
            "le": 1,
        },
    )

    def __post_init__(self):
        if self.width % self.n_heads:
            raise CellmillError(f"scmulan: width {self.width} is no multiple of n_heads {self.n_heads}; change one")


class Layer(nn.Module):
    """One pre-norm decoder layer without biases, with tanh-GELU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, bias=False)
        self.attention = MultiHeadAttention(sizes.width, sizes.n_heads, sizes.dropout, bias=False)
        self.norm2 = nn.LayerNorm(sizes.width, bias=False)
        self.linear1 = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.linear2 = nn.Linear(4 * sizes.width, sizes.width, bias=False)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self, x_ND: Tensor, layout: Layout, asked_M: Tensor | None = None, layout_asked: Layout | None = None
    ) -> Tensor:
        """[N, D]; or [M, D] of the last words of each cell alone, whose slots and layout are given."""
        normed_ND, attention = self.norm1(x_ND), self.attention
        if asked_M is None:
            return self.finish(x_ND, attention.context(normed_ND, layout, causal=True))
        qkv = attention.project_across(normed_ND.index_select(0, asked_M), normed_ND)
        context_MD = attend(*qkv, layout_asked, layout, causal=True, dropout=attention.dropout_now)
        return self.finish(x_ND.index_select(0, asked_M), context_MD)

    def finish(self, x_ND: Tensor, context_ND: Tensor) -> Tensor:
        """[N, D], the layer's output where its input and what its attention read are given."""
        x_ND = x_ND + self.dropout(self.attention.out(context_ND))
        return x_ND + self.dropout(self.linear2(F.gelu(self.linear1(self.norm2(x_ND)), approximate="tanh")))


class CellTypes(NamedTuple):
    """What a model says after <PCT>."""

    codes_B: Tensor
    """int64 [B], the finest type that was said, its place in ``model.categories["cell_type"]``."""
    probability_B: Tensor
    """float32 [B], of that word among the cell types that had not been said."""
    states_BD: Tensor
    """float32 [B, D], the state of that word, read with the value 0 as all words but genes are."""


class Scmulan(CellModel):
    """scMulan.

    Parameters
    ----------
    sizes
        See `Sizes`.
    n_genes
        V.
    statistics
        Where V is larger than `Sizes.n_model_genes`, the most variable genes are chosen by them, and kept as a buffer;
        None leaves it empty, to be loaded from a checkpoint.
    categories
        The words of the `obs_columns`; by default those of the statistics.
    """

    Sizes = Sizes
    presets: ClassVar[dict[str, Sizes]] = {
        "demo": Sizes(n_layers=2, width=64, n_heads=2, max_length=128),
        "tiny": Sizes(n_layers=5, width=96, n_heads=3, max_length=1024),
        "small": Sizes(n_layers=7, width=320, n_heads=5, max_length=1024),
        "base": Sizes(n_layers=12, width=576, n_heads=9, max_length=1024),
        "published": Sizes(n_layers=24, width=1120, n_heads=20, max_length=views.CONTEXT),
    }
    published_genes: ClassVar[dict[str, int]] = {"published": 2000}
    obs_columns = ("tissue_general", CELL_TYPE, "development_stage", "disease", "tissue", "assay", "sex")
    # the published words by number: how many there are decides the number of parameters; a release brings their names
    published_categories: ClassVar[dict[str, dict[str, list[str]]]] = {
        "published": {
            column: [f"{column} {i}" for i in range(n)]
            for column, n in zip(obs_columns, (7, 114, 33, 6, 33, 10, 2), strict=True)
        }
    }
    poolings = ("pct", "label_informed", "mean", "released")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.n_gene_words = min(n_genes, sizes.n_model_genes)
        self.first_word, token = {}, 1 + self.n_gene_words
        for column, values in self.categories.items():
            self.first_word[column] = token
            token += len(values)
        self.pct, self.n_tokens = token, token + N_TASKS
        self.n_types = len(self.categories.get(CELL_TYPE, ()))
        if not self.n_types:  # <PCT> is never trained
            self.poolings = ("mean", "pct", "released")
        self.word_embedding = nn.Embedding(self.n_tokens, sizes.width)
        self.value_embedding = nn.Embedding(views.N_BINS + 1, sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.norm = nn.LayerNorm(sizes.width, bias=False)
        self.entity_head = nn.Linear(sizes.width, self.n_tokens, bias=False)
        self.value_head = nn.Linear(sizes.width, self.n_tokens, bias=False)
        self._initialise()
        self.register_buffer("token_V", gene_tokens(n_genes, sizes.n_model_genes, statistics))
        self._tokens: views.Tokens | None = None

    def _initialise(self) -> None:
        """GPT-2's: normal weights, those that write to the residual stream smaller by its number of summands."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        for layer in self.layers:
            for linear in (layer.attention.out, layer.linear2):
                nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(2 * self.sizes.n_layers))

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> views.Tokens:
        """The token set, on the CPU; copied once, since a copy from a GPU waits for all the work that it has queued."""
        if self._tokens is None:
            token_V = self.token_V.cpu().numpy().copy()
            if (token_V < 0).all():
                raise CellmillError(
                    "this scmulan does not know its genes; build it with the corpus statistics or load a checkpoint"
                )
            self._tokens = views.Tokens(token_V, END, self.pct, self.pct + 1)
        return self._tokens

    @property
    def n_known_genes(self) -> int:
        """Genes of the vocabulary that are words; `impute` has no opinion of the others."""
        return int((self.token_V >= 0).sum())

    def gene_T(self) -> Tensor:
        """int64 [T], the gene of the vocabulary that each token stands for, -1 for tokens that are none."""
        genes_G = (self.token_V >= 0).nonzero().squeeze(1)
        gene_T = torch.full((self.n_tokens,), -1, device=self.token_V.device)
        gene_T[self.token_V[genes_G].long()] = genes_G
        return gene_T

    @property
    def type_words(self) -> slice:
        """The tokens of the cell types."""
        first = self.first_word.get(CELL_TYPE, 0)
        return slice(first, first + self.n_types)

    def words(self, cells: CellBatch, columns: Iterable[str]) -> views.Words:
        """The words of some obs columns; a value that is unknown or not among the categories is none."""
        known = [column for column in columns if column in self.first_word and column in cells.codes]
        if not known:
            return views.Words(np.zeros(len(cells) + 1, np.int64), np.empty(0, np.int32))
        codes_BC = np.stack([cells.codes[column] for column in known], 1)
        first_C = np.array([self.first_word[column] for column in known])
        return views.Words(offsets_of((codes_BC >= 0).sum(1)), (codes_BC + first_C)[codes_BC >= 0].astype(np.int32))

    def _metadata(self, cells: CellBatch) -> tuple[views.Words, views.Words]:
        """Cell type words, and those of the other columns."""
        return self.words(cells, [CELL_TYPE]), self.words(cells, [c for c in self.obs_columns if c != CELL_TYPE])

    # --- sentences ----------------------------------------------------------------------------------------------------

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B]: gene words, all that is known of a cell, and a task's token; <E> is asked for and never read."""
        n_genes_B = sum_within(cells.offsets, self.tokens.gene_V[cells.genes] >= 0)
        n_others_B = np.diff(self.words(cells, self.obs_columns).offsets)
        return np.minimum(n_genes_B + n_others_B + 1, self.sizes.max_length - 1)

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """`tokens`, `values` [N] in `layout`: sentences without <E>; their `questions`; `task` [B].

        A sentence is `Sizes.max_length` words long at most, <E> among them.
        """
        cell_types, metadata = self._metadata(cells)
        sentences = views.pretrain(
            cells,
            self.tokens,
            cell_types=cell_types,
            metadata=metadata,
            seed=seed,
            step=step,
            limit=self.sizes.max_length,
            unprompted=self.sizes.unprompted,
        )
        return self.ask(sentences)

    def ask(self, sentences: views.Sentences) -> Inputs:
        """The inputs of training sentences; see `pretrain_inputs`."""
        inputs = self._read(sentences, np.diff(sentences.offsets) - 1)
        asked = questions(sentences, inputs["layout"], self.packing)
        return inputs | asked | {"task": torch.from_numpy(sentences.task_B)}

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """`tokens`, `values` [N] in `layout`: all genes that are words, then <PCT>.

        As in the released code, reading cuts nothing, whatever the length in training: words have no positions.
        """
        sentences = views.embed(cells, self.tokens, limit=self.n_tokens)
        return self._read(sentences, np.diff(sentences.offsets))

    def _read(self, sentences: views.Sentences, lengths_B: np.ndarray) -> Inputs:
        """`tokens`, `values` [N] in `layout`: the first words of each sentence."""
        index, offsets = keep_first(sentences.offsets, lengths_B)
        layout = self.packing.layout(lengths_B)
        return {
            "tokens": torch.from_numpy(layout.place(offsets, sentences.tokens[index], END, dtype=np.int32)),
            "values": torch.from_numpy(layout.place(offsets, sentences.values[index], 0, dtype=np.int32)),
            "layout": layout,
        }

    # --- network ------------------------------------------------------------------------------------------------------

    def embed_words(self, tokens_N: Tensor, values_N: Tensor) -> Tensor:
        """[N, D], the input of the first layer."""
        return in_compute_dtype(self.dropout(self.word_embedding(tokens_N) + self.value_embedding(values_N)))

    def encode(self, inputs: Inputs, asked_M: Tensor | None = None, layout_asked: Layout | None = None) -> Tensor:
        """float32 [N, D], the last states; or [M, D], those of the last words of each cell alone; see `Layer.forward`.

        A word sees those in front of it.
        """
        layout = inputs["layout"]
        x_ND = self.embed_words(inputs["tokens"], inputs["values"])
        for layer in self.layers[:-1]:
            x_ND = layer(x_ND, layout)
        return self.norm(self.layers[-1](x_ND, layout, asked_M, layout_asked).float())

    def encode_last(self, inputs: Inputs) -> Tensor:
        """float32 [B, D], the last state of each cell's last word, of which the last layer computes no other's."""
        layout = inputs["layout"]
        return self.encode(inputs, last_words(layout), layout.one_each())

    def read(self, inputs: Inputs, further: int) -> tuple[Tensor, Cache]:
        """Read sentences, to be continued by `further` words: float32 [N, D], the last states, and what is kept."""
        layout = inputs["layout"]
        cache = Cache(layout, further)
        x_ND = self.embed_words(inputs["tokens"], inputs["values"])
        for layer in self.layers:
            q_NHK, k_NHK, v_NHK = layer.attention.project(layer.norm1(x_ND))
            cache.store(k_NHK, v_NHK)
            x_ND = layer.finish(x_ND, attend(q_NHK, k_NHK, v_NHK, layout, causal=True))
        return self.norm(x_ND.float()), cache

    def read_further(self, tokens_B: Tensor, values_B: Tensor, cache: Cache) -> Tensor:
        """Read one more word of each sentence: float32 [B, D], its last state."""
        x_BD, open_BS = self.embed_words(tokens_B, values_B), cache.open()
        for i, layer in enumerate(self.layers):
            x_BD = layer.finish(x_BD, cache.attend(i, *layer.attention.project(layer.norm1(x_BD)), open_BS))
        return self.norm(x_BD.float())

    def logits(self, h: Tensor) -> Tensor:
        """float32 [..., T], of each word to be the next one; never in bfloat16, whose steps near 50 are 1/4."""
        with torch.autocast(h.device.type, enabled=False):
            return self.entity_head(h.float())

    def bins(self, h: Tensor) -> Tensor:
        """float32 [..., T], the value that each word would have; exact as `logits`."""
        with torch.autocast(h.device.type, enabled=False):
            return self.value_head(h.float())

    # --- objective ----------------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`entity`: cross-entropy (nats) and `value`: squared error (bins), sums over sentences of their means."""
        h_MD = self.encode(inputs, inputs["asked"], inputs["layout_asked"])
        return objective(h_MD, self.entity_head.weight, self.value_head.weight, inputs)

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """Of both terms the sentences that have questions."""
        return {"entity": inputs["n_asked"], "value": inputs["n_asked"]}

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """See `CellModel.body_flops`: 12 D^2 weights a layer, of which a word that is not asked meets 2 D^2 in the last
        one, for its key and value. A word makes a pair with itself and each word in front.
        """
        layout, asked, width = inputs["layout"], inputs["layout_asked"], self.sizes.width
        n, m = layout.n_tokens, asked.n_tokens
        weights = 12 * n * (self.sizes.n_layers - 1) + 2 * n + 10 * m
        n_pairs = (layout.lengths * (layout.lengths + 1) // 2).sum() * (self.sizes.n_layers - 1)
        n_pairs += (asked.lengths * (2 * layout.lengths - asked.lengths + 1) // 2).sum()
        return 2.0 * weights * width**2 + 4.0 * width * float(n_pairs)

    # --- what is read out ---------------------------------------------------------------------------------------------

    def decode_types(self, inputs: Inputs) -> CellTypes:
        """Say the likeliest cell type after the <PCT> of `embed_inputs`, and a finer one unless <E> is likelier."""
        if not self.n_types:
            raise CellmillError(
                "this scmulan has no cell type words, as its corpus had none; train it on annotated cells"
            )
        h_ND, cache = self.read(inputs, TYPE_LEVELS)
        state_BD = h_ND.index_select(0, last_words(inputs["layout"]))
        said_BK = torch.zeros(len(state_BD), self.n_types, dtype=torch.bool, device=state_BD.device)
        open_B = torch.ones_like(said_BK[:, 0])
        found = CellTypes(open_B.long(), open_B.float(), state_BD)
        for level in range(min(TYPE_LEVELS, self.n_types)):
            logits_BT = self.logits(state_BD)
            logits_BK = logits_BT[:, self.type_words].masked_fill(said_BK, -torch.inf)
            logit_B, code_B = logits_BK.max(1)
            if level:
                open_B = open_B & (logit_B > logits_BT[:, END])
            state_BD = self.read_further(code_B + self.type_words.start, torch.zeros_like(code_B), cache)
            probability_B = (logit_B - logits_BK.logsumexp(1)).exp()
            found = CellTypes(
                torch.where(open_B, code_B, found.codes_B),
                torch.where(open_B, probability_B, found.probability_B),
                torch.where(open_B.unsqueeze(1), state_BD, found.states_BD),
            )
            said_BK = said_BK.scatter(1, code_B.unsqueeze(1), True)
        return found

    def released_states(self, inputs: Inputs) -> Tensor:
        """float32 [B, D], what the released code reads: the last word but one of its last forward pass.

        It lets the model say three words, so that this is the first of them: the coarse type, where a fine one follows.
        Where <E> is the second, it is <PCT>; where <E> is the first, the last gene (<PCT> in a cell without genes, of
        which the released code makes nothing). Any token may be said, each with the value that the value head gives it;
        banned are all words of the sentence so far but its last.
        """
        layout, last_B = inputs["layout"], last_words(inputs["layout"])
        h_ND, cache = self.read(inputs, 1)
        gene_BD, pct_BD = (h_ND.index_select(0, n_B) for n_B in (torch.maximum(last_B - 1, layout.starts_B), last_B))
        banned_BT = torch.zeros(len(layout) + 1, self.n_tokens, dtype=torch.bool, device=h_ND.device)
        banned_BT[layout.rows_N, inputs["tokens"].long()] = True  # unused slots are in the row behind the cells'
        banned_BT = banned_BT[:-1]
        banned_BT[:, self.pct] = False
        first_B = self.logits(pct_BD).masked_fill(banned_BT, -torch.inf).argmax(1)
        value_B = self.bins(pct_BD).gather(1, first_B[:, None])[:, 0].clamp(0, views.N_BINS).round().long()
        first_BD = self.read_further(first_B, value_B, cache)
        banned_BT[:, self.pct] = True
        second_B = self.logits(first_BD).masked_fill(banned_BT, -torch.inf).argmax(1)
        state_BD = torch.where((second_B == END)[:, None], pct_BD, first_BD)
        return torch.where((first_B == END)[:, None], gene_BD, state_BD)

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D] of last states: <PCT>'s (pct), the mean over genes (mean), or those of words that the model says.

        `label_informed` is the state of the finest cell type, `released` that of `released_states`, a switch that
        repeats the released code. Both depend on the model's own annotation: cells of one predicted type lie together.
        """
        pooling = self.check_pooling(pooling)
        if pooling == "label_informed":
            return self.decode_types(inputs).states_BD
        if pooling == "released":
            return self.released_states(inputs)
        if pooling == "pct":
            return self.encode_last(inputs)
        return inputs["layout"].mean(self.encode(inputs), inputs["values"] > 0)

    def embed_genes(self) -> Tensor:
        """[V, D], the genes' word embeddings; zeros for genes that are no words."""
        known_V1 = (self.token_V >= 0).unsqueeze(1)
        return torch.where(known_V1, self.word_embedding.weight.detach()[self.token_V.clamp(min=0).long()].float(), 0)

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """The last states of gene words; each has seen the genes of higher token ids alone, as the mask is causal."""
        gene_M = (inputs["values"] > 0).nonzero().squeeze(1)
        genes_M = self.gene_T()[inputs["tokens"][gene_M].long()]
        return GeneStates(inputs["layout"].rows_N[gene_M], genes_M, self.encode(inputs).index_select(0, gene_M))

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """The visible genes as a sentence without metadata, to be continued; [B, Q] `asked`: the genes' tokens or -1.

        `largest` [B] is the log1p(CP10k) that the cell's bins end at. A cell without visible genes is read at <PCT>.
        """
        sentences = views.embed(cells, self.tokens, limit=self.n_tokens)
        inputs = self._read(sentences, np.maximum(np.diff(sentences.offsets) - 1, 1))
        inputs["asked"] = torch.from_numpy(self.tokens.gene_V[genes_BQ].astype(np.int64))
        inputs["largest"] = torch.from_numpy(views.largest_values(cells, self.tokens))
        return inputs

    def impute(self, inputs: Inputs) -> Imputed:
        """Values from the value head, detection as the log-probability of being said next.

        Of a gene that is no word the model has no opinion: it gets the means of the cell's values and log-probabilities
        over the model's genes (`n_known_genes` says how many those are).
        """
        h_BD = self.encode_last(inputs)
        genes = slice(1, 1 + self.n_gene_words)
        detection_BG = self.logits(h_BD).log_softmax(1)[:, genes]
        bins_BG = self.bins(h_BD)[:, genes].clamp(0.5, views.N_BINS)
        values_BG = (bins_BG - 0.5) / views.N_BINS * inputs["largest"].unsqueeze(1)  # a bin stands for its middle
        index_BQ, known_BQ = (inputs["asked"] - 1).clamp(min=0), inputs["asked"] >= 0
        return Imputed(
            torch.where(known_BQ, values_BG.gather(1, index_BQ), values_BG.mean(1, keepdim=True)),
            torch.where(known_BQ, detection_BG.gather(1, index_BQ), detection_BG.mean(1, keepdim=True)),
        )

    # --- trivial baseline ---------------------------------------------------------------------------------------------

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[4, T]: log frequency of each word among those that a task asks for (add-one smoothed), by task; mean value.

        Every gene of every training cell counts, whatever the task that the cell was drawn for.
        """
        counts_3T = np.zeros((3, self.n_tokens))
        genes = slice(1, 1 + self.n_gene_words)
        metadata = np.r_[genes.stop : self.pct]
        types = np.r_[self.type_words]
        counts_3T[views.GENERATE, genes] = counts_3T[views.ANNOTATE, types] = 1
        counts_3T[views.DESCRIBE, np.setdiff1d(metadata, types)] = 1
        counts_3T[:, END] = 1
        sums_T = np.zeros(self.n_tokens)
        for cells in batches:
            sentences = views.embed(cells, self.tokens, limit=self.n_tokens)
            counts_3T[views.GENERATE] += _counts(sentences.tokens[sentences.values > 0], self.n_tokens)
            sums_T += np.bincount(sentences.tokens, sentences.values, self.n_tokens)
            counts_3T[views.GENERATE, END] += (np.diff(sentences.offsets) <= self.sizes.max_length).sum()
            for task, words in zip((views.ANNOTATE, views.DESCRIBE), self._metadata(cells), strict=True):
                counts_3T[task] += _counts(words.tokens, self.n_tokens)
                counts_3T[task, END] += (np.diff(words.offsets) > 0).sum()
        seen_T = counts_3T[views.GENERATE, genes] - 1
        overall = sums_T.sum() / max(seen_T.sum(), 1)
        sums_T[genes] = np.where(seen_T > 0, sums_T[genes] / np.maximum(seen_T, 1), overall)
        with np.errstate(divide="ignore"):  # a word that a task never asks for has no probability
            log_3T = np.log(counts_3T / counts_3T.sum(1, keepdims=True))
        return torch.from_numpy(np.concatenate([log_3T, sums_T[None]])).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """Both terms when words are said by their frequency in the corpus, with their mean values."""
        asked, token_M = inputs["layout_asked"], inputs["next_tokens"].long()
        trivial = trivial.to(token_M.device)
        last = max(len(asked) - 1, 0)  # the row of unused slots, whose weight is zero
        task_M = inputs["task"][asked.rows_N.clamp(max=last)]
        one_M1 = torch.ones(len(token_M), 1, device=token_M.device)
        log_M1 = torch.where(asked.used_N, trivial[task_M, token_M], 0).unsqueeze(1)
        log_sum, error = over_answers(one_M1, log_M1, trivial[3][token_M].unsqueeze(1), inputs)
        return {"entity": LossTerm(-log_sum, inputs["n_asked"]), "value": LossTerm(error, inputs["n_asked"])}


def last_words(layout: Layout) -> Tensor:
    """int64 [B], the slot of each cell's last word; every cell has one."""
    return layout.starts_B + layout.lengths_B - 1


def _counts(tokens_N: np.ndarray, n_tokens: int) -> np.ndarray:
    return np.bincount(tokens_N, minlength=n_tokens)


MODEL = Scmulan
