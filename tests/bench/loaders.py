"""Raw shuffled batches of the same real cells, one core: cellmill's loader against its peers, cold and warm.

All loaders serve the same cells and the same nonzeros: the training cells of one curated corpus of all real cells, with
every gene of the Census in its vocabulary. Each peer's store is written from those shards (tiledbsoma-ml reads the
Census itself), in the order of the joinids and uncompressed where that is faster, and each peer runs with the settings
that its documentation calls fast, several where it names several; the fastest of them is what we are held against.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from harness import COLD, Options, Row, at_least, child, disk, failure, last_core

ORGANISM = "homo_sapiens"
SCDATASET = (
    {"block": 16, "fetch": 8},  # its README
    {"block": 16, "fetch": 256},  # its paper: about as mixed as a random order
    {"block": 64, "fetch": 256},  # longer runs of neighbours, quicker and less mixed
)
PEERS = {
    "scDataset h5ad": SCDATASET,
    "scDataset zarr": SCDATASET,
    "scDataset scdl": SCDATASET[1:2],
    "tiledbsoma-ml": (
        {"chunk": 64, "io_batch": 65536, "eager": True, "buffer_mb": 1024},  # its defaults, in a large buffer
        {"chunk": 64, "io_batch": 65536, "eager": False, "buffer_mb": 1024},  # no threads to feed on one core
    ),
    "bionemo-scdl": ({},),
}
STORES = {
    "cellmill": "shards",
    "scDataset h5ad": "cells.h5ad",
    "scDataset zarr": "cells.zarr",
    "scDataset scdl": "scdl",
    "bionemo-scdl": "scdl",
}
ZARR_CHUNK = 2**20
"""Nonzeros of a chunk of the zarr store; with 2**14 to 2**22, compressed or not, this and no compression is fastest."""


def write_stores(shards_folder: Path, soma: Path, folder: Path) -> None:
    """The training cells of shards as h5ad and zarr, their joinids and labels, and where the Census is."""
    import anndata
    import pandas as pd
    import zarr
    from cellmill.shards.batch import CellBatch
    from cellmill.shards.dataset import Shards

    shards = Shards(shards_folder)
    cells = CellBatch.concatenate(list(shards.batches("train", 4096)))
    obs = shards.obs("train")
    order = np.argsort(cells.joinids)
    cells, obs = cells.take(order), obs.take(order)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "shards").symlink_to(shards_folder.resolve(), target_is_directory=True)
    (folder / "soma.json").write_text(json.dumps({"soma": str(soma), "organism": ORGANISM}))
    np.save(folder / "joinids.npy", cells.joinids)
    labels = {name: np.unique(obs[name].to_pylist(), return_inverse=True)[1] for name in ("dataset_id", "cell_type")}
    np.savez(folder / "labels.npz", **labels)
    matrix = sp.csr_matrix(
        (cells.counts.astype(np.float32), cells.genes.astype(np.int32), cells.offsets),
        shape=(len(cells), shards.n_genes),
    )
    adata = anndata.AnnData(
        matrix,
        obs=pd.DataFrame(index=[f"cell{joinid}" for joinid in cells.joinids]),
        var=pd.DataFrame(index=[f"gene{gene}" for gene in range(shards.n_genes)]),
    )
    adata.write_h5ad(folder / "cells.h5ad")
    group = zarr.open_group(folder / "cells.zarr", mode="w", zarr_format=3)
    anndata.io.write_elem(group, "X", matrix, dataset_kwargs={"chunks": (ZARR_CHUNK,), "compressors": None})
