"""Cells per CPU second of the loader and of every view, and how well batches are mixed: one core, one run.

``python tests/bench/loader.py SHARDS`` prints a table. The limit to compare with is pyarrow reading the same columns,
whole row groups, without unpacking them.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.format import FROM_CELLS, PACKED
from cellmill.shards.loader import Loader
from cellmill.shards.statistics import compute_statistics
from cellmill.views import exceiver, geneformer, scfoundation, scgpt, scmulan

VIEW_CELLS = 4096
"""Cells that the views are measured on."""
RANKS = 4
SCMULAN_GENES = 2000


def measure(shards: Shards, split: str = "train", batch_size: int = 256, repeats: int = 3) -> list[dict]:
    """Speed of reading, of the shuffled stream and of each view, each the fastest of `repeats` runs.

    Parameters
    ----------
    shards, split
        Cells to read; the vocabulary should be protein-coding, as the models' are.
    batch_size
        Cells per batch.
    repeats
        Runs of each.

    Returns
    -------
    list of dict
        `what`, `cells_per_cpu_second`, `cells_per_second`, `genes_per_cpu_second` (nonzeros read, or tokens made).
    """
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    n_cells = shards.n_cells(split)
    n_genes = sum(shard["nonzeros"] for shard in shards.manifest["splits"][split])
    rows = [
        _row("pyarrow, no unpacking", lambda: _read_all(shards, split), n_cells, n_genes, repeats),
        _row("batches in order", lambda: _drain(shards.batches(split, batch_size)), n_cells, n_genes, repeats),
    ]
    with Loader(shards, split, batch_size, seed=0) as loader:
        _serve(loader, n_cells)  # from here on the stream reads as much as it serves
        rows.append(_row("loader", lambda: _serve(loader, n_cells), n_cells, n_genes, repeats))
    with Loader(shards, split, batch_size * RANKS, seed=0, world=RANKS) as loader:
        _serve(loader, n_cells)
        job = lambda: _serve(loader, n_cells)  # noqa: E731
        rows.append(_row(f"loader, one of {RANKS} ranks", job, n_cells // RANKS, n_genes // RANKS, repeats))

    parts = [next(shards.batches(split, batch_size, start)) for start in range(0, min(n_cells, VIEW_CELLS), batch_size)]
    n_cells = sum(map(len, parts))
    for what, view, tokens in _views(shards, split):
        n_tokens = sum(tokens(view(part)) for part in parts)
        rows.append(_row(what, lambda view=view: _drain(map(view, parts)), n_cells, n_tokens, repeats))
    return rows


def _views(shards: Shards, split: str) -> list[tuple]:
    """Each view at its published length: name, function of a batch, number of tokens of what it returns."""
    statistics = compute_statistics(shards, split)
    median_V = statistics.median_nonzero_cp10k.numpy()
    mean_V, std_V = statistics.mean_log1p_cp10k.numpy(), statistics.std_log1p_cp10k.numpy()
    variable = np.argsort(-np.nan_to_num(std_V))[:SCMULAN_GENES]
    gene_V = np.full(shards.n_genes, -1, np.int32)
    gene_V[np.sort(variable)] = np.arange(1, len(variable) + 1)
    tokens = scmulan.Tokens(gene_V)
    lengths = np.concatenate([batch.lengths for batch in shards.batches(split, 2048)])
    n_hidden = exceiver.hidden_genes(float(np.median(lengths)))
    keys = {"seed": 0, "step": 1}

    def sentences(cells: CellBatch) -> scmulan.Sentences:
        words = scmulan.Words(5 * np.arange(len(cells) + 1), np.full(5 * len(cells), 2001, np.int32))
        return scmulan.pretrain(cells, tokens, cell_types=words, metadata=words, **keys)

    def masked_ranks(cells: CellBatch) -> geneformer.MaskedRanks:
        return geneformer.pretrain(cells, median_V, limit=2048, mask_rate=0.15, **keys)

    def masked_values(cells: CellBatch) -> exceiver.MaskedValues:
        return exceiver.pretrain(cells, mean_V, std_V, n_hidden=n_hidden, **keys)

    return [
        ("geneformer, pretrain", masked_ranks, lambda out: len(out.ranks.genes)),
        ("geneformer, embed", lambda c: geneformer.embed(c, median_V, limit=2048), lambda out: len(out.genes)),
        *_both("scgpt", scgpt, {"n_edges": 50, "limit": 1199}, keys, lambda out: len(out.genes.genes)),
        *_both("scfoundation", scfoundation, {"n_genes": shards.n_genes}, keys, _encoded),
        ("exceiver, pretrain", masked_values, lambda out: len(out.shown.values)),
        ("exceiver, embed", lambda c: exceiver.embed(c, mean_V, std_V), lambda out: len(out.values)),
        ("scmulan, pretrain", sentences, lambda out: len(out.tokens)),
        ("scmulan, embed", lambda c: scmulan.embed(c, tokens), lambda out: len(out.tokens)),
    ]


def _both(name: str, view, options: dict, keys: dict, tokens) -> list[tuple]:
    return [
        (f"{name}, pretrain", lambda cells: view.pretrain(cells, **options, **keys), tokens),
        (f"{name}, embed", lambda cells: view.embed(cells, **options), tokens),
    ]


def _encoded(out: scfoundation.MaskedCells | scfoundation.Encoded) -> int:
    return len(out.values if isinstance(out, scfoundation.Encoded) else out.encoded.values)


def _row(what: str, job, n_cells: int, n_genes: int, repeats: int) -> dict:
    clock, cpu = [], []
    for _ in range(repeats):
        began, began_cpu = time.perf_counter(), time.process_time()
        job()
        clock.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    return {
        "what": what,
        "cells_per_cpu_second": n_cells / min(cpu),
        "cells_per_second": n_cells / min(clock),
        "genes_per_cpu_second": n_genes / min(cpu),
    }


def _read_all(shards: Shards, split: str) -> None:
    for group in shards.row_groups(split):
        with pq.ParquetFile(group.path, page_checksum_verification=True) as file:
            file.read_row_group(group.index, columns=[*FROM_CELLS, *PACKED], use_threads=False)


def _drain(batches) -> None:
    for _ in batches:
        pass


def _serve(loader: Loader, n_cells: int) -> None:
    """Serve an epoch's number of cells, to the batch, and so many that no cell of another call's is counted twice."""
    state = loader.state_dict()
    begin = state["epoch"] * n_cells + state["position"]
    while state["epoch"] * n_cells + state["position"] < (begin // n_cells + 1) * n_cells:
        next(loader)
        state = loader.state_dict()


def batch_entropy(shards: Shards, split: str, batch_size: int, column: str, epochs: int = 1) -> dict[str, float]:
    """Mean entropy of a metadata column within a batch, in bits.

    Returns
    -------
    dict
        `loader`: of the loader's batches; `ideal`: of random batches without replacement; `in_order`: of neighbours in
        the shards; `all`: of the whole split.
    """
    values = shards.obs(split, ["soma_joinid", column])
    codes = np.unique(np.array(values[column].to_pylist(), dtype=str), return_inverse=True)[1]
    joinids = np.array(values["soma_joinid"].to_pylist())
    by_joinid = np.argsort(joinids)
    n_batches = max(len(codes) * epochs // batch_size, 1)
    with Loader(shards, split, batch_size, seed=0) as loader:
        served = [next(loader).joinids for _ in range(n_batches)]
    rows = [by_joinid[np.searchsorted(joinids, ids, sorter=by_joinid)] for ids in served]
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(codes)) for _ in range(epochs + 1)])
    cut = [slice(i * batch_size, (i + 1) * batch_size) for i in range(n_batches)]
    in_order = np.tile(np.arange(len(codes)), epochs + 1)
    return {
        "loader": float(np.mean([_entropy(codes[row]) for row in rows])),
        "ideal": float(np.mean([_entropy(codes[order[part]]) for part in cut])),
        "in_order": float(np.mean([_entropy(codes[in_order[part]]) for part in cut])),
        "all": _entropy(codes),
    }


def _entropy(codes: np.ndarray) -> float:
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("shards", type=Path, help="a folder of shards")
    options.add_argument("--split", default="train")
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    shards = Shards(given.shards)
    print(f"{'':28s}{'cells/CPU s':>14s}{'cells/s':>14s}{'M genes/CPU s':>16s}")
    for row in measure(shards, given.split, given.batch_size, given.repeats):
        print(
            f"{row['what']:28s}{row['cells_per_cpu_second']:14,.0f}{row['cells_per_second']:14,.0f}"
            f"{row['genes_per_cpu_second'] / 1e6:16.1f}"
        )
    for column in ("dataset_id", "cell_type"):
        entropy = batch_entropy(shards, given.split, given.batch_size, column)
        print(f"entropy of {column}, bits a batch: " + ", ".join(f"{k} {v:.3f}" for k, v in entropy.items()))


if __name__ == "__main__":
    sys.exit(main())
