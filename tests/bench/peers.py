"""One measurement of one loader in a process of its own: ``python tests/bench/peers.py LOADER {...}``.

Runs in the environment with the peers; cellmill's own loader is measured by the same code, in cellmill's. Prints one
line of JSON. Every loader serves raw counts of shuffled batches as ragged rows (CSR), none makes them dense.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from harness import forget, measured

BATCH = 64
WARMING = 3
"""Batches by which code is compiled and imported before anything is measured."""


class Stream(NamedTuple):
    """One epoch of a loader."""

    batches: Iterator
    nonzeros: Callable[[object], int]
    """Of a batch."""
    rows: Callable[[object], np.ndarray] | None
    """Rows of the store (in the order of joinids) of a batch; None if the batch does not say, see `INDEXED`."""


def cellmill_loader(folder: Path, epoch: int, _: dict) -> Stream:
    from cellmill.shards.dataset import Shards
    from cellmill.shards.loader import Loader

    shards = Shards(folder / "shards")
    joinids = np.load(folder / "joinids.npy")

    def batches():
        with Loader(shards, "train", BATCH, seed=epoch) as loader:
            for _ in range(shards.n_cells("train") // BATCH):
                yield next(loader)

    return Stream(batches(), lambda cells: len(cells.genes), lambda cells: np.searchsorted(joinids, cells.joinids))


def _scdataset(collection, fetch, epoch: int, settings: dict) -> Stream:
    from scdataset import BlockShuffling, scDataset

    dataset = scDataset(
        collection,
        BlockShuffling(block_size=settings["block"]),
        batch_size=BATCH,
        fetch_factor=settings["fetch"],
        fetch_callback=fetch,
        seed=epoch,
    )
    return Stream(iter(dataset), lambda x: int(x.nnz), None)


def scdataset_h5ad(folder: Path, epoch: int, settings: dict) -> Stream:
    import anndata

    backed = anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    return _scdataset(backed, lambda adata, rows: adata.X[rows], epoch, settings)


def scdataset_zarr(folder: Path, epoch: int, settings: dict) -> Stream:
    import zarr
    from anndata.io import sparse_dataset

    x = Sized(sparse_dataset(zarr.open(folder / "cells.zarr", mode="r")["X"]))
    return _scdataset(x, lambda sized, rows: sized.x[rows], epoch, settings)


class Sized:
    """A sparse matrix on disk with the length that scDataset asks for."""

    def __init__(self, x):
        self.x = x

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows):
        return self.x[rows]


def tiledbsoma_ml(folder: Path, epoch: int, settings: dict) -> Stream:
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    joinids = np.load(folder / "joinids.npy")
    # 100 MiB is tiledbsoma's default buffer; a buffer that holds a whole IO batch spares incomplete reads
    context = tiledbsoma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": settings["buffer_mb"] * 2**20})
    experiment = tiledbsoma.Experiment.open(str((folder / "soma").resolve()), context=context)
    query = experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(coords=(joinids,)))
    dataset = ExperimentDataset(
        query,
        layer_name="raw",
        batch_size=BATCH,
        io_batch_size=settings["io_batch"],
        shuffle_chunk_size=settings["chunk"],
        seed=epoch,
        return_sparse_X=True,
        use_eager_fetch=settings["eager"],
    )
    return Stream(
        iter(dataset),
        lambda batch: int(batch[0].nnz),
        lambda batch: np.searchsorted(joinids, batch[1]["soma_joinid"].to_numpy()),
    )


def bionemo_scdl(folder: Path, epoch: int, _: dict) -> Stream:
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    dataset = SingleCellMemMapDataset(str(folder / "scdl"))
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(epoch),
        collate_fn=collate_sparse_matrix_batch,
    )
    return Stream(iter(loader), lambda x: x.values().numel(), None)


def scdataset_scdl(folder: Path, epoch: int, settings: dict) -> Stream:
    """scDataset over bionemo-scdl's arrays, a pair that scDataset's documentation names."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from scdataset import BlockShuffling, scDataset

    dataset = scDataset(
        SingleCellMemMapDataset(str(folder / "scdl")),
        BlockShuffling(block_size=settings["block"]),
        batch_size=BATCH,
        fetch_factor=settings["fetch"],
        fetch_callback=lambda scdl, rows: [scdl[row] for row in rows],
        batch_callback=lambda cells, rows: collate_sparse_matrix_batch([cells[row] for row in rows]),
        seed=epoch,
    )
    return Stream(iter(dataset), lambda x: x.values().numel(), None)


