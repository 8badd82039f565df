"""Means, intervals, ranks and what is said of differences."""

import numpy as np
import pandas as pd
import pytest
from cellmill.comparison import NOT_SHOWN
from cellmill.errors import CellmillError
from cellmill.report import sections
from cellmill.report.render import Figures
from cellmill.report.summary import (
    LEANS,
    PRIMARY,
    SHOWN,
    Interval,
    headline,
    loss_headline,
    number,
    outside_controls,
    over_datasets,
    primary,
    summarise,
    with_interval,
    yardstick_headline,
)
from scipy import stats


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(0.7, 0.1, n)
    interval = Interval.of(values)
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert interval.n == n
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.mean == pytest.approx(values.mean())


def test_interval_by_hand():
    """Values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) = 4.302653."""
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.high - 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


def test_interval_of_few_or_equal_values():
    assert Interval.of([]) == Interval(0, None, None, None, False)
    assert Interval.of([0.5]) == Interval(1, 0.5, None, None, False)
    assert Interval.of([0.5, 0.5, 0.5]) == Interval(3, 0.5, 0.5, 0.5, True)
    assert Interval.of([0.4, np.nan, 0.6]).n == 2


def test_numbers_as_printed():
    assert number(0.12345) == "0.123"
    assert number(-0.5) == "−0.500"
    assert number(12345.6) == "12,346"
    assert number(None) == number(np.nan) == "–"
    assert with_interval(Interval(3, 0.5, 0.4, 0.6, False)) == "0.500 [0.400, 0.600]"


def table(methods: dict, *, metric="macro_f1", task="annotation", higher=True, seeds=(0, 1, 2)) -> pd.DataFrame:
    """Scores: name -> (kind, values over seeds); None is a null with a reason."""
    constant = {"run": "r", "dataset": "d", "n": 10, "seconds": 1.0, "seen": "no", "checkpoint": None}
    traces = {"code_version": "v", "commit": "c", "config_hash": "h"}
    comparison = {"task": task, "metric": metric, "higher_is_better": higher}
    if task == "annotation":
        comparison |= {"split": "mean", "regime": "zero_shot"}
    else:
        comparison |= {"split": "validation", "regime": "none"}
    rows = [
        constant
        | traces
        | comparison
        | {"model": name, "kind": kind, "seed": seed, "value": value}
        | {"reason": "too few cells" if value is None else None}
        for name, (kind, values) in methods.items()
        for seed, value in zip(seeds, values, strict=True)
    ]
    return pd.DataFrame(rows).astype({"value": float})


def standing(summary: pd.DataFrame) -> dict:
    return dict(zip(summary["label"], zip(summary["rank"], summary["standing"], strict=True), strict=True))


def test_ranks_leave_controls_and_nulls_out():
    methods = {
        "pca": ("baseline", [0.9, 0.9, 0.9]),
        "net": ("model", [0.91, 0.90, 0.92]),
        "net.untrained": ("untrained", [0.5, 0.52, 0.51]),
        "broken": ("model", [None, None, None]),
        "labels": ("control", [1.0, 1.0, 1.0]),
    }
    summary = summarise(table(methods))
    assert standing(summary) == {
        "pca": (2, NOT_SHOWN),
        "net": (1, "first"),
        "net, untrained": (3, SHOWN),
        "broken": (None, None),
        "labels": (None, None),
    }
    assert summary.set_index("label").loc["broken", "reason"] == "too few cells"
    assert set(summary["of"].dropna()) == {3}


def test_lower_is_better_turns_ranks_round():
    methods = {"a": ("model", [5.0, 5.1, 5.2]), "b": ("baseline", [4.0, 4.0, 4.0])}
    assert standing(summarise(table(methods, higher=False)))["b"] == (1, "first")
    assert standing(summarise(table(methods, higher=True)))["a"] == (1, "first")


def test_ties_share_a_rank():
    methods = {"a": ("baseline", [0.5] * 3), "b": ("baseline", [0.5] * 3), "c": ("model", [0.1] * 3)}
    assert standing(summarise(table(methods))) == {"a": (1, "first"), "b": (1, NOT_SHOWN), "c": (3, SHOWN)}


def test_headline_when_a_baseline_wins():
    methods = {
        "pca": ("baseline", [0.9] * 3),
        "net": ("model", [0.6, 0.62, 0.61]),
        "net.untrained": ("untrained", [0.7, 0.71, 0.72]),
    }
    said = headline(summarise(table(methods)), "annotation", "d")
    assert (
        said.first
        == "On d, zero-shot kNN annotation: the baseline pca ranks first of 3 (macro-F1 0.900, the same over 3 seeds)."
    )
    assert "The best pretrained model, net, ranks 3 (0.610 [0.585, 0.635], 3 seeds): behind" in said.more
    assert "Pretraining leaves it worse than its untrained twin (0.710 [0.685, 0.735], 3 seeds)." in said.more


