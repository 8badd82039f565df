"""Baron's pancreas cells as the tasks take them, read once for all tests of a module."""

from functools import cache
from pathlib import Path

import anndata
import numpy as np
from cellmill.tasks.data import Target


@cache
def baron(data: Path) -> anndata.AnnData:
    """1,937 cells with their total counts."""
    cells = anndata.read_h5ad(data / "cells" / "baron_h1.h5ad")
    cells.X = cells.X.tocsr()
    cells.obs["total_counts"] = np.asarray(cells.X.sum(axis=1)).ravel()
    return cells


def target_of(cells: anndata.AnnData, label: str = "cell_type", batch: str = "batch", min_cells: int = 10) -> Target:
    """The labelled cells of `cells`."""
    return Target(cells.obs, label, batch, min_cells, lambda keep: cells[keep].copy())


def values(rows: list[dict], split: str, regime: str = "zero_shot") -> dict[str, float]:
    """Value by metric of one split and regime."""
    return {r["metric"]: r["value"] for r in rows if (r["split"], r["regime"]) == (split, regime)}
