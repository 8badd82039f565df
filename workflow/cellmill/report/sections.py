"""The sections of the report: what each shows, gathered from the files of a run into plain data for the template.

A builder returns what the template writes and registers with `Figures` what the page's script draws.
"""

from pathlib import Path

import pandas as pd

from cellmill.comparison import Comparison, Rank
from cellmill.report import charts, inputs, quality, summary
from cellmill.report.render import Figures
from cellmill.shards.dataset import Shards

YARDSTICK = {
    "pearson": "correlation over the hidden genes of a cell, mean over cells",
    "pearson_residual": "correlation over all cells, beyond what the gene's training mean explains",
    "mse": "squared error of log1p(CP10k) after one scale and shift, fitted on training cells",
    "mse_uncalibrated": "squared error of log1p(CP10k) as answered",
    "auroc": "hidden genes against true zeros by detection, mean over cells",
}
"""Metrics of the yardstick in the order of the table's columns, and what they are."""
OWN_SECTIONS = ("pretraining", "yardstick")
"""Tasks that are not among the rankings."""


def headlines(results: pd.DataFrame) -> list[summary.Headline]:
    """What the table says of every task and data set, of the yardstick, then of every model's held-out loss."""
    ranked = results[~results["task"].isin(OWN_SECTIONS)]
    pairs = ranked[["task", "dataset"]].drop_duplicates().itertuples(index=False)
    said = [summary.headline(results, *pair) for pair in pairs]
    said += filter(None, [summary.yardstick_headline(results)])
    models = results[(results["task"] == "pretraining") & (results["kind"] == "model")]["model"].unique()
    return said + [line for line in (summary.loss_headline(results, model) for model in models) if line]


def facts(results: pd.DataFrame, opened: dict[str, Shards]) -> list[tuple[str, str]]:
    """The sizes of the run: number and name."""
    facts = []
    if "corpus" in opened:
        corpus = opened["corpus"]
        cells = {split: corpus.n_cells(split) for split in corpus.splits}
        facts.append((f"{cells.pop('train', 0):,}", "cells to train on"))
        facts += [(f"{n:,}", f"{split} cells, held out") for split, n in cells.items()]
        facts.append((f"{corpus.n_genes:,}", "genes"))
    facts += [
        (f"{shards.n_cells('all'):,}", f"cells in {name}") for name, shards in opened.items() if "all" in shards.splits
    ]
    facts.append((str(results[results["kind"] == "model"]["model"].nunique()), "pretrained models"))
    facts.append((str(len({seed for seeds in results["seeds"] for seed in seeds})), "seeds"))
    return facts


def kinds(results: pd.DataFrame) -> list[tuple[str, str]]:
    """The kinds of methods in the table, for the legend."""
    said = {
        "model": "pretrained model",
        "untrained": "the same network, untrained",
        "baseline": "baseline",
        "control": "control",
        "ceiling": "ceiling",
    }
    return [(kind, said[kind]) for kind in charts.KINDS if kind in set(results["kind"])]


def _dot_rows(rows: pd.DataFrame, names: dict[str, str] | None = None) -> list[dict]:
    """Rows of `charts.dots`: methods by rank, then controls and ceilings by value; without a value there is no row."""
    dots = []
    for row in rows[rows["mean"].notna()].to_dict("records"):
        reference = row["kind"] not in summary.RANKED
        interval = summary.Interval(row["n"], row["mean"], row["low"], row["high"], row["deterministic"])
        text = summary.with_interval(interval)
        better = row["mean"] if row["higher_is_better"] else -row["mean"]
        dots.append(
            {
                name: row[name]
                for name in (
                    "kind",
                    "regime",
                    "split",
                    "metric",
                    "mean",
                    "low",
                    "high",
                    "values",
                    "rank",
                    "standing",
                    "cells",
                    "seen",
                )
            }
            | {
                "label": (names or {}).get(row["kind"], row["label"]),
                "reference": reference,
                "order": (1000 - better) if reference else row["rank"],
                "text": text
                + (f" ({row['n']} equal)" if row["deterministic"] else " (one seed)" if row["n"] == 1 else ""),
                "seeds": f"{row['n']}, all the same value" if row["deterministic"] else str(row["n"]),
            }
        )
    return [
        {name: None if value is None or value is pd.NA or value != value else value for name, value in dot.items()}
        for dot in dots
    ]