def test_headline_when_the_model_wins_without_a_difference():
    methods = {"pca": ("baseline", [0.9] * 3), "net": ("model", [0.85, 0.92, 0.96])}
    said = headline(summarise(table(methods)), "annotation", "d")
    assert said.first.startswith("On d, zero-shot kNN annotation: the pretrained model net ranks first of 2")
    assert said.more == "No difference is shown between it and pca."


def test_headline_of_one_seed_tests_nothing():
    methods = {"pca": ("baseline", [0.9]), "net": ("model", [0.8]), "net.untrained": ("untrained", [0.7])}
    said = str(headline(summarise(table(methods, seeds=(0,))), "annotation", "d"))
    assert "0.900, 1 seed)" in said
    assert "with a single seed the difference is not tested" in said
    assert "It is better than its untrained twin, untested" in said


def test_headline_of_one_seed_where_lower_is_better():
    methods = {"net": ("model", [5.0]), "net.untrained": ("untrained", [9.0])}
    summary = summarise(table(methods, metric="loss", task="pretraining", higher=False, seeds=(0,)))
    assert "It is better than its untrained twin, untested" in str(headline(summary, "pretraining", "d"))


def test_integration_is_shown_by_its_total():
    scores = table({"net": ("model", [0.5] * 3)}, metric="total").assign(task="integration", split="all")
    rows = pd.concat([scores.assign(metric="bio"), scores])
    assert primary(summarise(rows), "integration", "d") == PRIMARY["integration"]


def test_headline_of_nulls_gives_the_reason():
    said = headline(summarise(table({"net": ("model", [None] * 3)})), "annotation", "d")
    assert str(said) == "On d, zero-shot kNN annotation has no macro-F1 to rank: too few cells."


def test_loss_headline():
    methods = {
        "net": ("model", [5.0, 5.1, 5.2]),
        "net.untrained": ("untrained", [9.0, 9.2, 9.1]),
        "net.trivial": ("baseline", [5.1, 5.1, 5.1]),
    }
    summary = summarise(table(methods, metric="loss", task="pretraining", higher=False))
    said = str(loss_headline(summary, "net"))
    assert "below its untrained twin (9.100 [8.852, 9.348]; difference shown)" in said
    assert "not below its trivial baseline (5.100; no difference shown)" in said
    assert loss_headline(summary, "other") is None


def yardstick_of(methods: dict, seeds=(0, 1, 2)) -> str:
    rows = table(methods, metric="pearson", task="yardstick", seeds=seeds)
    return str(yardstick_headline(summarise(rows)))


def test_yardstick_names_the_baselines_that_no_model_beats():
    methods = {
        "gene_means": ("baseline", [0.5] * 3),
        "pca": ("baseline", [0.62] * 3),
        "knn": ("baseline", [0.7] * 3),
        "net": ("model", [0.58, 0.62, 0.66]),
        "net.untrained": ("untrained", [0.2, 0.21, 0.22]),
        "other": ("model", [0.3, 0.31, 0.32]),
        "other.untrained": ("untrained", [0.3, 0.3, 0.31]),
    }
    said = yardstick_of(methods)
    assert said.startswith(
        "Common yardstick, hidden genes of held-out cells: the baseline knn ranks first of 7 (Pearson 0.700, the same"
    )
    assert "No pretrained model beats knn, pca and gene_means." in said, "gene_means' p is 0.035, one of many"
    assert "Better than the same network untrained: net." in said
    assert "Not better than the same network untrained: other." in said
    methods["net"] = ("model", [0.58, 0.60, 0.62])
    assert "No pretrained model beats knn and pca." in yardstick_of(methods | {"gene_means": ("baseline", [0.3] * 3)})
    methods["net.untrained"] = ("untrained", [0.3, 0.4, 0.28])
    assert "Better than it before correction for many comparisons only: net." in yardstick_of(methods)
    methods["net"] = ("model", [0.8, 0.81, 0.82])
    methods["other.untrained"] = ("untrained", [None] * 3)
    said = yardstick_of(methods)
    assert "Each baseline is beaten by a pretrained model." in said
    assert said.endswith("Better than the same network untrained: net and other.")


def test_yardstick_of_one_seed_or_no_answer():
    methods = {"pca": ("baseline", [0.6]), "net": ("model", [0.7]), "net.untrained": ("untrained", [0.1])}
    said = yardstick_of(methods, seeds=(0,))
    assert "Each baseline is beaten by a pretrained model. Better than the same network untrained: net." in said
    assert yardstick_of({"pca": ("baseline", [0.6] * 3), "net": ("model", [None] * 3)}).endswith(
        "No pretrained model answered."
    )
    assert yardstick_of({"net": ("model", [None] * 3)}) == "Common yardstick: no method answered (too few cells)."
    assert yardstick_headline(summarise(table({"net": ("model", [0.5] * 3)}))) is None


def test_primary_takes_what_the_table_has():
    summary = summarise(table({"net": ("model", [0.5] * 3)}, metric="accuracy"))
    assert primary(summary, "annotation", "d") == ("zero_shot", "mean", "accuracy")


