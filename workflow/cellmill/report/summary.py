"""Statistics of the report: means and intervals over seeds, ranks, and which differences are shown.

A method's interval is Student's t interval of its mean over seeds (n - 1 degrees of freedom). It covers the randomness
of the seeds, not the choice of cells or donors. Which of two methods is better is a question of its own, answered by
`cellmill.comparison` from their paired differences, corrected for the number of pairs.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from cellmill.comparison import (
    ABOVE,
    BELOW,
    LEANS_ABOVE,
    LEANS_BELOW,
    NOT_SHOWN,
    NOT_TESTED,
    Comparison,
    Pair,
    compare,
)
from cellmill.errors import CellmillError

LEVEL = 0.95
RANKED = ("model", "untrained", "baseline")
COMPARISON = ["task", "dataset", "split", "regime", "metric"]
"""Columns that name one comparison: rows that agree in them may be ranked against each other."""
METHOD = ["model", "kind"]
TRACES = ["code_version", "commit", "config_hash", "checkpoint"]

# The metric that a task is first shown by, and read for the headline: regime, split, metric.
PRIMARY = {
    "annotation": ("zero_shot", "mean", "macro_f1"),
    "integration": ("zero_shot", "all", "total"),
    "pretraining": ("none", "validation", "loss"),
    "yardstick": ("none", "validation", "pearson"),
}
SHOWN, LEANS = "difference shown", "difference shown before correction only"
VERDICTS = {
    ABOVE: "shown above",
    BELOW: "shown below",
    LEANS_ABOVE: "before correction only",
    LEANS_BELOW: "before correction only",
    NOT_SHOWN: "no difference shown from",
    NOT_TESTED: "not tested against",
}
"""How the verdicts on one method are gathered: those before correction together, whose direction the ranks tell."""
_EDGE = 1e-6  # a value at a control's place is not outside


@dataclass(frozen=True)
class Interval:
    """Mean over `n` seeds with its 95 % t interval; `low` and `high` are None with fewer than two seeds."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    deterministic: bool
    """More than one seed, and all gave the same value."""

    @classmethod
    def of(cls, values) -> "Interval":
        """Interval of the mean of `values`, one per seed; missing values do not count."""
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        n = len(values)
        if n == 0:
            return cls(0, None, None, None, False)
        mean = float(values.mean())
        if n == 1:
            return cls(1, mean, None, None, False)
        if np.ptp(values) == 0:
            return cls(n, mean, mean, mean, True)
        half = float(student_t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
        return cls(n, mean, mean - half, mean + half, False)


def base_name(model: str) -> str:
    """The model that an untrained twin or a trivial baseline belongs to."""
    return model.removesuffix(".untrained").removesuffix(".trivial")


def label(model: str, kind: str) -> str:
    """How a method is written: its name, and that it is untrained."""
    return f"{base_name(model)}, untrained" if kind == "untrained" else model


def number(value: float | None) -> str:
    """A score as it is printed everywhere: three decimals, a dash where it is missing."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}".replace("-", "−")


def with_interval(row) -> str:
    """A mean with its interval, such as ``0.960 [0.950, 0.970]``."""
    if pd.isna(row.mean):
        return "–"
    if pd.isna(row.low) or row.deterministic:
        return number(row.mean)
    return f"{number(row.mean)} [{number(row.low)}, {number(row.high)}]"


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per method and comparison: `Interval`, scaled value, rank and standing against the first.

    Parameters
    ----------
    scores
        The score table (`cellmill.scores`), one row per seed; without the column `scaled`, nothing is scaled.

    Returns
    -------
    pd.DataFrame
        `COMPARISON` and `METHOD` columns, then ``label, n, mean, low, high, deterministic, values, seeds, scaled`` (an
        `Interval`), ``scaled_values, rank, of, standing, comparison, reason, seen, higher_is_better, cells, seconds``
        and `TRACES`. Ranks are among the kinds `RANKED`; ties share the better rank. `comparison` is the
        `cellmill.comparison.Comparison` that a row takes part in, its methods named by their labels.
    """
    if scores.empty:
        raise CellmillError(
            "the score table is empty, so there is nothing to report; name at least one task in the config"
        )
    scores = scores.assign(split=scores["split"].fillna("none"), dataset=scores["dataset"].fillna("none"))
    if "scaled" not in scores:
        scores = scores.assign(scaled=np.nan)
    rows = [
        dict(zip(COMPARISON + METHOD, key, strict=True)) | _summary(group)
        for key, group in scores.groupby(COMPARISON + METHOD, sort=False, observed=True)
    ]
    summary = pd.DataFrame(rows)
    # losses of different models are different objectives: each model is compared with its twin and its trivial baseline
    placed = {}
    loss_of = summary["model"].map(base_name).where(summary["task"] == "pretraining", "")
    for _, group in summary.groupby([*COMPARISON, loss_of], sort=False):
        ranked = group[group["kind"].isin(RANKED) & group["mean"].notna()]
        if ranked.empty:
            continue
        found = compare(_seeds_of(ranked), bool(ranked["higher_is_better"].iloc[0]))
        ranks = found.ranks()
        first = min(ranked["label"], key=lambda name: ranks[name].rank)
        for index, name in ranked["label"].items():
            standing = "first" if name == first else _standing(found.pair(name, first))
            placed[index] = (ranks[name].rank, len(ranked), standing, found)
    for i, name in enumerate(("rank", "of", "standing", "comparison")):
        column = [placed[index][i] if index in placed else None for index in summary.index]
        summary[name] = pd.Series(column, summary.index, dtype=object)
    return summary


def _seeds_of(ranked: pd.DataFrame, values: str = "values") -> pd.DataFrame:
    """Rows of `summarise` as one row per seed, as `cellmill.comparison.compare` takes them."""
    rows = ranked[["label", "dataset", "split", "seeds", values]].explode(["seeds", values])
    return rows.rename(columns={"label": "method", "seeds": "seed", values: "value"})


def over_datasets(summary: pd.DataFrame, task: str) -> tuple[Comparison, bool, tuple[str, str, str]] | None:
    """Methods compared over all data sets of a task; None where there is only one.

    Values are scaled between the controls where each has a scaled value: then True stands beside the comparison. The
    last part is the regime, split and metric compared, the primary ones.
    """
    rows = summary[(summary["task"] == task) & summary["rank"].notna()]
    if rows["dataset"].nunique() < 2:
        return None
    chosen = primary(rows, task, rows["dataset"].iloc[0])
    rows = rows[(rows[["regime", "split", "metric"]] == chosen).all(axis=1)]
    scaled = all(interval.n == n for interval, n in zip(rows["scaled"], rows["n"], strict=True))
    higher_is_better = scaled or bool(rows["higher_is_better"].iloc[0])
    return compare(_seeds_of(rows, "scaled_values" if scaled else "values"), higher_is_better), scaled, chosen


def outside_controls(summary: pd.DataFrame) -> list[tuple[str, list[str], list[str]]]:
    """Metrics whose controls do not hold all methods between them: metric, methods above the best, below the worst.

    A method counts where its whole interval over seeds (with one seed, its value) lies outside on some split.
    """
    ranked = summary[summary["rank"].notna()]
    low = ranked["scaled"].map(lambda found: found.mean if found.low is None else found.low).astype(float)
    high = ranked["scaled"].map(lambda found: found.mean if found.high is None else found.high).astype(float)
    outside = []
    for metric, rows in ranked.groupby("metric", sort=False):
        above, below = (list(dict.fromkeys(rows["label"][where])) for where in (low > 1 + _EDGE, high < -_EDGE))
        if above or below:
            outside.append((metric, above, below))
    return outside


def _standing(pair: Pair) -> str:
    """How far a difference is shown, whatever its direction."""
    return {ABOVE: SHOWN, BELOW: SHOWN, LEANS_ABOVE: LEANS, LEANS_BELOW: LEANS}.get(pair.verdict, pair.verdict)


def _summary(group: pd.DataFrame) -> dict:
    interval = Interval.of(group["value"])
    found = group.dropna(subset=["value"])
    return {
        "label": label(group["model"].iloc[0], group["kind"].iloc[0]),
        **vars(interval),
        "values": found["value"].tolist(),
        "seeds": found["seed"].tolist(),
        "scaled": Interval.of(group["scaled"]),
        "scaled_values": found["scaled"].tolist(),
        "reason": _distinct(group["reason"]),
        "seen": _distinct(group["seen"]),
        "higher_is_better": bool(group["higher_is_better"].iloc[0]),
        "cells": int(group["n"].max()) if group["n"].notna().any() else None,
        "seconds": float(group["seconds"].median()) if group["seconds"].notna().any() else None,
    } | {name: _distinct(group[name]) for name in TRACES}


def _distinct(column: pd.Series) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in column.dropna() if value != ""))


