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
from cellmill.training.log import MACHINE

UMAP_CELLS = 5000
CURVE_POINTS = 400


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """A parquet file with at least `columns`, or a `CellmillError` that names what is wrong with it."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CellmillError(
            f"{path} cannot be read as parquet ({one_line(error)}); delete it and run the workflow again"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise CellmillError(
            f"{path} has no column {', '.join(missing)}; another version wrote it, so delete it and run again"
        )
    return table.to_pandas()


def one_line(error: Exception) -> str:
    """The text of an error, for the middle of a sentence."""
    return " ".join(str(error).split())[:200]


def seed_of(name: str) -> int:
    """The seed in a name such as ``seed0``."""
    return int(name.removeprefix("seed"))


def read_logs(paths: list[Path]) -> dict[str, pd.DataFrame]:
    """Training logs by model: ``step, split, seed, metric, value``, each curve thinned to about `CURVE_POINTS`.

    What was measured of the machine is no curve of a model and left out.
    """
    logs = {}
    for path in paths:
        log = read_table(path, ["step", "split", "metric", "value"]).assign(seed=seed_of(path.parent.name))
        log = log[log["split"] != MACHINE]
        logs.setdefault(path.parent.parent.name, []).append(log)
    return {model: _thin(pd.concat(parts, ignore_index=True)) for model, parts in logs.items()}


def _thin(log: pd.DataFrame) -> pd.DataFrame:
    log = log[np.isfinite(log["value"].astype(float))]
    curve = log.groupby(["split", "metric", "seed"], sort=False)
    stride = np.ceil(curve["step"].transform("size") / CURVE_POINTS).astype(int)
    last = curve.cumcount(ascending=False) == 0
    return log[(curve.cumcount() % stride == 0) | last][["step", "split", "seed", "metric", "value"]]


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
