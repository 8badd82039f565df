"""Cells for the tests of views and models: hand-made ones, and real ones with their gene statistics."""

import numpy as np
import torch
from cellmill.models.base import GeneStatistics, total_loss
from cellmill.shards.batch import CellBatch


def make_batch(cells: list[dict[int, int]], totals: list[int] | None = None) -> CellBatch:
    """A batch from one {gene: count} for each cell; the joinids are 100, 101, ..."""
    cells = [dict(sorted(cell.items())) for cell in cells]
    return CellBatch(
        joinids=np.arange(100, 100 + len(cells)),
        offsets=np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int64),
        genes=np.array([gene for cell in cells for gene in cell], dtype=np.int64),
        counts=np.array([count for cell in cells for count in cell.values()], dtype=np.int64),
        totals=np.array(totals if totals else [sum(cell.values()) for cell in cells], dtype=np.int64),
    )


def statistics_of_medians(medians) -> GeneStatistics:
    """Statistics in which only the medians are set."""
    medians = torch.as_tensor(medians, dtype=torch.float32)
    rest = torch.full_like(medians, torch.nan)
    return GeneStatistics(
        nonzero_cells=torch.isfinite(medians).long(),
        median_nonzero_cp10k=medians,
        mean_log1p_cp10k=rest,
        std_log1p_cp10k=rest,
    )


def real_statistics(cells: CellBatch, n_genes: int) -> GeneStatistics:
    """Exact statistics of `cells`, without categories."""
    cp10k = cells.counts / cells.totals[cells.cell_of] * 1e4
    log1p = np.log1p(cp10k)
    nonzero = np.bincount(cells.genes, minlength=n_genes)
    mean = np.bincount(cells.genes, log1p, n_genes) / len(cells)
    square = np.bincount(cells.genes, log1p**2, n_genes) / len(cells)
    medians = np.full(n_genes, np.nan)
    order = np.argsort(cells.genes, kind="stable")
    genes, starts = np.unique(cells.genes[order], return_index=True)
    for gene, values in zip(genes, np.split(cp10k[order], starts[1:]), strict=True):
        medians[gene] = np.median(values)
    seen = np.where(nonzero, 1.0, np.nan)
    return GeneStatistics(
        nonzero_cells=torch.from_numpy(nonzero),
        median_nonzero_cp10k=torch.from_numpy(medians).float(),
        mean_log1p_cp10k=torch.from_numpy(mean * seen).float(),
        std_log1p_cp10k=torch.from_numpy(np.sqrt(np.maximum(square - mean**2, 0)) * seen).float(),
        median_genes=torch.tensor(np.median(cells.lengths), dtype=torch.float32),
    )


def assert_cells_are_independent(model, cells: CellBatch, n_checked: int) -> None:
    """Loss and embedding of a cell are the same alone and beside the other cells, however long those are."""
    model.eval()
    with torch.inference_mode():
        together = model.embed_cells(model.embed_inputs(cells))
        reverse = model.embed_cells(model.embed_inputs(cells.take(np.arange(len(cells))[::-1])))
        torch.testing.assert_close(together, reverse.flip(0), atol=1e-5, rtol=1e-5)
        assert together.dtype == torch.float32
        assert together.isfinite().all()
        sums, counts = {}, {}
        for row in range(n_checked):
            cell = cells.take([row])
            alone = model.embed_cells(model.embed_inputs(cell))
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
            for name, term in model(model.pretrain_inputs(cell, seed=1, step=None)).items():
                sums[name] = sums.get(name, 0) + term.sum.double()
                counts[name] = counts.get(name, 0) + term.count
        beside = model(model.pretrain_inputs(cells.take(np.arange(n_checked)), seed=1, step=None))
        assert beside.keys() == sums.keys()
        for name, term in beside.items():
            assert term.count == counts[name] > 0
            torch.testing.assert_close(term.sum.double(), sums[name], atol=0, rtol=1e-5)


def train(model, cells: CellBatch, steps: int, learning_rate: float) -> float:
    """A few plain steps on all of `cells`; the validation loss of the same cells afterwards."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        total_loss(model(model.pretrain_inputs(cells, seed=0, step=step), step=step)).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        return total_loss(model(model.pretrain_inputs(cells, seed=0, step=None))).item()