def _choices(rows: pd.DataFrame, task: str, chosen: tuple[str, str, str]) -> list[dict]:
    """Choosers of a figure: those of regime, split and metric that offer a choice."""
    written = {
        "regime": lambda value: summary.regime_name(task, value),
        "split": lambda value: value.replace("leave_out:", "left out: ").replace("mean", "mean over left-out batches"),
        "metric": summary.metric_name,
    }
    choosers = []
    for name, value in zip(written, chosen, strict=True):
        options = list(dict.fromkeys([value, *rows[name]]))
        if len(options) > 1:
            choosers.append({"name": name, "options": [(option, written[name](option)) for option in options]})
    return choosers


def rankings(page: Figures, results: pd.DataFrame) -> list[dict]:
    """A dot plot and a table of verdicts per task and data set; after a task's last, the verdicts over all of them."""
    rankings = []
    ranked = results[~results["task"].isin(OWN_SECTIONS)]
    for task, of_task in ranked.groupby("task", sort=False):
        for dataset, rows in of_task.groupby("dataset", sort=False):
            rankings.append(_ranking(page, results, task, dataset, rows) | {"overall": None})
        rankings[-1]["overall"] = _overall(results, task)
    return rankings


def _ranking(page: Figures, results: pd.DataFrame, task: str, dataset: str, rows: pd.DataFrame) -> dict:
    chosen = summary.primary(results, task, dataset)
    signals = dict(zip(("regime", "split", "metric"), chosen, strict=True))
    controls = bool((rows["mean"].notna() & ~rows["kind"].isin(summary.RANKED)).any())
    spec = "dots-references" if controls else "dots"
    figure = page.figure(
        spec,
        charts.dots(controls),
        f"{task}.{dataset}",
        _dot_rows(rows),
        height=27 * rows["label"].nunique(),
        **signals,
    )
    higher = rows.groupby("metric")["higher_is_better"].first().to_dict()
    return {
        "task": task,
        "dataset": dataset,
        "figure": figure,
        "choosers": _choices(rows, task, chosen),
        "controls": controls,
        "higher": {metric: "higher is better" if up else "lower is better" for metric, up in higher.items()},
        "metric": chosen[2],
        "verdicts": _verdicts(rows, task, chosen),
        "outside": summary.outside_controls(rows),
        "unscored": sorted(set(rows[rows["mean"].isna()]["label"])),
    }


def _verdicts(rows: pd.DataFrame, task: str, chosen: tuple[str, str, str]) -> dict | None:
    """Rank, score, scaled score and verdicts of each method, by the comparison that the figure shows first."""
    rows = rows[(rows[["regime", "split", "metric"]] == chosen).all(axis=1) & rows["rank"].notna()]
    if rows.empty:
        return None
    found = rows["comparison"].iloc[0]
    scores = {
        row["label"]: {
            "kind": row["kind"],
            "score": summary.with_interval(summary.row_of(row)),
            "scaled": summary.with_interval(row["scaled"]),
        }
        for _, row in rows.iterrows()
    }
    scaled = any(interval.n for interval in rows["scaled"])
    return _verdict_table(found, scores) | {"by": _comparison_name(task, chosen), "scaled": scaled}


def _overall(results: pd.DataFrame, task: str) -> dict | None:
    """The verdicts over all data sets of a task; None where there is one only."""
    over = summary.over_datasets(results, task)
    if over is None:
        return None
    found, scaled, chosen = over
    kinds = dict(zip(results["label"], results["kind"], strict=True))
    scores = {label: {"kind": kinds[label], "score": summary.number(mean)} for label, mean in found.means.items()}
    by = _comparison_name(task, chosen) + (", scaled" if scaled else "")
    return _verdict_table(found, scores) | {"by": by, "scaled": False, "n": found.n_datasets}


def _verdict_table(found: Comparison, scores: dict[str, dict]) -> dict:
    ranks = sorted(found.ranks().items(), key=lambda item: item[1].rank)
    methods = [
        scores[label] | {"label": label, "rank": _rank_text(rank), "verdicts": summary.verdicts(found, label)}
        for label, rank in ranks
    ]
    words = list(dict.fromkeys(summary.VERDICTS.values()))
    used = [said for said in words if any(method["verdicts"][said] for method in methods)]
    return {"methods": methods, "words": used or words[:1], "explained": found.explain()}