LOADERS = {
    "cellmill": cellmill_loader,
    "scDataset h5ad": scdataset_h5ad,
    "scDataset zarr": scdataset_zarr,
    "tiledbsoma-ml": tiledbsoma_ml,
    "bionemo-scdl": bionemo_scdl,
    "scDataset scdl": scdataset_scdl,
}


def epoch_of(loader: str, folder: Path, epoch: int, settings: dict, most: int | None = None) -> tuple[int, int]:
    """Serve one epoch (or its first `most` batches); returns cells and nonzeros."""
    stream = LOADERS[loader](folder, epoch, settings)
    batches = nonzeros = 0
    for batch in stream.batches:
        batches += 1
        nonzeros += stream.nonzeros(batch)
        if batches == most:
            break
    return batches, nonzeros


def speed(loader: str, folder: Path, settings: dict, mode: str, seconds: float) -> dict:
    """Cells and nonzeros of whole epochs, and the time they took.

    ``cold`` is one epoch, opening included, right after the page cache has forgotten the store; ``warm`` is as many
    epochs as `seconds` hold (at least one), after one that is not counted.
    """
    n_cells = len(np.load(folder / "joinids.npy"))
    epoch_of(loader, folder, 0, settings, most=WARMING)
    total = {"cells": 0, "nonzeros": 0}
    if mode == "cold":
        forget(*(Path(path) for path in settings["store"]))
    else:
        epoch_of(loader, folder, 1, settings)
    with measured() as figures:
        began = time.perf_counter()
        for epoch in range(2, 1000):
            batches, nonzeros = epoch_of(loader, folder, epoch, settings)
            total["cells"] += min(batches * BATCH, n_cells)
            total["nonzeros"] += nonzeros
            if mode == "cold" or time.perf_counter() - began >= seconds:
                break
    return total | figures


def mixing(loader: str, folder: Path, settings: dict) -> dict:
    """Mean entropy (bits) of data set and cell type per batch over one epoch, and of an ideal random order."""
    labels = np.load(folder / "labels.npz")
    n_cells = len(np.load(folder / "joinids.npy"))
    if loader == "bionemo-scdl":  # DataLoader(shuffle=True): a permutation of all cells
        order = np.random.default_rng(0).permutation(n_cells)
        batches = [order[start : start + BATCH] for start in range(0, n_cells, BATCH)]
    elif loader.startswith("scDataset"):  # the same strategy over the rows' own numbers
        batches = list(_scdataset(np.arange(n_cells), None, 2, settings).batches)
    else:
        stream = LOADERS[loader](folder, 2, settings)
        batches = [stream.rows(batch) for batch in stream.batches]
    batches = [batch for batch in batches if len(batch) == BATCH]
    ideal = np.random.default_rng(1).permutation(n_cells)[: n_cells // BATCH * BATCH].reshape(-1, BATCH)
    return {
        name: {"ours": mean_entropy(labels[name], batches), "ideal": mean_entropy(labels[name], ideal)}
        for name in labels
    }


def mean_entropy(label_of_row: np.ndarray, batches) -> float:
    """Mean Shannon entropy of a label over batches, in bits."""
    entropies = []
    for batch in batches:
        share = np.unique(label_of_row[batch], return_counts=True)[1] / len(batch)
        entropies.append(-(share * np.log2(share)).sum())
    return float(np.mean(entropies))


def write_scdl(folder: Path) -> dict:
    """The store of bionemo-scdl, made from the h5ad."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    with measured() as figures:
        SingleCellMemMapDataset(str(folder / "scdl"), str(folder / "cells.h5ad"), use_X_not_raw=True).save()
    return figures


def main(loader: str, given: str) -> dict:
    given = json.loads(given)
    folder = Path(given["folder"])
    if loader == "write scdl":
        return write_scdl(folder)
    if given["mode"] == "mixing":
        return mixing(loader, folder, given["settings"])
    return speed(loader, folder, given["settings"], given["mode"], given["seconds"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(*sys.argv[1:])))