def test_empty_table():
    with pytest.raises(CellmillError, match="empty"):
        summarise(table({"net": ("model", [0.5] * 3)}).iloc[:0])


def scored(datasets=("d",), controls=True) -> pd.DataFrame:
    """Annotation of two models and a baseline, with scaled values, on data sets of different difficulty."""
    methods = {"pca": ("baseline", [0.7] * 3), "net": ("model", [0.5, 0.52, 0.54]), "new": ("model", [0.81, 0.8, 0.79])}
    parts = []
    for i, dataset in enumerate(datasets):
        rows = table(
            methods | ({"labels": ("control", [1.0] * 3), "shuffled": ("control", [0.2] * 3)} if controls else {})
        )
        rows["value"] *= 1 - i / 10
        rows["scaled"] = (rows["value"] / (1 - i / 10) - 0.2) / 0.8 if controls else np.nan
        parts.append(rows.assign(dataset=dataset))
    return pd.concat(parts, ignore_index=True)


def test_the_ranking_gives_scaled_scores_and_verdicts():
    (ranking,) = sections.rankings(Figures(), summarise(scored()))
    verdicts = ranking["verdicts"]
    assert [(m["label"], m["rank"], m["score"], m["scaled"]) for m in verdicts["methods"]] == [
        ("new", "1", "0.800 [0.775, 0.825]", "0.750 [0.719, 0.781]"),
        ("pca", "2", "0.700", "0.625"),
        ("net", "3", "0.520 [0.470, 0.570]", "0.400 [0.338, 0.462]"),
    ]
    assert verdicts["methods"][0]["verdicts"]["shown above"] == ["pca", "net"]
    assert verdicts["words"] == ["shown above", "shown below"]
    assert (verdicts["scaled"], verdicts["by"]) == (True, "macro-F1, zero-shot kNN")
    assert "3 paired seeds on 1 data set cannot show a difference by sign flips" in verdicts["explained"]
    assert (ranking["overall"], ranking["outside"]) == (None, [])
    (without,) = sections.rankings(Figures(), summarise(scored(controls=False)))
    assert without["verdicts"]["scaled"] is False


def test_methods_beyond_the_controls_are_named():
    rows = scored()
    rows.loc[rows["model"] == "new", "scaled"] += 0.4
    rows.loc[rows["model"] == "net", "scaled"] -= [0.45, 0.4, 0.35]
    assert outside_controls(summarise(rows)) == [("macro_f1", ["new"], [])], "net's interval reaches up to the worst"
    rows.loc[rows["model"] == "net", "scaled"] -= 0.2
    assert outside_controls(summarise(rows)) == [("macro_f1", ["new"], ["net"])]


def test_a_task_is_also_compared_over_its_data_sets():
    names = [f"d{i}" for i in range(6)]
    summary = summarise(scored(names))
    found, scaled, chosen = over_datasets(summary, "annotation")
    assert (scaled, chosen) == (True, PRIMARY["annotation"])
    assert found.means["pca"] == pytest.approx(0.625), "on every data set, once scaled"
    assert (found.unit, found.n) == ("data sets", 6)
    rankings = sections.rankings(Figures(), summary)
    assert [bool(ranking["overall"]) for ranking in rankings] == [False] * 5 + [True]
    assert rankings[-1]["overall"]["n"] == 6
    raw, scaled, _ = over_datasets(summarise(scored(names, controls=False)), "annotation")
    assert not scaled
    assert raw.means["pca"] == pytest.approx(0.7 * 0.75)


def test_losses_of_different_models_are_not_ranked_against_each_other():
    methods = {"a": ("model", [5.0, 5.1, 5.2]), "a.untrained": ("untrained", [9.0, 9.2, 9.1])}
    methods |= {"b": ("model", [1.0, 1.1, 1.2]), "b.untrained": ("untrained", [2.0, 2.2, 2.1])}
    summary = summarise(table(methods, metric="loss", task="pretraining", higher=False))
    assert summary["rank"].tolist() == [1, 2, 1, 2]
    assert set(summary["of"]) == {2}


def test_what_only_correction_hides_is_said():
    values = np.random.default_rng(0).normal(0, 0.06, (12, 3)) + np.linspace(0.3, 0.9, 12)[:, None]
    summary = summarise(table({f"net{i}": ("model", list(row)) for i, row in enumerate(values)}))
    assert {LEANS, SHOWN} <= set(summary["standing"])
    assert (
        "Before correction for 66 comparisons only is it shown to be above" in headline(summary, "annotation", "d").more
    )


def test_a_method_alone_has_a_row_and_no_verdict():
    (ranking,) = sections.rankings(Figures(), summarise(table({"net": ("model", [0.5, 0.52, 0.54])})))
    (method,) = ranking["verdicts"]["methods"]
    assert (method["rank"], ranking["verdicts"]["words"]) == ("1", ["shown above"])
    assert not any(method["verdicts"].values())
    assert ranking["verdicts"]["explained"].startswith("No pair could be tested")
