"""Reading what a run left behind: scores, logs, QC, embeddings' projections, run times.

Paths carry meaning (docs/house.md): ``pretrain/{model}/seed{seed}/log.parquet``, ``selections/{cells}/qc.parquet``,
``embed/{cells}/{embedder}/seed{seed}.npy``, ``benchmarks/{rule}/{job}.tsv``.
"""

import csv
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.randomness import uniform
from cellmill.report.charts import CATEGORIES, OTHER

UMAP_CELLS = 5000
CURVE_POINTS = 400
_SHARES = np.linspace(0, 1, 51)


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A parquet file with at least `columns`, or a `CellmillError` that names what is wrong with it."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CellmillError(
            f"{path} cannot be read as parquet ({_one_line(error)}); delete it and run the workflow again"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise CellmillError(
            f"{path} has no column {', '.join(missing)}; another version wrote it, so delete it and run again"
        )
    return table.to_pandas()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def seed_of(name: str) -> int:
    """The seed in a name such as ``seed0``."""
    return int(name.removeprefix("seed"))


def read_logs(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """Training logs by model: ``step, split, seed, metric, value``, each curve thinned to about `CURVE_POINTS`."""
    logs = {}
    for path in paths:
        log = read_table(path, ["step", "split", "metric", "value"]).assign(seed=seed_of(path.parent.name))
        logs.setdefault(path.parent.parent.name, []).append(log)
    return {model: _thin(pd.concat(parts, ignore_index=True)) for model, parts in logs.items()}


def _thin(log: pd.DataFrame) -> pd.DataFrame:
    log = log[np.isfinite(log["value"].astype(float))]
    curve = log.groupby(["split", "metric", "seed"], sort=False)
    stride = np.ceil(curve["step"].transform("size") / CURVE_POINTS).astype(int)
    last = curve.cumcount(ascending=False) == 0
    return log[(curve.cumcount() % stride == 0) | last][["step", "split", "seed", "metric", "value"]]


def read_qc(path: Path) -> tuple[list[str], list[dict]]:
    """Cells removed per rule and data set.

    Returns
    -------
    rules, rows
        Rules in their order of application, and for each data set ``dataset, selected, removed (by rule), kept``.
    """
    qc = read_table(path, ["dataset_id", "rule", "removed", "remaining"])
    rules = [rule for rule in dict.fromkeys(qc["rule"]) if rule != "selected"]
    rows = []
    for dataset, part in qc.groupby("dataset_id", sort=False, observed=True):
        removed = dict(zip(part["rule"], part["removed"].astype(int), strict=True))
        kept = int(part["remaining"].iloc[-1])
        rows.append({"dataset": dataset, "selected": kept + sum(removed.values()), "removed": removed, "kept": kept})
    return rules, rows


QUANTITIES = {
    "raw_sum": ("raw counts per cell", True, ("min_counts", "max_counts")),
    "nnz": ("expressed genes per cell", True, ("min_genes",)),
    "mito_fraction": ("mitochondrial share of counts", False, ("max_mito_fraction",)),
}
"""Per-cell QC quantities: title, logarithmic axis, thresholds of `cellmill.config.Quality`."""


def read_histograms(plan: Path, path: Path, quality: dict) -> dict[str, list[dict]]:
    """Histograms by QC quantity: rows of `charts.histogram`, none where no cell has a value.

    Parameters
    ----------
    plan
        ``plan.json``: raw counts and genes of all selected cells, those that the rules on obs removed too.
    path
        ``qc_cells.parquet``, read batch by batch: the mitochondrial share of the cells that passed those rules, and
        which of them it removed.
    quality
        Thresholds of the selection.
    """
    edges, counts = _planned(plan)
    edges["mito_fraction"], counts["mito_fraction"] = _SHARES, np.zeros((2, len(_SHARES) - 1), int)
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=[*QUANTITIES, "removed_by"]):
            cells = batch.to_pandas()
            removed = (cells["removed_by"].notna() & (cells["removed_by"] != "")).to_numpy()
            for name in QUANTITIES:
                value = cells[name].to_numpy(np.float64)
                kept_E, removed_E = (_binned(value[chosen], edges[name]) for chosen in (~removed, removed))
                # the plan counts a cell that only its mitochondrial share removes as kept
                counts[name] += [kept_E, removed_E] if name == "mito_fraction" else [-removed_E, removed_E]
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise CellmillError(
            f"{path} cannot be read for the QC plots ({_one_line(error)}); delete it and run the workflow again"
        ) from error
    return {name: _histogram_rows(counts[name], edges[name], QUANTITIES[name], quality) for name in QUANTITIES}


