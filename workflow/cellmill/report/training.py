"""How fast models trained, from what their logs measured."""

from pathlib import Path

import pandas as pd

from cellmill.report.inputs import read_table, seed_of
from cellmill.report.render import share
from cellmill.training.log import MACHINE
from cellmill.training.meter import FORMULA, in_flops

COLUMNS = {
    "cells_per_second": ("cells/s", "{:,.0f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", share),
    "memory_mb": ("memory", "{:,.0f} MB".format),
    "padding_share": ("padding", share),
    "waiting_share": ("waiting", share),
}
"""Metrics of the table: what a column is called, and how a value is written."""


def speeds(paths: list[Path]) -> dict | None:
    """A table of what training reached: a row a model; None where no log holds a measurement.

    A value is the median over the logged steps of a seed, memory the largest, then the mean over seeds.
    """
    per_seed = []
    for path in paths:
        log = read_table(path, ["step", "split", "metric", "value"])
        log = log[log["split"] == MACHINE]
        values = log.groupby("metric")["value"].agg(["median", "max"])
        names = {"model": path.parent.parent.name, "seed": seed_of(path.parent.name)}
        found = values["median"].to_dict() | values["max"].reindex(["memory_mb"]).dropna().to_dict()
        per_seed.append(names | found)
    table = pd.DataFrame(per_seed)
    known = [metric for metric in COLUMNS if metric in table]
    if not known:
        return None
    models = []
    for model, rows in table.groupby("model", sort=False):
        if rows[known].isna().all(axis=None):
            continue
        means = rows[known].mean()
        cells = ["–" if pd.isna(means[metric]) else COLUMNS[metric][1](means[metric]) for metric in known]
        models.append({"model": model, "seeds": sorted(rows["seed"].tolist()), "cells": cells})
    peaks = table["peak_flops_per_second"].dropna() if "peak_flops_per_second" in table else []
    return {
        "columns": [COLUMNS[metric][0] for metric in known],
        "models": models,
        "formula": FORMULA,
        "peaks": list(dict.fromkeys(map(in_flops, (min(peaks), max(peaks))))) if len(peaks) else [],
    }