def primary(summary: pd.DataFrame, task: str, dataset: str) -> tuple[str, str, str]:
    """Regime, split and metric that a task and data set are first shown by: those of `PRIMARY` that the table has."""
    rows = summary[(summary["task"] == task) & (summary["dataset"] == dataset)]
    wanted = PRIMARY.get(task, ("zero_shot", "mean", ""))
    chosen = []
    for column, name in zip(("regime", "split", "metric"), wanted, strict=True):
        value = name if name in set(rows[column]) else rows[column].iloc[0]
        rows = rows[rows[column] == value]
        chosen.append(value)
    return tuple(chosen)


REGIMES = {
    "zero_shot": "zero-shot",
    "linear_probe": "linear probe",
    "fine_tune": "fine-tuned",
    "supervised": "supervised",
    "none": "",
}
METRICS = {
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted F1",
    "total": "scIB total",
    "bio": "bio conservation",
    "batch": "batch correction",
    "avg_bio": "AvgBIO",
    "avg_batch": "AvgBATCH",
    "loss": "loss",
    "pearson": "Pearson",
    "pearson_residual": "Pearson beyond gene means",
    "mse": "MSE",
    "mse_uncalibrated": "MSE, not calibrated",
    "auroc": "AUROC",
}


def metric_name(metric: str) -> str:
    """How a metric is written."""
    return METRICS.get(metric, metric.replace("_", " "))


