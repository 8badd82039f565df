"""What pretraining, embedding and the tasks ask of an architecture.

Legend: B cells, L tokens, D width, V genes in the vocabulary, E width of a cell's embedding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch


class LossTerm(NamedTuple):
    """One term of an objective: a sum over the predicted positions and their number, so that terms add over batches."""

    sum: Tensor
    count: Tensor


Inputs = dict[str, Tensor]
Losses = dict[str, LossTerm]


def total_loss(terms: Losses) -> Tensor:
    """The objective: the sum over terms of each term's mean (a term without positions adds zero)."""
    return sum(term.sum / term.count.clamp(min=1) for term in terms.values())


@dataclass(frozen=True, kw_only=True)
class GeneStatistics:
    """What an architecture may know of the corpus before training: see `cellmill.shards.statistics`.

    Every tensor is [V], over the training cells only; NaN where no training cell expresses the gene.
    """

    nonzero_cells: Tensor
    median_nonzero_cp10k: Tensor
    mean_log1p_cp10k: Tensor
    std_log1p_cp10k: Tensor


class CellModel(nn.Module):
    """Base of every architecture. A module ``cellmill/models/NAME.py`` sets ``MODEL`` to its subclass.

    A subclass is built from its sizes (a frozen dataclass), the number of genes and the corpus statistics. What it
    needs of the statistics it keeps as buffers, so that a checkpoint is complete without the corpus.
    """

    Sizes: ClassVar[type]
    """Frozen dataclass of the architecture's sizes; field metadata holds each one's description."""
    presets: ClassVar[dict[str, object]]
    """Sizes by name: the published ones and `demo`."""
    published_genes: ClassVar[dict[str, int]] = {}
    """Number of genes in the vocabulary that each published preset was trained with."""
    poolings: tuple[str, ...]
    """Ways to read a cell's embedding, the paper's own first; a class holds those of all its presets."""

    def __init__(self, sizes, n_genes: int, statistics: GeneStatistics | None = None):
        super().__init__()
        if statistics is not None and len(statistics.nonzero_cells) != n_genes:
            raise CellmillError(
                f"the gene statistics are of {len(statistics.nonzero_cells)} genes and the vocabulary has {n_genes}; "
                "compute the statistics from shards of the same vocabulary"
            )
        self.sizes = sizes
        self.n_genes = n_genes

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


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Move every tensor of `inputs` to `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
