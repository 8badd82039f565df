"""Bag of genes: the control without attention. A cell is the value-weighted sum of its genes' embeddings.

Ours; the question that it answers is whether attention pays. A gene's weight is its log1p(CP10k), by the length of the
cell's vector of them; so the untrained network is a random projection of the cell's normalised profile, itself a strong
control. The sum, normalised, and a nonlinearity make the cell's state; an MLP and a narrow bottleneck predict from it,
as one multinomial distribution over all genes (as in scVI's relatives and topic models), the cell's raw counts.

Two terms are trained. ``multinomial``: the whole cell's counts, from what is left of a thinned cell with hidden genes.
``contrast``: two such views of one cell find each other among those of the batch by the cosine of their bottlenecks
(InfoNCE; van den Oord et al., arXiv:1807.03748). It depends on the other cells of the forward pass, so it is a matter
of training alone: validation, where a cell's loss must not depend on its batch, has the multinomial term only. So does
it depend on how a step's cells are cut into micro batches and ranks, as no other term of any architecture does: a cell
is told from those of its own micro batch. `Bag.token_lengths` is small, so that a usual batch is not cut.

Legend: B cells, R views of them (2 B in training, else B), D width, Z width of the bottleneck, V genes, M visible genes
of all views, N nonzeros of all cells, Q genes asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cellmill.models.base import CellModel, GeneStates, GeneStatistics, Imputed, Inputs, Losses, LossTerm
from cellmill.shards.batch import CellBatch
from cellmill.views import bag as views
from cellmill.views.ragged import spread, sum_within

UNSEEN_CP10K = 1e-3
"""Added to a gene's mean CP10k where the output starts, so that an unseen gene has a logarithm."""
OUTPUT_STD = 0.02
TOKEN_LOGITS = 4096
"""Logits that count as one token of a micro batch: about what a token takes in a transformer of size tiny."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a bag of genes."""

    width: int = field(metadata={"description": "Width of genes and of a cell's state.", "ge": 1})
    n_layers: int = field(metadata={"description": "Residual layers of the MLP.", "ge": 1})
    hidden: int = field(metadata={"description": "Width within a layer.", "ge": 1})
    bottleneck: int = field(metadata={"description": "Width of what the counts are predicted from.", "ge": 1})
    min_share: float = field(
        default=0.1, metadata={"description": "Smallest share of its molecules that a cell keeps.", "gt": 0, "le": 1}
    )
    max_hidden: float = field(
        default=0.5, metadata={"description": "Largest share of its genes that a cell hides.", "ge": 0, "lt": 1}
    )
    temperature: float = field(
        default=0.1, metadata={"description": "The contrast's cosines are divided by this.", "gt": 0}
    )
    contrast_weight: float = field(default=1.0, metadata={"description": "Weight of the contrast; 0: none.", "ge": 0})


class Layer(nn.Module):
    """One pre-norm residual layer of the MLP, with GELU."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.width)
        self.intermediate = nn.Linear(sizes.width, sizes.hidden)
        self.output = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D]."""
        return x_RD + self.output(F.gelu(self.intermediate(self.norm(x_RD))))