def _planned(plan: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Edges [E + 1] and cells int [2, E], kept and removed, of every quantity in the histograms of ``plan.json``."""
    try:
        content = json.loads(plan.read_text())["histograms"]
    except (OSError, ValueError, KeyError) as error:
        raise CellmillError(
            f"{plan} holds no histograms for the QC plots ({_one_line(error)}); delete it and run the workflow again"
        ) from error
    edges, counts = {}, {}
    for quantities in content["datasets"].values():
        for name, outcomes in quantities.items():
            edges.setdefault(name, np.array(content["edges"]))
            counts.setdefault(name, np.zeros((2, len(content["edges"]) - 1), int))
            for outcome, cells in outcomes.items():
                for place, n in cells.items():
                    counts[name][int(outcome != "kept"), int(place)] += n
    return edges, counts


def _binned(value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Cells in each bin; values beyond the edges are in the outer bins, missing ones in none."""
    return np.histogram(np.clip(value[np.isfinite(value)], edges[0], edges[-1]), edges)[0]


def _histogram_rows(counts: np.ndarray, edges: np.ndarray, quantity, quality: dict) -> list[dict]:
    _, log, thresholds = quantity
    used = np.flatnonzero(counts.sum(axis=0))
    if not len(used):
        return []
    rows = []
    for i in used:
        y0 = 0
        for part, count in zip(("kept", "removed"), counts[:, i].tolist(), strict=True):
            if count:
                x0, x1 = float(edges[i]), float(edges[i + 1])
                rows.append({"x0": x0, "x1": x1, "y0": y0, "y1": y0 + count, "part": part, "count": count})
            y0 += count
    for rule in thresholds:
        value = quality.get(rule)
        if value is not None and (
            value > 1 if log else value < 1
        ):  # a threshold that cannot remove a cell is not drawn
            rows.append({"threshold": value, "rule": rule})
    return rows


def read_projections(paths: list[Path], obs: dict[str, pa.Table], datasets: dict[str, dict]) -> dict[str, dict]:
    """UMAP of the first seed of every embedder that is not a control.

    Parameters
    ----------
    paths
        Embeddings, float32 [cells, E], each with its ``.json`` (``kind``) beside it.
    obs
        Metadata by data set, in the order of the embeddings.
    datasets
        The run's `config.Dataset` sections as dicts: ``label`` and ``batch`` name columns of `obs`.

    Returns
    -------
    dict
        By data set: ``cells`` (columns ``label, batch, label_group, batch_group``), ``label_categories``,
        ``batch_categories``, ``panels`` (``embedder, kind, seed, width, x, y``), ``n_cells``, ``n_shown``.
    """
    first = {}
    for path in sorted(paths, key=lambda p: seed_of(p.stem)):
        first.setdefault((path.parent.parent.name, path.parent.name), path)
    projections = {}
    for name, section in datasets.items():
        chosen = {embedder: path for (cells, embedder), path in first.items() if cells == name}
        metas = {embedder: json.loads(path.with_suffix(".json").read_text()) for embedder, path in chosen.items()}
        chosen = {
            embedder: path for embedder, path in chosen.items() if metas[embedder]["kind"] not in ("control", "ceiling")
        }
        if not chosen or name not in obs:
            continue
        n_cells = obs[name].num_rows
        order = np.argsort(uniform(0, "report", np.arange(n_cells)), kind="stable")[:UMAP_CELLS]
        projection = _categories(obs[name], section, order) | {"n_cells": n_cells, "n_shown": len(order), "panels": []}
        for embedder, path in chosen.items():
            x_NE = np.load(path, mmap_mode="r")
            if len(x_NE) != n_cells:
                raise CellmillError(
                    f"{path} holds {len(x_NE)} cells where the shards of {name} hold {n_cells}; delete it and run again"
                )
            xy_N2 = project(np.asarray(x_NE[np.sort(order)], np.float32))[np.argsort(np.argsort(order))]
            projection["panels"].append(
                {
                    "embedder": embedder,
                    "kind": metas[embedder]["kind"],
                    "seed": seed_of(path.stem),
                    "width": x_NE.shape[1],
                    "x": xy_N2[:, 0].tolist(),
                    "y": xy_N2[:, 1].tolist(),
                }
            )
        kinds = ["model", "untrained", "baseline"]
        projection["panels"].sort(key=lambda panel: kinds.index(panel["kind"]))
        projections[name] = projection
    return projections


def _categories(obs: pa.Table, section: dict, order: np.ndarray) -> dict:
    cells, found = {}, {}
    for role in ("label", "batch"):
        column = section[role]
        if column not in obs.column_names:
            raise CellmillError(
                f"the shards have no column {column}, which the config names as a {role}; add it to census.extra_obs"
            )
        values = obs[column].to_pandas().astype("string").fillna("unknown").iloc[order]
        counts = values.value_counts()
        kept = counts.index[: len(CATEGORIES)]
        cells[role] = values.tolist()
        cells[f"{role}_group"] = values.where(values.isin(kept), OTHER).tolist()
        found[f"{role}_categories"] = [*kept, OTHER] if len(kept) < len(counts) else list(kept)
    return {"cells": cells, **found}


def project(x_NE: np.ndarray) -> np.ndarray:
    """UMAP of embeddings, 15 exact Euclidean neighbours, fixed random state.

    Parameters
    ----------
    x_NE
        float32 [N, E], N cells.

    Returns
    -------
    int [N, 2], scaled to 0 to 1000.
    """
    from sklearn.neighbors import NearestNeighbors
    from umap import UMAP

    n_neighbors = min(15, len(x_NE) - 1)
    if n_neighbors < 2:
        raise CellmillError(
            f"a UMAP needs at least 3 cells and the benchmark data set has {len(x_NE)}; loosen its filter"
        )
    # Exact neighbours from scikit-learn: at this size faster than compiling umap's approximate search.
    distance_NK, index_NK = NearestNeighbors(n_neighbors=n_neighbors).fit(x_NE).kneighbors(x_NE)
    fit = UMAP(
        n_neighbors=n_neighbors,
        min_dist=0.3,
        n_epochs=200,
        init="pca",
        random_state=0,
        n_jobs=1,
        precomputed_knn=(index_NK, distance_NK.astype(np.float32)),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "precomputed_knn", UserWarning
        )  # new cells cannot be mapped, and none will be
        xy_N2 = fit.fit_transform(x_NE)
    low, high = xy_N2.min(axis=0), xy_N2.max(axis=0)
    return np.rint((xy_N2 - low) / np.maximum(high - low, 1e-9) * 1000).astype(int)


def read_timings(paths: list[Path]) -> list[dict]:
    """Snakemake benchmark files, one per job: ``rule, job, seconds, memory_mb``; missing measurements are None."""
    jobs = []
    for path in paths:
        parts = path.with_suffix("").parts
        inner = parts[parts.index("benchmarks") + 1 :] if "benchmarks" in parts else parts[-1:]
        with path.open() as file:
            for row in csv.DictReader(file, delimiter="\t"):
                job = {"rule": inner[0], "job": "/".join(inner[1:]) or inner[0]}
                jobs.append(job | {name: _measured(row.get(column)) for name, column in _MEASURES.items()})
    return jobs


_MEASURES = {"seconds": "s", "memory_mb": "max_rss"}


def _measured(text: str | None) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):  # Snakemake writes NA or - for what it could not measure
        return None
    return value if math.isfinite(value) else None
