"""Read-depth enhancement: how a depth is asked for, that it matters, and what a small trained model recovers."""

import numpy as np
import pytest
import torch
from cellmill.abilities.depth import enhance, target_counts
from cellmill.errors import CellmillError
from cellmill.models.base import total_loss
from cellmill.models.geneformer import Geneformer
from cellmill.models.scfoundation import Scfoundation
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import log1p_cp10k
from model_cells import make_batch, statistics_of_medians
from shard_cells import real_cells

N_GENES = 300
SIZES = Scfoundation.Sizes(
    **{"n_layers": 1, "width": 16, "n_heads": 1, "hidden": 32, "max_length": 66, "n_bins": 16, "dropout": 0.0},
    **{"decoder_layers": 1, "decoder_width": 16, "decoder_heads": 1, "decoder_hidden": 32},
)


@pytest.fixture(scope="module")
def pancreas(data):
    """Baron's cells with their 300 most often expressed genes; totals stay over all genes."""
    cells, _ = real_cells(data, "baron_h1")
    common = np.sort(np.argsort(-np.bincount(cells.genes), kind="stable")[:N_GENES])
    new_id = np.full(cells.genes.max() + 1, -1)
    new_id[common] = np.arange(N_GENES)
    kept = new_id[cells.genes] >= 0
    offsets = np.concatenate([[0], np.cumsum(kept)])[cells.offsets]
    return CellBatch(cells.joinids, offsets, new_id[cells.genes[kept]], cells.counts[kept], cells.totals)


@pytest.fixture(scope="module")
def trained(pancreas):
    torch.manual_seed(0)
    model = Scfoundation(SIZES, N_GENES)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(200):
        cells = pancreas.slice(8 * (step % 120), 8 * (step % 120) + 8)
        optimizer.zero_grad()
        total_loss(model(model.pretrain_inputs(cells, seed=0, step=step), step=step)).backward()
        optimizer.step()
    return model


def thinned(cells: CellBatch, share: float) -> CellBatch:
    """The cells with each molecule kept with probability `share`."""
    rng = np.random.default_rng(0)
    counts = rng.binomial(cells.counts, share)
    rest = cells.totals - np.add.reduceat(cells.counts, cells.offsets[:-1])
    kept = counts > 0
    offsets = np.concatenate([[0], np.cumsum(kept)])[cells.offsets]
    totals = np.add.reduceat(counts, cells.offsets[:-1]) + rng.binomial(rest, share)
    return CellBatch(cells.joinids, offsets, cells.genes[kept], counts[kept], totals)


def dense(cells: CellBatch) -> np.ndarray:
    """log1p(CP10k), [B, V]."""
    values_BV = np.zeros((len(cells), N_GENES), np.float32)
    values_BV[cells.cell_of, cells.genes] = log1p_cp10k(cells)
    return values_BV


def test_target_counts_by_hand():
    totals = np.array([100, 2500, 0])
    assert target_counts("t4.5", totals).tolist() == pytest.approx([10**4.5] * 3)
    assert target_counts("a1", totals).tolist() == [1000, 25_000, 10]
    assert target_counts("f2.5", totals).tolist() == [250, 6250, 2.5]
    assert target_counts(np.array([7, 8, 9]), totals).tolist() == [7, 8, 9]
    for wrong in ("", "x2", "t", "f", "2", "a1e9", "fnan", "f-1", "f0", "t13"):
        with pytest.raises(CellmillError, match="not understood|asks for less than 1 or more"):
            target_counts(wrong, totals)
    with pytest.raises(CellmillError, match=r"3 cells were given target counts of shape \(2,\)"):
        target_counts(np.array([1, 2]), totals)


def test_the_tokens_say_both_depths():
    model = Scfoundation(SIZES, N_GENES)
    cells = make_batch([{0: 1}], totals=[1500])
    values = model.embed_inputs(cells, target_counts("f1.3", cells.totals))["values"]
    assert values[:2].tolist() == pytest.approx([np.log10(1950), np.log10(1500)], rel=1e-6)


def test_batches_and_genes(trained, pancreas):
    cells = pancreas.slice(1000, 1009)
    whole = enhance(trained, cells, "f2", batch_size=4, progress=False)
    assert whole.shape == (9, N_GENES)
    assert whole.dtype == np.float32
    few = enhance(trained, cells, "f2", [5, 0], batch_size=9, progress=False)
    np.testing.assert_allclose(few, whole[:, [5, 0]], atol=2e-5)
    one = enhance(trained, cells.take([7]), "f2", progress=False)
    np.testing.assert_allclose(one[0], whole[7], atol=2e-5)
    assert trained.training
    own = target_counts("f2", cells.totals)
    assert np.array_equal(enhance(trained, cells, own, batch_size=4, progress=False), whole)


def test_both_depths_reach_every_gene(pancreas):
    """Of a network with wide random weights: one that was trained for seconds has not learnt to heed them."""
    torch.manual_seed(0)
    model = Scfoundation(SIZES, N_GENES).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = parameter.shape[1] ** -0.5 if "linear" in name or "attention" in name else 1
                parameter.copy_(scale * torch.randn(parameter.shape))
    cells = pancreas.slice(1000, 1004)
    own, deep = (enhance(model, cells, depth, progress=False) for depth in ("f1", "f4"))
    assert (np.abs(deep - own) > 5e-6).mean() > 0.9
    np.testing.assert_allclose(enhance(model, cells, "a0", progress=False), own, atol=1e-5)
    other = CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, cells.totals * 4)
    assert (np.abs(enhance(model, other, cells.totals * 4, progress=False) - deep) > 5e-6).mean() > 0.9


def test_thinned_cells_come_nearer_to_what_they_were(trained, pancreas):
    """Of cells that were not trained on, a tenth of the molecules is left."""
    cells = pancreas.slice(1000, 1100)
    few = thinned(cells, 0.1)
    enough = few.totals > 0
    truth, left = dense(cells)[enough], dense(few)[enough]
    asked = enhance(trained, few, cells.totals.astype(float), progress=False)[enough]
    error = np.square(asked - truth).mean()
    assert error < 0.7 * np.square(left - truth).mean()
    untrained = Scfoundation(SIZES, N_GENES)
    assert error < 0.5 * np.square(enhance(untrained, few, "a1", progress=False)[enough] - truth).mean()
    r = [np.corrcoef(guess.ravel(), truth.ravel())[0, 1] for guess in (asked, left)]
    assert r[0] > r[1]


def test_refusals(trained, pancreas):
    cells = pancreas.slice(0, 2)
    with pytest.raises(CellmillError, match="ids from 0 to 299"):
        enhance(trained, cells, "f1", [300])
    sizes = Geneformer.Sizes(version="V1", n_layers=1, width=8, n_heads=1, hidden=8, max_length=8)
    with pytest.raises(CellmillError, match="a Geneformer has no target depth"):
        enhance(Geneformer(sizes, 2, statistics_of_medians([1.0, 1.0])), cells, "f1")
