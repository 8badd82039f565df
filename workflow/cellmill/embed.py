"""Cell embeddings of a trained model, and the files that hold them."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cellmill.device import arithmetic, best_device
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import TOKENS
from cellmill.files import atomic, sha256
from cellmill.gene_map import GeneMap
from cellmill.models.base import CellModel, to_device
from cellmill.progress import Progress
from cellmill.shards.dataset import Shards
from cellmill.shards.reader import read_obs
from cellmill.training.micro_batches import cut

BATCHES_SORTED_TOGETHER = 32


def embed_shards(
    model: CellModel,
    shards: Shards,
    split: str,
    batch_size: int,
    pooling: str | None = None,
    progress: bool = True,
    gene_map: GeneMap | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> np.ndarray:
    """Embed every cell of a split, in evaluation mode.

    Cells of similar length go into one forward pass, and at most `TOKENS` tokens, so that its memory is bounded; a
    cell's embedding depends on neither, but for rounding.

    Parameters
    ----------
    model
        Moved to `cellmill.device.best_device`; its mode is left as it was.
    shards, split
        The cells, with the vocabulary that the model was trained on (``shards.check_vocabulary``), or any with a
        `gene_map`.
    batch_size
        Cells per forward pass at most.
    pooling
        One of the architecture's poolings; by default its paper's own.
    progress
        False keeps silent.
    gene_map
        From the genes of the shards to those of the model, if it has a vocabulary of its own.
    precision
        Arithmetic of the forward pass; what is returned is float32.

    Returns
    -------
    np.ndarray
        float32 [cells, E], in the order of the shards.

    Raises
    ------
    CellmillError
        If the numbers of genes differ, the split has no cells, an embedding is not finite, or the GPU has no bfloat16.
    """
    if gene_map is None and shards.n_genes != model.n_genes:
        raise CellmillError(
            f"{shards.folder} has {shards.n_genes} genes and the model {model.n_genes}; "
            "shard the cells with the vocabulary that the model was trained on"
        )
    n_cells = shards.n_cells(split)
    if n_cells == 0:
        raise CellmillError(f"split '{split}' of {shards.folder} has no cells to embed; loosen its filter or quality")
    device = best_device()
    was_training = model.training
    model.to(device).eval()
    chunks = []
    bar = Progress(f"embedding {shards.folder.name}", n_cells, show=progress)
    with torch.inference_mode(), arithmetic(precision, device, "embedding.precision"), bar:
        n_done = 0
        for chunk in shards.batches(split, batch_size * BATCHES_SORTED_TOGETHER):
            order = np.argsort(-chunk.lengths, kind="stable")
            parts, rows = [], []
            if gene_map:
                chunk = gene_map.apply(chunk, model.released_totals)
            for i in range(0, len(chunk), batch_size):
                some = order[i : i + batch_size]
                for few in cut(model.token_lengths(chunk.take(some)), TOKENS):
                    rows.append(some[few])
                    inputs = model.embed_inputs(chunk.take(rows[-1]))
                    parts.append(model.embed_cells(to_device(inputs, device), pooling).float())
                n_done += min(batch_size, len(chunk) - i)
                bar.update(n_done)
            x_BE = torch.cat(parts).cpu().numpy()
            chunks.append(x_BE[np.argsort(np.concatenate(rows), kind="stable")])
            _check_finite(chunks[-1], chunk.joinids, shards.folder)
    model.train(was_training)
    return np.concatenate(chunks)


def _check_finite(x_BE: np.ndarray, joinids: np.ndarray, folder: Path) -> None:
    bad_B = ~np.isfinite(x_BE).all(axis=1)
    if bad_B.any():
        raise CellmillError(
            f"{folder}: the embeddings of {bad_B.sum()} cells are not finite, the first is soma_joinid "
            f"{joinids[bad_B][0]}; the model has diverged, train it again with a lower training.learning_rate"
        )


def seen(
    trained_on: list[str] | None,
    shards: Shards,
    split: str = "all",
    *,
    primary_only: bool = True,
    corpus: Shards | None = None,
) -> str:
    """Whether cells of a split entered a model's pretraining: "yes" if one of them did, else "no".

    Where only the data sets of the corpus are known, one in common counts as "yes". A cell may stand in several data
    sets, but is primary in one of them at most. Where corpus and split do not both keep primary cells only, copies of a
    cell may be in either, and the answer is "unknown".

    Parameters
    ----------
    trained_on
        dataset_id of every data set of the corpus (``checkpoint.json``, ``datasets``); None if nobody knows.
    shards, split
        The cells to be embedded.
    primary_only
        Whether the corpus holds primary cells only.
    corpus
        The corpus, of the same Census as `shards`, if it is at hand: then cells are compared, so that one without some
        donors of a data set has not seen those donors.
    """
    if trained_on is None:
        return "unknown"
    if not shards.datasets(split).isdisjoint(trained_on) and (corpus is None or _any_common(corpus, shards, split)):
        return "yes"
    return "no" if not trained_on or (primary_only and shards.primary_only) else "unknown"


def _any_common(corpus: Shards, shards: Shards, split: str) -> bool:
    """Whether a cell of `split` is in the corpus; one file of the corpus is in memory at a time."""
    joinids = shards.obs(split, ["soma_joinid"])["soma_joinid"].to_numpy()
    paths = dict.fromkeys(group.path for part in corpus.splits for group in corpus.row_groups(part))
    return any(np.isin(read_obs(path, ["soma_joinid"])["soma_joinid"].to_numpy(), joinids).any() for path in paths)


def embed_and_write(
    path: Path,
    embed: Callable[[], np.ndarray],
    shards: Shards,
    *,
    model: str,
    kind: str,
    seed: int,
    trained_on: list[str] | None,
    primary_only: bool = True,
    corpus: Shards | None = None,
    checkpoint: str | None = None,
) -> None:
    """Call `embed`, take its time, and write what it gives with what is known of it (`write_embedding`).

    Parameters
    ----------
    path
        Ends in ``.npy``.
    embed
        Gives the embedding [cells, E] of the split "all" of `shards`.
    shards
        The cells that are embedded.
    model, kind, seed
        As in the table of scores (`cellmill.scores`).
    trained_on
        dataset_id of every data set that the embedder was fitted to beforehand.
    primary_only
        Whether it was fitted to primary cells only.
    corpus
        What it was fitted to, if it is at hand: see `seen`.
    checkpoint
        Hash of the weights.
    """
    started = time.monotonic()
    x_CE = embed()
    seconds = time.monotonic() - started
    about = {"model": model, "kind": kind, "seed": seed, "seconds": seconds}
    about |= {"seen": seen(trained_on, shards, primary_only=primary_only, corpus=corpus), "checkpoint": checkpoint}
    write_embedding(path, x_CE, about)


def write_embedding(path: Path, x_CE: np.ndarray, meta: dict) -> None:
    """Write embeddings as ``.npy``, and `meta`, their shape and their SHA-256 as ``.json`` beside it.

    Either file is whole or absent.

    Parameters
    ----------
    path
        Ends in ``.npy``.
    x_CE
        Cells by E; written as float32.
    meta
        JSON-like provenance.

    Raises
    ------
    CellmillError
        If a file cannot be written.
    """
    path = Path(path)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        x_CE = np.ascontiguousarray(x_CE, dtype=np.float32)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(x_CE))
        file.write(x_CE.data)  # np.save does not say that the disk is full, only how many values it wrote
    content = {**meta, "cells": x_CE.shape[0], "width": x_CE.shape[1], "sha256": sha256(path)}
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def read_meta(path: Path) -> dict:
    """What `write_embedding` wrote beside an embedding.

    Raises
    ------
    CellmillError
        If the ``.json`` is missing or not JSON.
    """
    path = Path(path).with_suffix(".json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CellmillError(f"{path} cannot be read ({error}); delete the embedding beside it and run again") from error