def regime_name(task: str, regime: str) -> str:
    """How a regime is written; annotation's zero-shot regime is a nearest-neighbour vote."""
    name = REGIMES.get(regime, regime.replace("_", " "))
    return f"{name} kNN" if task == "annotation" and regime == "zero_shot" else name


@dataclass(frozen=True)
class Headline:
    """What the table says of one comparison: the first sentence, and what qualifies it."""

    first: str
    more: str = ""

    def __str__(self) -> str:
        return f"{self.first} {self.more}".strip()


def headline(summary: pd.DataFrame, task: str, dataset: str) -> Headline:
    """What the table says of one task and data set by its primary metric: who is first, how the best model stands."""
    regime, split, metric = primary(summary, task, dataset)
    rows = summary[
        (summary[["task", "dataset", "regime", "split", "metric"]] == (task, dataset, regime, split, metric)).all(
            axis=1
        )
    ]
    where = " ".join(filter(None, (regime_name(task, regime), task)))
    ranked = rows[rows["rank"].notna()].sort_values("rank", kind="stable")
    if ranked.empty:
        return Headline(f"On {dataset}, {where} has no {metric_name(metric)} to rank: {_reasons(rows)}.")
    top = ranked.iloc[0]
    first = (
        f"On {dataset}, {where}: {_subject(top)} ranks first of {len(ranked)} ({metric_name(metric)} {_measured(top)})."
    )
    more = []
    level = ranked[ranked["standing"] == NOT_SHOWN]["label"].tolist()
    if level:
        more.append(f"No difference is shown between it and {_listed(level)}.")
    leaning = ranked[ranked["standing"] == LEANS]["label"].tolist()
    if leaning:
        n = top["comparison"].n_tested
        more.append(f"Before correction for {n} comparisons only is it shown to be above {_listed(leaning)}.")
    models = ranked[ranked["kind"] == "model"]
    if models.empty:
        more.append("No pretrained model has a score.")
    else:
        best = models.iloc[0]
        if top["kind"] != "model":
            more.append(
                f"The best pretrained model, {best['label']}, ranks {best['rank']} ({_measured(best)}): "
                f"{_against_first(best)}."
            )
        more.append(_against_twin(best, ranked))
    return Headline(first, " ".join(filter(None, more)))


def _subject(row) -> str:
    kind = {"model": "the pretrained model", "untrained": "the untrained network", "baseline": "the baseline"}[
        row["kind"]
    ]
    return f"{kind} {base_name(row['label'].removesuffix(', untrained'))}"


def _measured(row) -> str:
    seeds = (
        f"the same over {row['n']} seeds" if row["deterministic"] else f"{row['n']} seed{'' if row['n'] == 1 else 's'}"
    )
    return f"{with_interval(row_of(row))}, {seeds}"


def row_of(row: pd.Series):
    """A summary row with its numbers as attributes (a Series has a method called mean)."""
    return Interval(row["n"], row["mean"], row["low"], row["high"], row["deterministic"])


def _against_first(row) -> str:
    return {
        SHOWN: "behind, and the difference is shown",
        LEANS: "behind, which is shown before correction only",
        NOT_SHOWN: "behind, but no difference is shown",
        NOT_TESTED: "behind; with a single seed the difference is not tested",
    }.get(row["standing"], "level with the first")


def _against_twin(model, ranked: pd.DataFrame) -> str:
    twin = ranked[(ranked["kind"] == "untrained") & (ranked["model"].map(base_name) == base_name(model["model"]))]
    if twin.empty:
        return ""
    twin = twin.iloc[0]
    better = (model["mean"] > twin["mean"]) == model["higher_is_better"] and model["mean"] != twin["mean"]
    pair = model["comparison"].pair(model["label"], twin["label"])
    said = {
        SHOWN: f"Pretraining {'improves it over' if better else 'leaves it worse than'} its untrained twin",
        LEANS: f"Before correction only is it shown to be {'better' if better else 'worse'} than its untrained twin",
        NOT_SHOWN: "No difference is shown between it and its untrained twin",
        NOT_TESTED: f"It is {'better' if better else 'no better'} than its untrained twin, untested",
    }[_standing(pair)]
    return f"{said} ({_measured(twin)})."


