"""Raw shuffled batches of the same real cells, one core: cellmill's loader against its peers, cold and warm.

All loaders serve the same cells and the same nonzeros: the training cells of one curated corpus of all real cells, with
every gene of the Census in its vocabulary. Each peer's store is written from those shards (tiledbsoma-ml reads the
Census itself), in the order of the joinids and uncompressed where that is faster, and each peer runs with the settings
that its documentation calls fast, several where it names several; the fastest of them is what we are held against.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from corpora import ORGANISM, real_census, real_corpus
from harness import COLD, Options, Row, at_least, child, disk, failure, last_core

SCDATASET = {
    "16/8": {"block": 16, "fetch": 8},  # block size and fetch factor of its README
    "16/256": {"block": 16, "fetch": 256},  # of its paper: about as mixed as a random order
    "64/256": {"block": 64, "fetch": 256},  # longer runs of neighbours, less mixed
}
SOMA = {"chunk": 64, "io_batch": 65536, "buffer_mb": 1024}
"""tiledbsoma-ml's defaults, and a buffer that holds an IO batch."""
PEERS = {
    **{f"scDataset h5ad {name}": ("scDataset h5ad", settings) for name, settings in SCDATASET.items()},
    **{f"scDataset zarr {name}": ("scDataset zarr", settings) for name, settings in SCDATASET.items()},
    "scDataset scdl 16/256": ("scDataset scdl", SCDATASET["16/256"]),
    "tiledbsoma-ml eager": ("tiledbsoma-ml", SOMA | {"eager": True}),
    "tiledbsoma-ml": ("tiledbsoma-ml", SOMA | {"eager": False}),  # on one core, threads have nothing to gain
    "bionemo-scdl": ("bionemo-scdl", {}),
}
MIXED = {
    "cellmill": ("cellmill", {}),
    **{f"scDataset {name}": ("scDataset h5ad", settings) for name, settings in SCDATASET.items()},
    "tiledbsoma-ml": PEERS["tiledbsoma-ml"],
    "bionemo-scdl": PEERS["bionemo-scdl"],
}
"""Ways to shuffle."""
AIM, PEER_TIMES = 100_000, 5
STORES = {
    "cellmill": "shards",
    "scDataset h5ad": "cells.h5ad",
    "scDataset zarr": "cells.zarr",
    "scDataset scdl": "scdl",
    "tiledbsoma-ml": "soma",
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
    folder = options.folder / "stores"
    write_stores(corpus, real_census(options), folder)
    rows, core = [], last_core()
    try:
        made = child("peers.py", "write scdl", {"folder": str(folder)}, python=options.peers)
        rows.append(Row("time to write bionemo-scdl's store", made["seconds"], "s", note="from h5ad"))
    except RuntimeError as error:
        rows.append(failure("bionemo-scdl's store", error))

    def run(loader: str, settings: dict, mode: str) -> dict:
        store = [str((folder / STORES.get(loader, "shards")).resolve())]
        given = {"folder": str(folder), "mode": mode, "seconds": options.seconds}
        python = sys.executable if loader in ("cellmill", "memory copy") else options.peers
        return child("peers.py", loader, given | {"settings": settings | {"store": store}}, python=python, core=core)

    for mode in ("warm", "cold"):
        ours, theirs = run("cellmill", {}, mode), {}
        for name, (loader, settings) in PEERS.items():
            try:
                theirs[name] = run(loader, settings, mode)
            except RuntimeError as error:
                rows.append(failure(f"{mode}: {name}", error))
        rows += speed_rows(mode, ours, theirs)
        if mode == "warm":
            rows.append(copy_row(ours, run("memory copy", {}, mode)))
    for name, (loader, settings) in MIXED.items():
        try:
            found = run(loader, settings, "mixing")
        except RuntimeError as error:
            rows.append(failure(f"entropy, {name}", error))
            continue
        for label, bits in found.items():
            rows.append(Row(f"entropy of {label}, {name}", bits["ours"], "bits", "random", bits["random"]))
    nonzeros = ours["nonzeros"] / ours["cells"] * len(np.load(folder / "joinids.npy"))
    for name, path in STORES.items():
        size = disk((folder / path).resolve())
        rows.append(Row(f"store of {name}", size / nonzeros, "bytes/nonzero", note=f"{size / 2**20:,.0f} MiB"))
    return rows


def copy_row(ours: dict, copied: dict) -> Row:
    """The limit: no loader that hands out int32 genes and counts is faster than copying them."""
    speed, limit = (epoch["cells"] / epoch["cpu"] for epoch in (ours, copied))
    note = "the same batches copied from memory to memory, 8 bytes a nonzero, one core"
    return Row("warm: raw batches by CPU time", speed, "cells/CPU s", "limit: copy", limit, note=note)


def speed_rows(mode: str, ours: dict, theirs: dict[str, dict]) -> list[Row]:
    """cellmill against each peer, its fastest one and the absolute aim."""
    cells, nonzeros = (ours[key] / ours["seconds"] for key in ("cells", "nonzeros"))
    by_cpu, per_cell = ours["cells"] / ours["cpu"], ours["nonzeros"] / ours["cells"]
    note = f"batches of 64 of {ours['cells']:,} cells, {per_cell:,.0f} nonzeros each; one core; "
    note += f"{COLD}; one epoch with opening" if mode == "cold" else f"median of {ours['epochs']} epochs"
    note += f"; peak {ours['peak_mb']:,.0f} MB"
    rows = []
    for name, other in theirs.items():
        if abs(other["nonzeros"] / other["cells"] / per_cell - 1) > 0.01:
            rows.append(failure(f"{mode}: {name}", ValueError("it served other nonzeros than cellmill")))
            continue
        about = f"by CPU time {by_cpu / (other['cells'] / other['cpu']):.2f} x; {other['epochs']} epochs; "
        about += f"{other['nonzeros'] / other['seconds']:,.0f} nonzeros/s; peak {other['peak_mb']:,.0f} MB"
        rows.append(Row(f"{mode}: raw batches", cells, "cells/s", name, other["cells"] / other["seconds"], note=about))
    peers = [row for row in rows if not row.failed]
    if peers:
        best = max(peers, key=lambda row: row.theirs)
        aim = at_least(PEER_TIMES, "ratio")
        rows.append(Row(f"{mode}: against the fastest", cells, "cells/s", best.peer, best.theirs, aim, best.note))
        rates = {row.peer: theirs[row.peer]["cells"] / theirs[row.peer]["cpu"] for row in peers}
        name = max(rates, key=rates.get)
        rows.append(
            Row(f"{mode}: against the fastest by CPU time", by_cpu, "cells/CPU s", name, rates[name], None, note)
        )
    return rows + [
        Row(f"{mode}: raw batches", cells, "cells/s", "aim", AIM, at_least(1, "ratio"), note),
        Row(f"{mode}: raw batches", nonzeros, "nonzeros/s", note=note),
    ]
