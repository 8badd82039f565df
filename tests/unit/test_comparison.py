"""Paired tests between methods: against scipy, on simulations, and on embeddings of real cells with a known order."""

import itertools

import numpy as np
import pandas as pd
import pytest
from cellmill import comparison
from cellmill.comparison import ABOVE, BELOW, LEANS_ABOVE, NOT_SHOWN, NOT_TESTED, Rank, compare, holm, smallest_p
from cellmill.errors import CellmillError
from cellmill.randomness import uniform
from cellmill.tasks.annotation import agreement, knn_predict
from cellmill.tasks.controls import labels_embedding
from scipy import stats
from task_cells import baron, target_of


def rows(methods: dict[str, np.ndarray], split="mean") -> pd.DataFrame:
    """Rows of `compare` from values [data sets, seeds] or [seeds] by method."""
    return pd.DataFrame(
        {"method": name, "dataset": f"d{dataset}", "split": split, "seed": seed, "value": value}
        for name, values in methods.items()
        for (dataset, seed), value in np.ndenumerate(np.atleast_2d(values))
    )


def normal(*key, size) -> np.ndarray:
    """Standard normal numbers that depend on the key alone."""
    n = int(np.prod(size))
    return stats.norm.ppf(uniform(0, "test of comparison", *key, np.arange(n)) + 2.0**-54).reshape(size)


def test_few_seeds_are_scipys_paired_t_test():
    a, b = np.array([0.61, 0.65, 0.66]), np.array([0.5, 0.51, 0.56])
    found = compare(rows({"a": a, "b": b}), True)
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    pair = found.pair("a", "b")
    assert (pair.p, pair.low, pair.high) == pytest.approx((expected.pvalue, interval.low, interval.high))
    assert pair.difference == pytest.approx((a - b).mean())
    assert (pair.n, pair.verdict, found.unit, found.test) == (3, ABOVE, "seeds", "t")
    assert found.say("a", "b") == found.say("b", "a") == "a above b"
    assert found.explain() == (
        "3 paired seeds on 1 data set cannot show a difference by sign flips (smallest p 0.25), so tests and intervals "
        "are Student's t of paired differences, which supposes that they are normal; corrected for 1 pair (Holm)."
    )


def test_the_second_against_the_first_is_the_mirror():
    found = compare(rows({"a": np.array([0.61, 0.65, 0.66]), "b": np.array([0.5, 0.51, 0.56])}), True)
    one, other = found.pair("a", "b"), found.pair("b", "a")
    assert (other.difference, other.low, other.high) == (-one.difference, -one.high, -one.low)
    assert (one.verdict, other.verdict, other.turned()) == (ABOVE, BELOW, one)


def test_lower_is_better_turns_the_verdict_round():
    methods = {"a": np.array([0.61, 0.65, 0.66]), "b": np.array([0.5, 0.51, 0.56])}
    found = compare(rows(methods), higher_is_better=False)
    assert found.say("a", "b") == "b above a"
    assert found.ranks() == {"a": Rank(2, 2, 2), "b": Rank(1, 1, 1)}


def test_sign_flips_are_exact():
    d = np.array([0.3, 0.1, -0.05, 0.2, 0.15, 0.4, 0.02])
    means = [abs(np.mean(np.array(signs) * d)) for signs in itertools.product((1, -1), repeat=len(d))]
    expected = np.mean(np.array(means) >= abs(d.mean()) - 1e-12)
    assert comparison.sign_flip_p(d[None], np.zeros(7, int)) == pytest.approx([expected])
    scipys = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert expected == pytest.approx(scipys.pvalue)


def test_a_missing_unit_changes_nothing_of_a_sign_flip_test():
    d = np.array([[0.3, 0.1, np.nan, 0.2, 0.15, 0.4, -0.02]])
    strata = np.zeros(7, int)
    few = d[:, np.isfinite(d[0])]
    assert comparison.sign_flip_p(d, strata) == pytest.approx(comparison.sign_flip_p(few, strata[:6]))


def test_many_units_are_flipped_at_random():
    d = normal(1, size=(1, 40)) + 0.35
    found = comparison.sign_flip_p(d, np.zeros(40, int))[0]
    assert found == pytest.approx(stats.ttest_1samp(d[0], 0).pvalue, abs=0.01)
    assert found >= smallest_p(40)


def test_the_smallest_p():
    assert [smallest_p(n) for n in (1, 3, 5, 6, 10)] == [1, 0.25, 0.0625, 0.03125, 2 / 1024]
    assert smallest_p(1000) == smallest_p(16) == 1 / 2**15


def test_holm_is_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert len(holm(np.array([]))) == 0