def loss_headline(summary: pd.DataFrame, model: str) -> Headline | None:
    """Is `model`'s held-out loss below its untrained twin's and its trivial baseline's; None where it has no loss."""
    rows = summary[
        (summary["task"] == "pretraining") & (summary["metric"] == "loss") & (summary["model"].map(base_name) == model)
    ]
    rows = rows[rows["mean"].notna()].drop_duplicates("kind").set_index("kind")
    if "model" not in rows.index:
        return None
    own = rows.loc["model"]
    said = []
    for kind, name in (("untrained", "its untrained twin"), ("baseline", "its trivial baseline")):
        if kind not in rows.index:
            said.append(f"{name} was not scored")
            continue
        other = rows.loc[kind]
        side = "below" if own["mean"] < other["mean"] else "not below"
        verdict = _standing(own["comparison"].pair(own["label"], other["label"]))
        said.append(f"{side} {name} ({with_interval(row_of(other))}; {verdict})")
    return Headline(f"{model}: held-out loss {_measured(own)}; {', '.join(said)}.")


def yardstick_headline(summary: pd.DataFrame) -> Headline | None:
    """Who knows hidden genes best, which baselines no model beats, which models beat their untrained twins; or None.

    To beat is to be shown to be above or, where nothing can be tested, to have the better mean. A twin whose answers
    are all alike has no value, and is beaten.
    """
    rows = summary[summary["task"] == "yardstick"]
    if rows.empty:
        return None
    metric = primary(summary, "yardstick", rows["dataset"].iloc[0])[2]
    rows = rows[rows["metric"] == metric]
    ranked = rows[rows["rank"].notna()].sort_values("rank", kind="stable")
    if ranked.empty:
        return Headline(f"Common yardstick: no method answered ({_reasons(rows)}).")
    top = ranked.iloc[0]
    first = (
        f"Common yardstick, hidden genes of held-out cells: {_subject(top)} ranks first of {len(ranked)} "
        f"({metric_name(metric)} {_measured(top)})."
    )
    models, baselines = (
        [row for _, row in ranked[ranked["kind"] == kind].iterrows()] for kind in ("model", "baseline")
    )
    if not models:
        return Headline(first, "No pretrained model answered.")
    more = []
    unbeaten = [b["label"] for b in baselines if not any(_beats(model, b) for model in models)]
    if unbeaten:
        more.append(f"No pretrained model beats {_listed(unbeaten)}.")
    elif baselines:
        more.append("Each baseline is beaten by a pretrained model.")
    twins = {base_name(twin["model"]): twin for _, twin in rows[rows["kind"] == "untrained"].iterrows()}
    pairs = [(model, twins[model["model"]]) for model in models if model["model"] in twins]
    better = [model["label"] for model, twin in pairs if _beats(model, twin)]
    leaning = [model["label"] for model, twin in pairs if _beats(model, twin, (LEANS_ABOVE,))]
    others = [model["label"] for model, _ in pairs if model["label"] not in better + leaning]
    more += [f"Better than the same network untrained: {_listed(better)}."] if better else []
    more += [f"Better than it before correction for many comparisons only: {_listed(leaning)}."] if leaning else []
    more += [f"Not better than the same network untrained: {_listed(others)}."] if others else []
    return Headline(first, " ".join(more))


def _beats(one: pd.Series, other: pd.Series, by: tuple[str, ...] = (ABOVE, NOT_TESTED)) -> bool:
    """Whether `one` has the better mean by one of the verdicts `by`: where that can be tested, is it shown."""
    if pd.isna(other["mean"]):
        return ABOVE in by
    better = one["mean"] > other["mean"] if one["higher_is_better"] else one["mean"] < other["mean"]
    return bool(better) and one["comparison"].pair(one["label"], other["label"]).verdict in by


def verdicts(found: Comparison, label: str) -> dict[str, list[str]]:
    """What `found` says of one method against the others: their names, by rank, under each verdict's words."""
    ranks = found.ranks()
    others = sorted((other for other in ranks if other != label), key=lambda other: ranks[other].rank)
    said = {words: [] for words in VERDICTS.values()}
    for other in others:
        said[VERDICTS[found.pair(label, other).verdict]].append(_bracketed(other))
    return said


def _bracketed(label: str) -> str:
    """A label without its comma, to stand in a list."""
    name, comma, rest = label.partition(", ")
    return f"{name} ({rest})" if comma else name


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reasons(rows: pd.DataFrame) -> str:
    return (
        "; ".join(dict.fromkeys(reason for reason in rows["reason"] if reason)) or "no value and no reason was recorded"
    )