def _comparison_name(task: str, chosen: tuple[str, str, str]) -> str:
    regime, _, metric = chosen
    return ", ".join(filter(None, (summary.metric_name(metric), summary.regime_name(task, regime))))


def _rank_text(rank: Rank) -> str:
    return str(rank.rank) if rank.low == rank.high else f"{rank.rank} ({rank.low} to {rank.high})"


def yardstick(page: Figures, results: pd.DataFrame) -> dict | None:
    """What every model and baseline knows of the same hidden genes: a dot plot and a table; None where none was asked.

    The table has a row for each method, by rank of the first metric, and a column for each metric.
    """
    rows = results[results["task"] == "yardstick"]
    if rows.empty:
        return None
    dataset = rows["dataset"].iloc[0]
    ranking = _ranking(page, results, "yardstick", dataset, rows)
    metrics = sorted(rows["metric"].unique(), key=[*YARDSTICK].index)
    by_rank = rows[rows["metric"] == metrics[0]].sort_values("rank", kind="stable", na_position="last")
    methods = []
    for label in by_rank["label"]:
        own = rows[rows["label"] == label].set_index("metric").reindex(metrics)
        cells = [summary.with_interval(summary.row_of(own.loc[metric])) for metric in metrics]
        reasons = list(dict.fromkeys(reason for reason in own["reason"].dropna() if reason))
        methods.append({"label": label, "kind": own["kind"].dropna().iloc[0], "cells": cells, "reasons": reasons})
    return ranking | {
        "metrics": [(metric, YARDSTICK[metric]) for metric in metrics],
        "methods": methods,
        "cells": int(rows["cells"].max()),
        "headline": summary.yardstick_headline(results),
    }


def losses(page: Figures, results: pd.DataFrame) -> list[dict]:
    """Held-out loss of every model: trained, untrained, trivial baseline."""
    rows = results[results["task"] == "pretraining"]
    losses = []
    for model, group in rows.groupby(rows["model"].map(summary.base_name), sort=False):
        chosen = summary.primary(group, "pretraining", group["dataset"].iloc[0])
        names = {"model": "trained", "untrained": "untrained", "baseline": "trivial baseline"}
        signals = dict(zip(("regime", "split", "metric"), chosen, strict=True))
        figure = page.figure(
            "dots",
            charts.dots(references=False),
            f"pretraining.{model}",
            _dot_rows(group, names),
            height=27 * group["kind"].nunique(),
            **signals,
        )
        losses.append(
            {
                "model": model,
                "figure": figure,
                "choosers": _choices(group, "pretraining", chosen),
                "headline": summary.loss_headline(results, model),
            }
        )
    return losses


def curves(page: Figures, logs: dict[str, pd.DataFrame], results: pd.DataFrame) -> list[dict]:
    """Training curves of every model, all seeds in one figure."""
    curves = []
    trivial = results[(results["task"] == "pretraining") & (results["kind"] == "baseline") & results["mean"].notna()]
    for model, log in logs.items():
        own = trivial[trivial["model"].map(summary.base_name) == model]
        rows = log.assign(progress=log["step"] / max(log["step"].max(), 1)).round({"progress": 3}).to_dict(
            "records"
        ) + [{"split": "trivial", "metric": row.metric, "value": row.mean} for row in own.itertuples()]
        validated = log[log["split"] == "validation"]["metric"].unique()
        metrics = sorted(log["metric"].unique(), key=lambda name: (name != "loss", name not in validated))
        figure = page.figure("curves", charts.curves(), f"log.{model}", rows, metric=metrics[0])
        curves.append(
            {
                "model": model,
                "figure": figure,
                "seeds": sorted(log["seed"].unique().tolist()),
                "choosers": [{"name": "metric", "options": [(name, summary.metric_name(name)) for name in metrics]}]
                if len(metrics) > 1
                else [],
            }
        )
    return curves