def test_data_sets_are_the_unit_where_there_are_enough():
    methods = {"a": 0.5 + normal(2, size=(8, 3)) / 50, "b": 0.4 + normal(3, size=(8, 3)) / 50}
    found = compare(rows(methods), True)
    assert (found.unit, found.test, found.n) == ("data sets", "sign flips", 8)
    assert found.pair("a", "b").p == 2 / 2**8
    assert found.explain() == "8 data sets: sign-flip test, corrected for 1 pair (Holm); bootstrap intervals."
    four = compare(rows({name: x[:4] for name, x in methods.items()}), True)
    assert (four.unit, four.n, four.test) == ("seeds", 12, "sign flips"), "these four, and no others"
    five = compare(rows({name: x[:5] for name, x in methods.items()}), True)
    assert (five.unit, five.n, five.test) == ("data sets", 5, "t"), "five flips give 0.0625 at best"


def test_seeds_of_several_data_sets_keep_their_own_variances():
    x = [np.array([0.1, 0.2, 0.15]), np.array([0.5, 0.9, 0.1])]
    mean, error, df = (float(part[0]) for part in comparison.moments(np.concatenate(x)[None], np.repeat([0, 1], 3)))
    welch = stats.ttest_ind(x[0], -x[1], equal_var=False)  # the sum of two means, by Welch
    assert 2 * mean == pytest.approx(x[0].mean() + x[1].mean())
    assert (mean / error, df) == pytest.approx((welch.statistic, welch.df))


def test_splits_are_averaged_before_they_are_paired():
    a, b = np.array([0.61, 0.65, 0.66]), np.array([0.5, 0.51, 0.56])
    parts = [rows({"a": a + shift, "b": b - shift}, split=f"s{shift}") for shift in (-0.02, 0.0, 0.02)]
    found = compare(pd.concat(parts), True).pair("a", "b")
    assert found.n == 3
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_only_what_both_have_is_paired():
    table = rows({"a": np.array([0.61, 0.65, 0.66, 0.9]), "b": np.array([0.5, 0.51, 0.56, np.nan])})
    found = compare(table, True)
    assert found.pair("a", "b").n == 3
    assert found.pair("a", "b").difference == pytest.approx(0.35 / 3)
    alone = compare(table[(table["method"] == "a") | (table["seed"] == 0)], True)
    assert alone.pair("a", "b").verdict == NOT_TESTED
    assert alone.say("a", "b") == "a and b: not tested"
    assert alone.test == "none"
    apart = compare(pd.concat([rows({"a": np.ones(3)}), rows({"b": np.ones(3)}).assign(seed=[7, 8, 9])]), True)
    assert (apart.pair("b", "a").difference, apart.pair("b", "a").verdict) == (None, NOT_TESTED)


def test_what_no_seed_changes_is_exact_and_not_corrected_for():
    noisy = np.array([0.61, 0.65, 0.66])
    found = compare(rows({"a": np.full(3, 0.8), "b": np.full(3, 0.7), "c": np.full(3, 0.7), "net": noisy}), True)
    assert found.n_tested == 3, "those with net"
    pair = found.pair("a", "b")
    assert (pair.exact, pair.verdict, pair.p) == (True, ABOVE, None)
    assert found.pair("b", "c").verdict == NOT_SHOWN
    assert "No method changes with the seed" in compare(rows({"a": np.ones(3), "b": np.zeros(3)}), True).explain()
    same = compare(rows({"net": noisy, "copy": noisy}), True)
    assert (same.pair("net", "copy").verdict, same.pair("net", "copy").exact) == (NOT_SHOWN, True)
    parallel = compare(rows({"net": noisy, "other": noisy + 0.125}), True)
    assert parallel.pair("net", "other").verdict == NOT_TESTED, "t has no spread to go by"


def test_correction_hides_what_one_pair_alone_would_show():
    strong = {"a": np.array([0.61, 0.65, 0.66]), "b": np.array([0.5, 0.51, 0.56])}
    assert compare(rows(strong), True).pair("a", "b").verdict == ABOVE
    crowd = {f"m{i}": 0.5 + normal(4, i, size=3) / 20 for i in range(6)}
    found = compare(rows(strong | crowd), True)
    assert found.n_tested == 28
    assert found.pair("a", "b").verdict == LEANS_ABOVE
    assert found.say("b", "a") == "a above b before correction only"


def test_ranks_run_as_far_as_the_verdicts_leave_them():
    noise = np.array([[0.001, -0.001, 0.0], [-0.001, 0.0005, 0.0005], [0.0, 0.001, -0.001]])
    found = compare(rows({"a": 0.9 + noise[0], "b": 0.5 + 40 * noise[1], "c": 0.49 + 40 * noise[2]}), True)
    assert found.ranks() == {"a": Rank(1, 1, 1), "b": Rank(2, 2, 3), "c": Rank(3, 2, 3)}
    tied = compare(rows({"a": np.ones(3), "b": np.ones(3), "c": np.zeros(3)}), True)
    assert tied.ranks() == {"a": Rank(1, 1, 2), "b": Rank(1, 1, 2), "c": Rank(3, 3, 3)}


