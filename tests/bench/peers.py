"""One measurement of one loader in a process of its own: ``python tests/bench/peers.py LOADER {...}``.

Runs in the environment with the peers; cellmill's own loader is measured by the same code, in cellmill's. Prints one
line of JSON. Every loader serves raw counts of shuffled batches as ragged rows (CSR), none makes them dense.
"""

import gc
import itertools
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
EPOCHS = 3
"""At least so many are measured."""


class Opened(NamedTuple):
    """A loader over a store."""

    epoch: Callable[[], Iterator]
    """The batches of the next epoch."""
    nonzeros: Callable[[object], int]
    """Of a batch."""
    rows: Callable[[object], np.ndarray] | None
    """Rows of the store (in the order of joinids) of a batch; None if it does not say, see `batches_of_rows`."""


def cellmill_loader(folder: Path, _: dict) -> Opened:
    from cellmill.shards.dataset import Shards
    from cellmill.shards.loader import Loader

    shards = Shards(folder / "shards")
    joinids = np.load(folder / "joinids.npy")
    loader = Loader(shards, "train", BATCH, seed=0)  # endless, and reads ahead into the next epoch
    batches = shards.n_cells("train") // BATCH
    return Opened(
        lambda: itertools.islice(loader, batches),
        lambda cells: len(cells.genes),
        lambda cells: np.searchsorted(joinids, cells.joinids),
    )


def memory_copy(folder: Path, _: dict) -> Opened:
    """No loader: the genes and counts of every batch copied, from memory to memory, in order."""
    from cellmill.shards.batch import CellBatch
    from cellmill.shards.dataset import Shards

    cells = CellBatch.concatenate(list(Shards(folder / "shards").batches("train", 4096)))
    edges = cells.offsets[: len(cells) // BATCH * BATCH + 1 : BATCH].tolist()
    return Opened(
        lambda: ((cells.genes[a:b].copy(), cells.counts[a:b].copy()) for a, b in itertools.pairwise(edges)),
        lambda batch: len(batch[0]),
        None,
    )


def _scdataset(collection, settings: dict, **callbacks):
    from scdataset import BlockShuffling, scDataset

    strategy = BlockShuffling(block_size=settings["block"])
    return scDataset(collection, strategy, BATCH, fetch_factor=settings["fetch"], seed=0, **callbacks)


def scdataset_h5ad(folder: Path, settings: dict) -> Opened:
    import anndata

    backed = anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    dataset = _scdataset(backed, settings, fetch_callback=lambda adata, rows: adata.X[rows])
    return Opened(lambda: iter(dataset), lambda x: int(x.nnz), None)


class Sized:
    """A sparse matrix on disk with the length that scDataset asks for."""

    def __init__(self, x):
        self.x = x

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows):
        return self.x[rows]


def scdataset_zarr(folder: Path, settings: dict) -> Opened:
    import zarr
    from anndata.io import sparse_dataset

    dataset = _scdataset(Sized(sparse_dataset(zarr.open(folder / "cells.zarr", mode="r")["X"])), settings)
    return Opened(lambda: iter(dataset), lambda x: int(x.nnz), None)


def tiledbsoma_ml(folder: Path, settings: dict) -> Opened:
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    joinids = np.load(folder / "joinids.npy")
    # a buffer that holds a whole IO batch spares incomplete reads
    context = tiledbsoma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": settings["buffer_mb"] * 2**20})
    experiment = tiledbsoma.Experiment.open(str((folder / "soma").resolve()), context=context)
    query = experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(coords=(joinids,)))
    dataset = ExperimentDataset(
        query,
        layer_name="raw",
        batch_size=BATCH,
        io_batch_size=settings["io_batch"],
        shuffle_chunk_size=settings["chunk"],
        seed=0,
        return_sparse_X=True,
        use_eager_fetch=settings["eager"],
    )
    return Opened(
        lambda: iter(dataset),
        lambda batch: int(batch[0].nnz),
        lambda batch: np.searchsorted(joinids, batch[1]["soma_joinid"].to_numpy()),
    )