def umaps(page: Figures, embeddings: list[Path], opened: dict[str, Shards], config: dict) -> list[dict]:
    """UMAPs per data set, coloured by label and by batch."""
    obs = {name: shards.obs("all") for name, shards in opened.items() if "all" in shards.splits}
    umaps = []
    for dataset, found in inputs.read_projections(embeddings, obs, config["datasets"]).items():
        page.payload["data"][f"cells.{dataset}"] = found["cells"]
        for panel in found["panels"]:
            page.payload["data"][f"umap.{dataset}.{panel['embedder']}"] = {
                "x": panel.pop("x"),
                "y": panel.pop("y"),
                "join": f"cells.{dataset}",
            }
        grids = []
        for role in ("label", "batch"):
            categories = found[f"{role}_categories"]
            template = charts.umap(categories, role)
            panels = [
                panel
                | {
                    "label": summary.label(panel["embedder"], panel["kind"]),
                    "figure": page.figure(
                        f"umap-{role}-{dataset}", template, f"umap.{dataset}.{panel['embedder']}", None
                    ),
                }
                for panel in found["panels"]
            ]
            colours = charts.CATEGORIES[: len(categories)]
            if charts.OTHER in categories:
                colours = [*charts.CATEGORIES[: len(categories) - 1], charts.REST]
            grids.append(
                {
                    "role": role,
                    "column": config["datasets"][dataset][role],
                    "panels": panels,
                    "legend": list(zip(categories, colours, strict=True)),
                }
            )
        umaps.append({"dataset": dataset, "n_cells": found["n_cells"], "n_shown": found["n_shown"], "grids": grids})
    return umaps


def splits(page: Figures, opened: dict[str, Shards]) -> dict:
    """Cells per data set and split."""
    rows = []
    for shards in opened.values():
        for split in shards.splits:
            if not shards.n_cells(split):
                continue
            cells = shards.obs(split, ["dataset_id"])["dataset_id"].to_pandas().value_counts()
            part = {"split": "benchmark" if split == "all" else split, "order": shards.splits.index(split)}
            rows += [part | {"dataset": dataset, "cells": int(n)} for dataset, n in cells.items() if n]
    if not rows:
        return {"rows": [], "figure": None}
    height = 26 * len({row["dataset"] for row in rows})
    return {"rows": rows, "figure": page.figure("splits", charts.split_bars(), "splits", rows, height=height)}


def qc(page: Figures, qc: list[Path], plans: list[Path], qc_cells: list[Path]) -> list[dict]:
    """Per selection: cells removed by every rule, and the distributions behind them."""
    planned = {path.parent.name: path for path in plans}
    cells = {path.parent.name: path for path in qc_cells}
    selections = []
    for path in qc:
        name = path.parent.name
        seen = None
        if name in cells and name in planned:
            plan = quality.read_plan(planned[name])
            seen = quality.distributions(page, name, plan, quality.bin_cells(plan, cells[name]))
        dropped = quality.removed_section(page, name, quality.read_removed(path))
        selections.append({"name": name, "dropped": dropped, "distributions": seen})
    return selections


def times(page: Figures, jobs: list[dict]) -> dict:
    """Run time and memory per rule."""
    rules = []
    for rule, group in pd.DataFrame(jobs, columns=["rule", "job", "seconds", "memory_mb"]).groupby("rule", sort=False):
        rules.append(
            {
                "rule": rule,
                "jobs": len(group),
                "total": group["seconds"].sum(),
                "longest": group["seconds"].max(),
                "memory": group["memory_mb"].max(),
            }
        )
    rules.sort(key=lambda row: -row["total"])
    order = {row["rule"]: i for i, row in enumerate(rules)}
    figures = []
    for name, title in (("seconds", "Seconds per job"), ("memory_mb", "Peak memory per job, MB")):
        rows = [
            {"rule": job["rule"], "job": job["job"], "order": order[job["rule"]], "value": job[name]}
            | {"seconds_text": _duration(job["seconds"]), "memory_text": _megabytes(job["memory_mb"])}
            for job in jobs
            if job[name]
        ]
        if rows:
            figure = page.figure(
                "jobs", charts.jobs(), f"jobs.{name}", rows, height=20 * len({row["rule"] for row in rows})
            )
            figures.append({"title": title, "figure": figure})
    written = [
        row
        | {"total": _duration(row["total"]), "longest": _duration(row["longest"]), "memory": _megabytes(row["memory"])}
        for row in rules
    ]
    return {
        "rules": written,
        "figures": figures,
        "total": _duration(sum(job["seconds"] or 0 for job in jobs)),
        "jobs": len(jobs),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None or pd.isna(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _megabytes(value: float | None) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:,.0f} MB"