class Bag(CellModel):
    """Bag of genes.

    Parameters
    ----------
    sizes
        See `Sizes`.
    n_genes
        V.
    statistics
        The output's biases start as the logarithms of the genes' mean expression; None starts them at zero.
    """

    Sizes = Sizes
    presets: ClassVar[dict[str, Sizes]] = {
        "demo": Sizes(width=256, n_layers=1, hidden=256, bottleneck=32),
        "tiny": Sizes(width=512, n_layers=2, hidden=480, bottleneck=64),
        "small": Sizes(width=1024, n_layers=4, hidden=1200, bottleneck=128),
        "base": Sizes(width=2048, n_layers=6, hidden=2048, bottleneck=256),
    }
    poolings = ("state", "trunk", "bottleneck")

    def __init__(self, sizes: Sizes, n_genes: int, statistics: GeneStatistics | None = None, categories=None):
        super().__init__(sizes, n_genes, statistics, categories)
        self.gene_embedding = nn.Embedding(n_genes, sizes.width)
        self.state_norm = nn.LayerNorm(sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.bottleneck = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.bottleneck))
        self.output_embedding = nn.Embedding(n_genes, sizes.bottleneck)
        nn.init.normal_(self.output_embedding.weight, std=OUTPUT_STD)
        self.output_bias = nn.Parameter(torch.zeros(n_genes))
        if statistics is not None:
            mean_V = torch.nan_to_num(statistics.mean_log1p_cp10k, nan=0.0).expm1()
            self.output_bias.data = (mean_V + UNSEEN_CP10K).log().float()

    def token_lengths(self, cells: CellBatch) -> np.ndarray:
        """int64 [B], the same for all cells: memory follows the logits of a cell's two views, not its genes.

        At the usual 16,384 tokens a micro batch holds 1,638 cells of 20,000 genes.
        """
        return np.full(len(cells), 2 * -(-self.n_genes // TOKEN_LOGITS))

    def pretrain_inputs(self, cells: CellBatch, *, seed: int, step: int | None) -> Inputs:
        """Two thinned views of each cell, all first ones in front (in validation one), and the counts to predict.

        ``genes`` and ``weights`` [M], ``starts`` [R]: see `_bags`; ``targets`` [N], places in a flat [B V], and
        ``shares`` [N], the count by the cell's counts; ``filled`` bool [B], whether the cell has any.
        """
        n_views = 1 if step is None else 2
        sizes = {"min_share": self.sizes.min_share, "max_hidden": self.sizes.max_hidden}
        seen = [views.pretrain(cells, **sizes, view=view, seed=seed, step=step) for view in range(n_views)]
        cells_N = cells.cell_of
        total_B = sum_within(cells.offsets, cells.counts)
        return _bags(seen) | {
            "targets": torch.from_numpy(cells_N * self.n_genes + cells.genes),
            "shares": torch.from_numpy((cells.counts / spread(total_B, cells.offsets)).astype(np.float32)),
            "filled": torch.from_numpy(total_B > 0),
        }

    def embed_inputs(self, cells: CellBatch) -> Inputs:
        """The whole cells: see `_bags`."""
        return _bags([views.embed(cells)])

    def state(self, inputs: Inputs) -> Tensor:
        """[R, D], the normalised sum of weighted gene embeddings after the nonlinearity; zero for an empty cell."""
        sum_RD = F.embedding_bag(
            inputs["genes"],
            self.gene_embedding.weight,
            inputs["starts"],
            mode="sum",
            per_sample_weights=inputs["weights"],
        )
        return F.gelu(self.state_norm(sum_RD))

    def trunk(self, inputs: Inputs) -> Tensor:
        """[R, D], the state after the MLP."""
        x_RD = self.state(inputs)
        for layer in self.layers:
            x_RD = layer(x_RD)
        return x_RD

    def _logits(self, z_RZ: Tensor) -> Tensor:
        """float32 [R, V]; never in bfloat16, which would round the biases of rare genes, near -7, to 1/32."""
        with torch.autocast(z_RZ.device.type, enabled=False):
            return F.linear(z_RZ.float(), self.output_embedding.weight, self.output_bias)

    def forward(self, inputs: Inputs, *, step: int | None = None) -> Losses:
        """`multinomial`: nats per count of the whole cell, each view alike; in training `contrast`, weighted."""
        z_RZ = self.bottleneck(self.trunk(inputs))
        logits_RV = self._logits(z_RZ)
        counts = self.loss_counts(inputs, step=step)
        n_cells = len(inputs["filled"])
        n_views = len(z_RZ) // max(n_cells, 1)
        norm = (logits_RV.logsumexp(1).view(n_views, n_cells) * inputs["filled"]).sum()
        picked = (
            logits_RV.view(n_views, n_cells * self.n_genes).index_select(1, inputs["targets"]) * inputs["shares"]
        ).sum()
        terms = {"multinomial": LossTerm(norm - picked, counts["multinomial"])}
        if "contrast" in counts:
            terms["contrast"] = LossTerm(self._contrast(z_RZ.float()), counts["contrast"])
        return terms

    def loss_counts(self, inputs: Inputs, *, step: int | None = None) -> dict[str, Tensor]:
        """`multinomial`: views of cells that have counts; `contrast`: views."""
        filled_B, n_all = inputs["filled"], len(inputs["starts"])
        n_views = n_all // max(len(filled_B), 1)
        counts = {"multinomial": n_views * filled_B.sum()}
        if n_views == 2 and self.sizes.contrast_weight > 0:
            counts["contrast"] = torch.full((), n_all, device=filled_B.device)
        return counts

    def body_flops(self, inputs: Inputs, *, step: int | None = None) -> float:
        """See `CellModel.body_flops`: the MLP and the bottleneck, which a view passes as one token."""
        sizes = self.sizes
        weights = sizes.width * (2 * sizes.hidden * sizes.n_layers + sizes.bottleneck)
        return 2.0 * weights * len(inputs["starts"])

    def _contrast(self, z_RZ: Tensor) -> Tensor:
        """Each view names the other view of its cell among those of all cells (nats), in both directions: weighted."""
        one_BZ, other_BZ = F.normalize(z_RZ, dim=1).chunk(2)
        logits_BB = one_BZ @ other_BZ.T / self.sizes.temperature
        own_B = torch.arange(len(logits_BB), device=logits_BB.device)
        total = F.cross_entropy(logits_BB, own_B, reduction="sum") + F.cross_entropy(
            logits_BB.T, own_B, reduction="sum"
        )
        return self.sizes.contrast_weight * total

    def embed_cells(self, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """[B, D], the state of the bag ("state") or after the MLP ("trunk"), or [B, Z], the bottleneck."""
        pooling = self.check_pooling(pooling)
        if pooling == "state":
            return self.state(inputs).float()
        x_BD = self.trunk(inputs)
        return (x_BD if pooling == "trunk" else self.bottleneck(x_BD)).float()

    def embed_genes(self) -> Tensor:
        """[V, D], the embeddings that the bag sums."""
        return self.gene_embedding.weight.detach().float().clone()

    def gene_states(self, inputs: Inputs) -> GeneStates:
        """Weight times embedding. No gene sees another here: the context is the gene's own value, and no more."""
        genes_M, starts_B = inputs["genes"], inputs["starts"]
        ends_B = torch.cat([starts_B[1:], starts_B.new_tensor([len(genes_M)])])
        cells_B = torch.arange(len(starts_B), device=starts_B.device)
        states_MD = inputs["weights"][:, None] * self.gene_embedding(genes_M)
        return GeneStates(cells_B.repeat_interleave(ends_B - starts_B), genes_M, states_MD.float())

    def impute_inputs(self, cells: CellBatch, genes_BQ: np.ndarray) -> Inputs:
        """The visible genes, as in `_bags`, ``asked`` [B, Q] and ``totals`` [B], of the whole cells."""
        return _bags([views.embed(cells)]) | {
            "asked": torch.from_numpy(np.asarray(genes_BQ, dtype=np.int64)),
            "totals": torch.from_numpy(np.maximum(cells.totals, 1).astype(np.float32)),
        }

    def impute(self, inputs: Inputs) -> Imputed:
        """From the gene's expected count, its share times the cell's total.

        The value is log1p of the CP10k of the count that is expected if there is one at all: the mean of a Poisson
        number that is not zero. The detection is the logarithm of the expected count.
        """
        total_B1 = inputs["totals"][:, None]
        log_share_BV = self._logits(self.bottleneck(self.trunk(inputs))).log_softmax(1)
        log_count_BQ = log_share_BV.gather(1, inputs["asked"]) + total_B1.log()
        count_BQ = log_count_BQ.exp().clamp(min=1e-6)
        detected_BQ = count_BQ / -torch.expm1(-count_BQ)
        return Imputed(torch.log1p(detected_BQ / total_B1 * 1e4), log_count_BQ)

    def fit_trivial(self, batches: Iterable[CellBatch]) -> Tensor:
        """[V], log of the mean over cells of each gene's share of the counts; one more cell has all genes alike."""
        share_V, n_cells = np.full(self.n_genes, 1 / self.n_genes), 1
        for cells in batches:
            total_B = sum_within(cells.offsets, cells.counts)
            share_V += np.bincount(cells.genes, cells.counts / spread(total_B, cells.offsets), self.n_genes)
            n_cells += np.count_nonzero(total_B)
        return torch.from_numpy(np.log(share_V / n_cells)).float()

    def trivial_losses(self, inputs: Inputs, trivial: Tensor) -> Losses:
        """`multinomial` when the corpus's gene frequencies are predicted for every cell."""
        log_share_N = trivial.to(inputs["targets"].device)[inputs["targets"] % self.n_genes]
        return {"multinomial": LossTerm(-(log_share_N * inputs["shares"]).sum(), inputs["filled"].sum())}


def _bags(seen: list[views.Weights]) -> Inputs:
    """Views one after the other: ``genes`` int64 [M], ``weights`` float32 [M], ``starts`` int64 [R] of each one's."""
    n_before = np.cumsum([0, *(len(view.weights) for view in seen)])
    starts = [view.genes.offsets[:-1] + n for view, n in zip(seen, n_before[:-1], strict=True)]
    return {
        "genes": torch.from_numpy(np.concatenate([view.genes.genes for view in seen]).astype(np.int64)),
        "weights": torch.from_numpy(np.concatenate([view.weights for view in seen])),
        "starts": torch.from_numpy(np.concatenate(starts)),
    }


MODEL = Bag