def bionemo_scdl(folder: Path, _: dict) -> Opened:
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        SingleCellMemMapDataset(str(folder / "scdl")),
        batch_size=BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=collate_sparse_matrix_batch,
    )
    return Opened(lambda: iter(loader), lambda x: x.values().numel(), None)


def scdataset_scdl(folder: Path, settings: dict) -> Opened:
    """scDataset over bionemo-scdl's arrays, a pair that scDataset's documentation names."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    dataset = _scdataset(
        SingleCellMemMapDataset(str(folder / "scdl")),
        settings,
        fetch_callback=lambda scdl, rows: [scdl[row] for row in rows],
        batch_callback=lambda cells, rows: collate_sparse_matrix_batch([cells[row] for row in rows]),
    )
    return Opened(lambda: iter(dataset), lambda x: x.values().numel(), None)


LOADERS = {
    "cellmill": cellmill_loader,
    "memory copy": memory_copy,
    "scDataset h5ad": scdataset_h5ad,
    "scDataset zarr": scdataset_zarr,
    "scDataset scdl": scdataset_scdl,
    "tiledbsoma-ml": tiledbsoma_ml,
    "bionemo-scdl": bionemo_scdl,
}


def serve(opened: Opened, most: int | None = None) -> dict:
    """Serve one epoch, or its first `most` batches, and count."""
    batches = nonzeros = 0
    with measured() as figures:
        for batch in itertools.islice(opened.epoch(), most):
            batches += 1
            nonzeros += opened.nonzeros(batch)
    return figures | {"batches": batches, "nonzeros": nonzeros}


def speed(loader: str, folder: Path, settings: dict, mode: str, seconds: float) -> dict:
    """Cells, nonzeros and time of an epoch.

    ``cold`` is the first epoch, opening included, right after the page cache has forgotten the store. ``warm`` is the
    epoch of median time of as many as `seconds` hold (at least `EPOCHS`), after one that is not counted.
    """
    opened = LOADERS[loader](folder, settings)
    serve(opened, WARMING)
    if mode == "cold":
        del opened
        gc.collect()
        forget(*(Path(path) for path in settings["store"]))
        with measured() as figures:
            epoch = serve(LOADERS[loader](folder, settings)) | {"epochs": 1}
        epoch |= figures
    else:
        serve(opened)
        began, epochs = time.perf_counter(), []
        while len(epochs) < EPOCHS or time.perf_counter() - began < seconds:
            epochs.append(serve(opened))
        epochs.sort(key=lambda epoch: epoch["seconds"])
        epoch = epochs[len(epochs) // 2] | {"epochs": len(epochs)}
    return epoch | {"cells": min(epoch["batches"] * BATCH, len(np.load(folder / "joinids.npy")))}


def batches_of_rows(loader: str, folder: Path, settings: dict) -> list[np.ndarray]:
    """The rows of each whole batch of an epoch."""
    n_cells = len(np.load(folder / "joinids.npy"))
    if loader == "bionemo-scdl":  # DataLoader(shuffle=True) permutes all cells
        order = np.random.default_rng(0).permutation(n_cells)
        batches = [order[start : start + BATCH] for start in range(0, n_cells, BATCH)]
    elif loader.startswith("scDataset"):  # the same strategy over the rows' own numbers
        batches = list(_scdataset(np.arange(n_cells), settings))
    else:
        opened = LOADERS[loader](folder, settings)
        batches = [opened.rows(batch) for batch in opened.epoch()]
    return [batch for batch in batches if len(batch) == BATCH]


def mixing(loader: str, folder: Path, settings: dict) -> dict:
    """Mean entropy (bits) of data set and cell type per batch over one epoch, and of a random order of all cells."""
    labels, batches = np.load(folder / "labels.npz"), batches_of_rows(loader, folder, settings)
    n_cells = len(np.load(folder / "joinids.npy"))
    random = np.random.default_rng(1).permutation(n_cells)[: n_cells // BATCH * BATCH].reshape(-1, BATCH)
    return {
        name: {"ours": mean_entropy(labels[name], batches), "random": mean_entropy(labels[name], random)}
        for name in labels
    }


def mean_entropy(label_of_row: np.ndarray, batches) -> float:
    """Mean Shannon entropy of a label over batches of rows, in bits."""
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