def test_a_method_that_lacks_a_data_set_has_no_rank():
    table = rows({"a": normal(5, size=(2, 3)), "b": normal(6, size=(2, 3))})
    found = compare(table[(table["method"] == "a") | (table["dataset"] == "d0")], True)
    assert list(found.ranks()) == ["a"]


def test_a_score_given_twice_is_refused():
    with pytest.raises(CellmillError, match="a/d0/mean/0 is there twice"):
        compare(pd.concat([rows({"a": np.ones(3)})] * 2), True)


# 200 simulations of two methods: shape of the values, that is, data sets and seeds, and by which test.
DESIGNS = {"3 seeds": ((1, 3), "t"), "8 seeds": ((1, 8), "sign flips"), "8 data sets": ((8, 3), "sign flips")}


def simulated(design: str, advantage: float):
    """200 comparisons; methods differ by `advantage` standard deviations, on data sets that suit one or the other."""
    (datasets, seeds), test = DESIGNS[design]
    for i in range(200):
        suits = normal(7, i, size=(datasets, 1)) if datasets > 1 else 0.0
        a, b = (normal(8, i, which, size=(datasets, seeds)) for which in (0, 1))
        found = compare(rows({"a": a + advantage + suits, "b": b}), True)
        assert found.test == test
        yield found.pair("a", "b")


@pytest.mark.parametrize("design", DESIGNS)
def test_equal_methods_are_called_equal_at_the_stated_rate(design):
    pairs = list(simulated(design, 0))
    called = sum(pair.verdict != NOT_SHOWN for pair in pairs)
    assert called <= stats.binom.ppf(0.99, 200, 0.05), "no more than 5 % of 200, but for chance"
    covered = sum(pair.low <= 0 <= pair.high for pair in pairs)
    assert covered >= stats.binom.ppf(0.01, 200, 0.93), "bootstrap intervals of few units may fall a little short"


@pytest.mark.parametrize(("design", "advantage"), [("3 seeds", 6), ("8 seeds", 3), ("8 data sets", 3)])
def test_a_planted_better_method_is_above(design, advantage):
    pairs = list(simulated(design, advantage))
    assert sum(pair.verdict == ABOVE and pair.low > 0 for pair in pairs) >= 180
    assert not any(pair.verdict == BELOW for pair in pairs)


def test_all_verdicts_hold_together_where_sixteen_methods_are_equal():
    wrong = 0
    for i in range(200):
        found = compare(rows({f"m{j:02}": normal(9, i, j, size=3) for j in range(16)}), True)
        wrong += any(pair.verdict in (ABOVE, BELOW) for pair in found.pairs.values())
        assert all(rank.low == 1 and rank.high == 16 for rank in found.ranks().values()) or wrong
    assert wrong <= stats.binom.ppf(0.99, 200, 0.05)


def annotation(labels_N, truth_N, batches_N, name: str, noise: float, seed: int) -> dict[str, float]:
    """Scores of naming the last batch's cells from the others, by the embedding "labels plus noise"."""
    x_NE = labels_embedding(labels_N, seed)
    x_NE = x_NE + noise * normal(10, seed, name, size=x_NE.shape).astype(np.float32)
    held_N = batches_N == np.unique(batches_N)[-1]
    said = knn_predict(x_NE[~held_N], truth_N[~held_N], x_NE[held_N], 15, "cosine")
    return agreement(truth_N[held_N], said)


@pytest.fixture(scope="module")
def target(data):
    return target_of(baron(data))


def test_on_real_cells_the_better_embedding_is_above_and_equal_ones_are_not_told_apart(target):
    noises = {"better": 0.35, "worse": 0.7, "equal": 0.7}
    labels = target.labels_N, target.labels_N
    methods = {
        name: np.array([annotation(*labels, target.batches_N, name, noise, seed)["macro_f1"] for seed in range(3)])
        for name, noise in noises.items()
    }
    found = compare(rows(methods), True)
    for other in ("worse", "equal"):
        pair = found.pair("better", other)
        assert (pair.verdict, pair.low > 0) == (ABOVE, True)
    assert found.pair("worse", "equal").verdict == NOT_SHOWN
    assert found.ranks()["better"] == Rank(1, 1, 1)


def test_on_real_cells_shuffled_labels_give_chance(target):
    n_types = len(np.unique(target.labels_N))
    accuracies = {"near": [], "far": []}
    for seed in range(3):
        order = np.argsort(uniform(seed, "test of shuffled labels", np.arange(len(target.labels_N))))
        for name, noise in (("near", 0.2), ("far", 0.7)):
            found = annotation(target.labels_N, target.labels_N[order], target.batches_N, name, noise, seed)
            accuracies[name].append(found["balanced_accuracy"])
            assert found["balanced_accuracy"] == pytest.approx(1 / n_types, abs=0.04)
    found = compare(rows({name: np.array(values) for name, values in accuracies.items()}), True)
    assert found.pair("near", "far").verdict == NOT_SHOWN
