"""Raw shuffled batches of the same real cells, one core: cellmill's loader against its peers, cold and warm.

All loaders serve the same cells and the same nonzeros: the training cells of one curated corpus of all real cells, with
every gene of the Census in its vocabulary. Each peer's store is written from those shards (tiledbsoma-ml reads the
Census itself), in the order of the joinids and uncompressed where that is faster, and each peer runs with the settings
that its documentation calls fast, several where it names several; the fastest of them is what we are held against.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from corpora import ORGANISM, real_census, real_corpus
from harness import COLD, Options, Row, at_least, child, disk, failure, last_core

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
AIM, PEER_TIMES = 100_000, 5
STORES = {
    "cellmill": "shards",
    "tiledbsoma-ml": "soma",
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
    (folder / "soma").symlink_to((soma / "census_data" / ORGANISM).resolve(), target_is_directory=True)
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


def measure(options: Options) -> list[Row]:
    """Speed of every loader, cold and warm, and how well it mixes."""
    corpus = real_corpus(options)
    folder = corpus.parent / "stores"
    write_stores(corpus, real_census(options), folder)
    rows, core = [], last_core()
    try:
        made = child("peers.py", "write scdl", {"folder": str(folder)}, python=options.peers)
        rows.append(Row("time to write bionemo-scdl's store", made["seconds"], "s", note="from h5ad"))
    except RuntimeError as error:
        rows.append(failure("bionemo-scdl's store", error))
    n_cells = len(np.load(folder / "joinids.npy"))
    sizes = {name: disk((folder / path).resolve()) for name, path in STORES.items()}

    def run(loader: str, settings: dict, mode: str) -> dict:
        store = [str((folder / STORES[loader]).resolve())]
        given = {"folder": str(folder), "mode": mode, "seconds": options.seconds}
        python = sys.executable if loader == "cellmill" else options.peers
        return child("peers.py", loader, given | {"settings": settings | {"store": store}}, python=python, core=core)

    for mode in ("warm", "cold"):
        ours, theirs = run("cellmill", {}, mode), {}
        for loader, settings in ((loader, each) for loader, several in PEERS.items() for each in several):
            name = " ".join([loader, *(f"{key} {value}" for key, value in settings.items())])
            try:
                theirs[name] = run(loader, settings, mode)
            except RuntimeError as error:
                rows.append(failure(f"{mode}: {name}", error))
        rows += speed_rows(mode, ours, theirs, n_cells)
    for loader, settings in [("cellmill", {})] + [(loader, each) for loader in PEERS for each in PEERS[loader]]:
        rows += mixing_rows(loader, settings, run)
    nonzeros = ours["nonzeros"] / ours["cells"] * n_cells
    for name, size in sizes.items():
        rows.append(Row(f"store of {name}", size / nonzeros, "bytes/nonzero", note=f"{size / 2**20:,.0f} MiB"))
    return rows


def speed_rows(mode: str, ours: dict, theirs: dict[str, dict], n_cells: int) -> list[Row]:
    """cellmill against each peer, its fastest one and the absolute aim."""
    cells, nonzeros = (ours[key] / ours["seconds"] for key in ("cells", "nonzeros"))
    note = f"{n_cells:,} cells of {ours['nonzeros'] / ours['cells']:,.0f} nonzeros; one core; peak {ours['peak_mb']:,.0f} MB"
    note += f"; {COLD}, one epoch with opening" if mode == "cold" else ""
    rows = []
    for name, other in theirs.items():
        about = f"peak {other['peak_mb']:,.0f} MB, {other['nonzeros'] / other['seconds']:,.0f} nonzeros/s"
        if abs(other["nonzeros"] / other["cells"] / ours["nonzeros"] * ours["cells"] - 1) > 0.01:
            rows.append(failure(f"{mode}: {name}", ValueError("it served other nonzeros than cellmill")))
            continue
        rows.append(Row(f"{mode}: raw batches", cells, "cells/s", name, other["cells"] / other["seconds"], note=about))
    if rows and not all(row.failed for row in rows):
        best = max((row for row in rows if not row.failed), key=lambda row: row.theirs)
        aim = at_least(PEER_TIMES, "ratio")
        rows.append(Row(f"{mode}: against the fastest peer", cells, "cells/s", best.peer, best.theirs, aim, note))
    rows.append(Row(f"{mode}: raw batches", cells, "cells/s", "aim", AIM, at_least(1, "ratio"), note))
    rows.append(Row(f"{mode}: raw batches", nonzeros, "nonzeros/s", note=note))
    rows.append(Row(f"{mode}: raw batches, by CPU time", ours["cells"] / ours["cpu"], "cells/CPU s", note=note))
    return rows


def mixing_rows(loader: str, settings: dict, run) -> list[Row]:
    """Entropy of data set and cell type per batch against that of a random order."""
    name = " ".join([loader, *(f"{key} {value}" for key, value in settings.items())])
    try:
        found = run(loader, settings, "mixing")
    except RuntimeError as error:
        return [failure(f"entropy: {name}", error)]
    return [
        Row(f"entropy of {label}, {name}", bits["ours"], "bits", "random", bits["ideal"])
        for label, bits in found.items()
    ]
