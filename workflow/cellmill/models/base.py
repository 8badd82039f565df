"""What pretraining, embedding and the tasks ask of an architecture.

Legend: B cells, L tokens, D width, V genes in the vocabulary, E width of a cell's embedding, Q genes that a cell is
asked for, N gene tokens of all cells together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.models.packing import PACKED, Layout, Packing
from cellmill.shards.batch import CellBatch


class LossTerm(NamedTuple):
    """One term of an objective: a sum over the predicted positions and their number, so that terms add over batches."""

    sum: Tensor
    count: Tensor


Inputs = dict[str, Tensor | Layout]
Losses = dict[str, LossTerm]


def total_loss(terms: Losses) -> Tensor:
    """The objective: the sum over terms of each term's mean (a term without positions adds zero)."""
    return sum(term.sum / term.count.clamp(min=1) for term in terms.values())


class Imputed(NamedTuple):
    """What a model thinks of genes that it was not shown."""

    values_BQ: Tensor
    """float32 [B, Q], log1p(CP10k) of the gene if it is detected."""
    detection_BQ: Tensor
    """float32 [B, Q], the larger the likelier the gene is detected; in any unit, the same for all cells and genes."""


class GeneStates(NamedTuple):
    """The states of genes in the cells that express them."""

    cells_N: Tensor
    """int64 [N], row of the cell in the batch."""
    genes_N: Tensor
    """int64 [N], vocabulary ids."""
    states_ND: Tensor
    """float32 [N, D]."""


@dataclass(frozen=True, kw_only=True)
class GeneStatistics:
    """What an architecture may know of the corpus before training: see `cellmill.shards.statistics`.

    All is over the training cells only. Tensors of genes are [V], NaN where no training cell expresses the gene.
    """

    nonzero_cells: Tensor
    median_nonzero_cp10k: Tensor
    mean_log1p_cp10k: Tensor
    std_log1p_cp10k: Tensor
    median_genes: Tensor = field(default_factory=lambda: torch.tensor(torch.nan))
    """float32 [], the median number of genes that a cell expresses."""
    categories: dict[str, list[str]] = field(default_factory=dict)
    """The values of obs columns, sorted, without those that say nothing (unknown, na)."""


class CellModel(nn.Module):
    """Base of every architecture. A module ``cellmill/models/NAME.py`` sets ``MODEL`` to its subclass.

    A subclass is built from its sizes (a frozen dataclass), the number of genes and the corpus statistics. What it
    needs of the statistics it keeps as buffers, so that a checkpoint is complete without the corpus; `categories`, of
    the `obs_columns`, stand in the checkpoint's JSON and are given back to it.
    """

    Sizes: ClassVar[type]
    """Frozen dataclass of the architecture's sizes; field metadata holds each one's description."""
    presets: ClassVar[dict[str, object]]
    """Sizes by name: the published ones and `demo`."""
    published_genes: ClassVar[dict[str, int]] = {}
    """Number of genes in the vocabulary that each published preset was trained with."""
    published_categories: ClassVar[dict[str, dict[str, list[str]]]] = {}
    """Values of obs columns that a published preset was trained with, where it knows any."""
    obs_columns: ClassVar[tuple[str, ...]] = ()
    """obs columns whose values training learns from; their codes are then in ``cells.codes``."""
    impute_cells: ClassVar[int] = 64
    """Cells that `impute` takes at once at most, where more would need much memory."""
    released_totals: ClassVar[Literal["all", "known"]] = "all"
    """Whether totals, where a gene map is needed, are over all measured genes or the model's: `GeneMap.apply`."""
    poolings: tuple[str, ...]
    """Ways to read a cell's embedding, the paper's own first; a class holds those of all its presets."""

    def __init__(
        self,
        sizes,
        n_genes: int,
        statistics: GeneStatistics | None = None,
        categories: dict[str, list[str]] | None = None,
    ):
        super().__init__()
        if statistics is not None and len(statistics.nonzero_cells) != n_genes:
            raise CellmillError(
                f"the gene statistics are of {len(statistics.nonzero_cells)} genes and the vocabulary has {n_genes}; "
                "compute the statistics from shards of the same vocabulary"
            )
        self.sizes = sizes
        self.n_genes = n_genes
        self.packing: Packing = PACKED  # how views lay out tokens
        if categories is None:
            categories = statistics.categories if statistics else {}
        self.categories = {column: categories[column] for column in self.obs_columns if column in categories}

    # --- what training asks -------------------------------------------------------------------------------------------

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B], the tokens that each cell takes in training at most: what a micro batch is measured by."""
        raise NotImplementedError

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """The counts of the terms that `forward` will give for these inputs, without computing them.

        With them the objective of a step is the same however its cells are cut into micro batches and ranks.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The repeated layers: what is compiled, computed again in the backward pass, and spread over ranks."""
        return [layer for module in self.modules() if isinstance(module, nn.ModuleList) for layer in module]

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """Floating-point operations of the forward pass: 2 for every weight of the body that a token meets, and 4 D for
        every pair of a query and a key in every layer. Embeddings, the vocabulary's logits and norms do not count.
        """
        raise NotImplementedError

    # --- views and network --------------------------------------------------------------------------------------------

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """The view for training: model inputs and targets, every random choice keyed by (seed, step, joinid, gene).

        `step` is None in validation: choices then depend on the seed and the cell alone.
        """
        raise NotImplementedError

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """The view for reading embeddings: deterministic, each cell's inputs independent of the other cells'."""
        raise NotImplementedError

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """The objective's terms on `pretrain_inputs`."""
        raise NotImplementedError

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """float32 [B, E] from `embed_inputs`; `pooling` is one of `poolings`, by default the first."""
        raise NotImplementedError

    def check_pooling(self, pooling: str | None) -> str:
        """`pooling`, or the paper's own where it is None; `CellmillError` if this model has none of that name."""
        pooling = pooling or self.poolings[0]
        if pooling not in self.poolings:
            raise CellmillError(
                f"{type(self).__name__} has no pooling '{pooling}'; "
                f"set embedding.pooling to one of {', '.join(self.poolings)}"
            )
        return pooling

    def embed_genes(self) -> Tensor:
        """Static gene embeddings, float32 [V, D]."""
        raise NotImplementedError

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """Contextual gene embeddings from `embed_inputs`: the last states of the genes that each cell expresses."""
        raise NotImplementedError

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """The view for asking after genes that the cells do not show; deterministic, independent of other cells.

        Parameters
        ----------
        cells
            What is visible: the hidden genes stand in no array, and `totals` are those of the whole cells.
        genes_BQ
            int64 [B, Q], vocabulary ids to be asked for, none of them visible: hidden genes and true zeros alike.
        """
        raise NotImplementedError

    def impute(self, inputs: Inputs) -> Imputed:
        """What the model thinks of the genes of `impute_inputs`, by the output that its objective trained."""
        raise NotImplementedError

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """Statistics of the objective's trivial baseline (gene frequencies, gene means) over training cells."""
        raise NotImplementedError

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """The objective's terms, on the same positions, when the trivial baseline predicts."""
        raise NotImplementedError


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters, in all and without those of `nn.Embedding` modules (tied ones counted once)."""
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = {id(p): p.numel() for p in model.parameters()}
    return {
        "total": sum(sizes.values()),
        "without_embeddings": sum(n for key, n in sizes.items() if key not in embedding),
    }


def in_compute_dtype(x: Tensor) -> Tensor:
    """`x` in the type of matrix products where autocast is on, so that what flows between layers is half as wide."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Move every tensor and layout of `inputs` to `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
