"""Which methods differ: paired differences over data sets and seeds, corrected for the number of comparisons.

Two methods are compared by their differences on the same data set, split and seed. Splits are averaged first, since
they share cells. What is then drawn at random, the unit, is the data set where there are at least `MIN_DATASETS`; the
verdict holds for data sets like these. With fewer the unit is the seed within each data set, and the verdict holds for
these data sets only: it says nothing of other cells or donors.

Two tests, of which one serves all pairs of a comparison, chosen by the numbers of units and pairs alone:

* sign flips (exact up to 15 units), with a bootstrap interval, where so many units could show a difference at all: of
  n pairs no p is below 2 / 2**n, which the correction multiplies by the number of comparisons;
* elsewhere the paired t test and its interval, which suppose normal differences. Three seeds give p = 0.25 at best by
  sign flips, so every table of three seeds on one data set is of this sort.

Holm's correction is over all pairs of methods, of which there are many: what is shown before it only is said so, in
words of its own. Intervals are those of a single pair, not corrected. A rank's interval follows from the corrected
verdicts (`Comparison.ranks`).

Where neither method changes with the seed the difference is exact, of these cells, and takes no part in the correction.
Where both do, and yet differ by the same amount with every seed, t has no spread to go by: not tested.

Legend: M methods, P pairs, R rows (data set, split, seed), U units, S strata, B draws or sign patterns. A unit that a
pair does not have is NaN.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtr, stdtrit

from cellmill.errors import CellmillError
from cellmill.randomness import uniform

ALPHA = 0.05
MIN_DATASETS = 5
"""From so many data sets on they are the unit; sign flips of 5 give p = 0.0625 at best, of 6 p = 0.03125."""
DRAWS = 10_000
ABOVE, BELOW, NOT_SHOWN, NOT_TESTED = "above", "below", "no difference shown", "not tested"
LEANS_ABOVE, LEANS_BELOW = "above before correction only", "below before correction only"

_ROUNDING = 1e-12
_EXACT_UNITS = 15
_FLIPS = 2**15 - 1  # random sign patterns where there are more units


@dataclass(frozen=True)
class Pair:
    """How one method differs from another."""

    n: int
    """Units that both have."""
    difference: float | None
    """First minus second, in the metric's own unit; None where they share no unit."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the difference."""
    p: float | None = None
    """Holm-corrected; None where nothing is random or nothing could be tested."""
    verdict: str = NOT_TESTED
    """`ABOVE` where the first is better (a lower loss too is above), `LEANS_ABOVE`, `BELOW`, ..., `NOT_TESTED`."""
    exact: bool = False
    """Neither method changes with the seed, or both give the same everywhere: known, of these cells, without a test."""

    def turned(self) -> "Pair":
        """The second against the first."""
        if self.difference is None:
            return self
        ends = (None, None) if self.low is None else (-self.high, -self.low)
        turned = _TURNED.get(self.verdict, self.verdict)
        return Pair(self.n, -self.difference, *ends, self.p, turned, self.exact)


_TURNED = {ABOVE: BELOW, BELOW: ABOVE, LEANS_ABOVE: LEANS_BELOW, LEANS_BELOW: LEANS_ABOVE}


@dataclass(frozen=True)
class Rank:
    """A method's rank, and between which ranks the verdicts leave it."""

    rank: int
    low: int
    high: int


@dataclass(frozen=True)
class Comparison:
    """All pairs of methods of one comparison."""

    methods: tuple[str, ...]
    pairs: dict[tuple[str, str], Pair]
    means: dict[str, float]
    """Mean over data sets of the mean over splits and seeds, of each method that has a value on every data set."""
    higher_is_better: bool
    unit: str
    """``data sets`` or ``seeds``."""
    n: int
    """Units of the tested pairs, at least."""
    n_datasets: int
    n_tested: int
    """Pairs that were tested, for which Holm corrects."""
    test: str
    """``sign flips``, ``t`` or, without a tested pair, ``none``."""

    def pair(self, one: str, other: str) -> Pair:
        """How `one` differs from `other`."""
        return self.pairs[one, other] if (one, other) in self.pairs else self.pairs[other, one].turned()

    def say(self, one: str, other: str) -> str:
        """The verdict in words, such as ``a above b``."""
        verdict = self.pair(one, other).verdict
        if verdict in (BELOW, LEANS_BELOW):
            return self.say(other, one)
        if verdict in (NOT_SHOWN, NOT_TESTED):
            return f"{one} and {other}: {verdict}"
        return f"{one} {verdict.replace(ABOVE, f'{ABOVE} {other}', 1)}"

    def ranks(self) -> dict[str, Rank]:
        """Ranks by mean, ties sharing the better one, with an interval.

        The interval runs from one more than the number of methods shown to be above, to as many fewer than all as are
        shown to be below. As all verdicts hold together with 95 %, so do all intervals (Mogstad, Romano, Shaikh and
        Wilhelm, Review of Economic Studies 2024). Ranks are not bootstrapped: near ties that does not converge to the
        right interval (Hall and Miller, Annals of Statistics 2009), and three seeds have ten different resamples.
        """
        sign = 1 if self.higher_is_better else -1
        ranks = {}
        for one, mean in self.means.items():
            verdicts = [self.pair(one, other).verdict for other in self.means if other != one]
            better = sum(sign * other > sign * mean for other in self.means.values())
            ranks[one] = Rank(1 + better, 1 + verdicts.count(BELOW), len(self.means) - verdicts.count(ABOVE))
        return ranks

    def explain(self) -> str:
        """By which test the verdicts came about, and what they hold for."""
        if self.test == "none":
            if any(pair.exact for pair in self.pairs.values()):
                return "No method changes with the seed, so that differences are exact, of these cells."
            return "No pair could be tested: that takes two seeds with values of both methods."
        said = f"{self.n} data sets"
        if self.unit == "seeds":
            said = f"{_counted(self.n, 'paired seed')} on {_counted(self.n_datasets, 'data set')}"
        family = f"corrected for {_counted(self.n_tested, 'pair')} (Holm)"
        least = smallest_p(self.n)
        if self.test == "sign flips":
            return f"{said}: sign-flip test, {family}; bootstrap intervals."
        corrected = f", {min(1, self.n_tested * least):.2g} corrected" if self.n_tested > 1 else ""
        return (
            f"{said} cannot show a difference by sign flips (smallest p {least:.2g}{corrected}), so tests and "
            f"intervals are Student's t of paired differences, which supposes that they are normal; {family}."
        )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def compare(rows: pd.DataFrame, higher_is_better: bool) -> Comparison:
    """Compare all pairs of methods of one task, regime and metric.

    Parameters
    ----------
    rows
        Columns ``method, dataset, split, seed, value``, one row for each; a missing value is NaN. A split that is the
        mean of others must not stand beside them.
    higher_is_better
        Direction of the metric.

    Raises
    ------
    CellmillError
        If a method has two values for the same data set, split and seed.
    """
    keys = ["dataset", "split", "seed"]
    twice = rows[rows.duplicated(["method", *keys])]
    if len(twice):
        found = "/".join(str(twice[name].iloc[0]) for name in ["method", *keys])
        raise CellmillError(f"the score {found} is there twice, so it cannot be paired; keep one of them")
    wide = rows.pivot(index="method", columns=keys, values="value")
    methods, x_MR = tuple(wide.index), wide.to_numpy(np.float64)
    dataset_R = wide.columns.get_level_values("dataset").factorize()[0]
    unit_R = wide.columns.droplevel("split").factorize()[0]
    dataset_U = dataset_R[np.unique(unit_R, return_index=True)[1]]
    n_datasets = int(dataset_R.max(initial=-1)) + 1
    over_datasets = n_datasets >= MIN_DATASETS

    a_P, b_P = np.triu_indices(len(methods), 1)
    d_PU, stratum_U = _group_means(x_MR[a_P] - x_MR[b_P], unit_R), dataset_U
    if over_datasets:
        d_PU, stratum_U = _group_means(d_PU, dataset_U), np.zeros(n_datasets, np.int64)
    n_P = np.isfinite(d_PU).sum(axis=1)
    difference_P, error_P, _ = moments(d_PU, stratum_U)
    fixed_M = ~_changes(_group_means(x_MR, unit_R), dataset_U) & (not over_datasets)
    same_P = (np.nan_to_num(d_PU) == 0).all(axis=1)
    exact_P = ((fixed_M[a_P] & fixed_M[b_P]) | same_P) & (n_P > 1)
    tested_P = ~exact_P & (error_P > _ROUNDING * np.abs(difference_P))

    n, n_tested = int(n_P[tested_P].min(initial=n_P.max(initial=0))), int(tested_P.sum())
    flips = n_tested > 0 and smallest_p(n) * n_tested <= ALPHA
    low_P, high_P = np.where(exact_P, difference_P, np.nan), np.where(exact_P, difference_P, np.nan)
    p_P = np.where(exact_P, np.where(difference_P == 0, 1.0, 0.0), np.nan)
    corrected_P = p_P.copy()
    interval, test = (bootstrap_interval, sign_flip_p) if flips else (t_interval, t_p)
    low_P[tested_P], high_P[tested_P] = interval(d_PU[tested_P], stratum_U)
    p_P[tested_P] = test(d_PU[tested_P], stratum_U)
    corrected_P[tested_P] = holm(p_P[tested_P])

    pairs = {}
    columns = zip(a_P, b_P, n_P, difference_P, low_P, high_P, p_P, corrected_P, exact_P, strict=True)
    for a, b, n_units, difference, low, high, p, corrected, exact in columns:
        pairs[methods[a], methods[b]] = Pair(
            n=int(n_units),
            difference=_or_none(difference),
            low=_or_none(low),
            high=_or_none(high),
            p=None if exact else _or_none(corrected),
            verdict=_verdict(difference, p, corrected, higher_is_better),
            exact=bool(exact),
        )
    mean_MS = _group_means(_group_means(x_MR, unit_R), dataset_U)
    complete = np.isfinite(mean_MS).all(axis=1)
    return Comparison(
        methods=methods,
        pairs=pairs,
        means={methods[m]: float(mean_MS[m].mean()) for m in np.flatnonzero(complete)},
        higher_is_better=higher_is_better,
        unit="data sets" if over_datasets else "seeds",
        n=n,
        n_datasets=n_datasets,
        n_tested=n_tested,
        test=("sign flips" if flips else "t") if n_tested else "none",
    )


def holm(p_P: np.ndarray) -> np.ndarray:
    """P values corrected for their number (Holm, Scandinavian Journal of Statistics 1979), in their order."""
    order = np.argsort(p_P, kind="stable")
    corrected_P = np.empty(len(p_P))
    corrected_P[order] = np.minimum(1, np.maximum.accumulate(p_P[order] * np.arange(len(p_P), 0, -1)))
    return corrected_P


def smallest_p(n: int) -> float:
    """The smallest p that sign flips of `n` units can reach, at most as many as patterns are drawn."""
    return max(2.0 ** (1 - n), 1 / (1 + _FLIPS)) if n else 1.0


def moments(d_PU: np.ndarray, stratum_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over strata of their means, its standard error and degrees of freedom (Welch-Satterthwaite), each [P].

    With one stratum that is the usual error of a mean with n - 1. A stratum of which a pair has no unit does not count;
    where it has one unit only, error and degrees of freedom are NaN.
    """
    here_PU, strata_US = np.isfinite(d_PU), stratum_U[:, None] == np.unique(stratum_U)
    n_PS = here_PU @ strata_US.astype(np.float64)
    mean_PS = _group_means(d_PU, stratum_U)
    deviation_PU = np.where(here_PU, d_PU - mean_PS[:, np.unique(stratum_U, return_inverse=True)[1]], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        n_strata_P = (n_PS > 0).sum(axis=1)
        variance_PS = (deviation_PU**2 @ strata_US) / (n_PS - 1) / n_PS / n_strata_P[:, None] ** 2
        variance_PS = np.where(n_PS > 0, np.where(n_PS > 1, variance_PS, np.nan), 0)
        freedom_PS = np.where(n_PS > 1, n_PS - 1, 1)
        variance_P = variance_PS.sum(axis=1)
        df_P = variance_P**2 / (variance_PS**2 / freedom_PS).sum(axis=1)
        mean_P = np.where(n_PS > 0, mean_PS, 0).sum(axis=1) / n_strata_P
    return mean_P, np.sqrt(variance_P), df_P


def t_interval(d_PU: np.ndarray, stratum_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of each pair's mean difference by Student's t."""
    mean_P, error_P, df_P = moments(d_PU, stratum_U)
    half_P = stdtrit(df_P, 1 - ALPHA / 2) * error_P
    return mean_P - half_P, mean_P + half_P


def t_p(d_PU: np.ndarray, stratum_U: np.ndarray) -> np.ndarray:
    """Two-sided p of each pair by the paired t test; with several strata their variances stay apart."""
    mean_P, error_P, df_P = moments(d_PU, stratum_U)
    return 2 * stdtr(df_P, -np.abs(mean_P) / error_P)


def sign_flip_p(d_PU: np.ndarray, stratum_U: np.ndarray) -> np.ndarray:
    """Two-sided p of each pair, whose differences are as likely of either sign if the methods are equal.

    Exact up to 15 units. A unit that is missing weighs nothing, so that its sign changes nothing.
    """
    weighted_PU = _weights(d_PU, stratum_U) * np.nan_to_num(d_PU)
    signs_BU = _signs(d_PU.shape[1])
    found_P = np.abs(weighted_PU.sum(axis=1)) * (1 - _ROUNDING)
    extreme_P = np.array(
        [np.count_nonzero(np.abs(signs_BU @ w_U) >= least) for w_U, least in zip(weighted_PU, found_P, strict=True)]
    )
    if d_PU.shape[1] <= _EXACT_UNITS:
        return extreme_P / len(signs_BU)
    return (1 + extreme_P) / (1 + len(signs_BU))


def bootstrap_interval(d_PU: np.ndarray, stratum_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of each pair's mean difference, units resampled within their stratum.

    A data set is resampled whole, with its seeds: its mean holds their noise already, which drawing them again would
    count twice (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Percentile intervals
    of few units are too narrow: deviations are scaled by sqrt(n / (n - 1)), and the percentiles are those of t, not of
    the normal distribution (Hesterberg, The American Statistician 2015).
    """
    mean_P, _, df_P = moments(d_PU, stratum_U)
    weights_PU, here_PU = _weights(d_PU, stratum_U), np.isfinite(d_PU)
    tail_P = ndtr(stdtrit(df_P, ALPHA / 2))
    low_P, high_P = np.empty(len(d_PU)), np.empty(len(d_PU))
    for p, here_U in enumerate(here_PU):
        strata_U, d_U = stratum_U[here_U], d_PU[p, here_U]
        _, code_U, n_S = np.unique(strata_U, return_inverse=True, return_counts=True)
        centred_U = (d_U - (np.bincount(code_U, d_U) / n_S)[code_U]) * np.sqrt(n_S / (n_S - 1))[code_U]
        drawn_B = _resamples(code_U.tobytes()) @ (weights_PU[p, here_U] * centred_U)
        low_P[p], high_P[p] = mean_P[p] + np.quantile(drawn_B, [tail_P[p], 1 - tail_P[p]])
    return low_P, high_P


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _verdict(difference: float, p: float, corrected: float, higher_is_better: bool) -> str:
    if np.isnan(p):
        return NOT_TESTED
    if p > ALPHA:
        return NOT_SHOWN
    better = (difference > 0) == higher_is_better
    if corrected > ALPHA:
        return LEANS_ABOVE if better else LEANS_BELOW
    return ABOVE if better else BELOW


def _group_means(x_PR: np.ndarray, group_R: np.ndarray) -> np.ndarray:
    """[P, groups] means of what is there of each group; NaN where nothing is."""
    groups_RG = (group_R[:, None] == np.unique(group_R)).astype(np.float64)
    here_PR = np.isfinite(x_PR)
    with np.errstate(invalid="ignore"):
        return (np.where(here_PR, x_PR, 0) @ groups_RG) / (here_PR @ groups_RG)


def _changes(x_MU: np.ndarray, dataset_U: np.ndarray) -> np.ndarray:
    """[M]: whether a method's values change with the seed on any data set."""
    here_MU = np.isfinite(x_MU)
    top_MU, bottom_MU = np.where(here_MU, x_MU, -np.inf), np.where(here_MU, x_MU, np.inf)
    of_datasets = [dataset_U == dataset for dataset in np.unique(dataset_U)]
    return np.any([top_MU[:, own].max(axis=1) > bottom_MU[:, own].min(axis=1) for own in of_datasets], axis=0)


def _weights(d_PU: np.ndarray, stratum_U: np.ndarray) -> np.ndarray:
    """[P, U]: weight of each unit in the mean over strata of their means, 0 where it is missing."""
    here_PU, strata_US = np.isfinite(d_PU), stratum_U[:, None] == np.unique(stratum_U)
    n_PS = here_PU @ strata_US.astype(np.float64)
    n_PU = n_PS @ strata_US.T
    return np.where(here_PU, 1 / np.maximum(1, n_PU * (n_PS > 0).sum(axis=1, keepdims=True)), 0)


@lru_cache(maxsize=4)
def _signs(n: int) -> np.ndarray:
    """[B, n] of -1 and 1: all patterns with the last sign kept (the other half mirrors them), or random ones."""
    if n <= _EXACT_UNITS:
        return 1.0 - 2.0 * (np.arange(2 ** (n - 1))[:, None] >> np.arange(n)[None] & 1)
    return 1.0 - 2.0 * (uniform(0, "sign flips", np.arange(_FLIPS)[:, None], np.arange(n)[None]) < 0.5)


@lru_cache(maxsize=8)
def _resamples(strata: bytes) -> np.ndarray:
    """[B, U]: how often each unit is drawn, with replacement from its own stratum; `strata` is int64 [U] as bytes."""
    stratum_U = np.frombuffer(strata, np.int64)
    drawn_BU = uniform(0, "bootstrap", np.arange(DRAWS)[:, None], np.arange(len(stratum_U))[None])
    counts_BU = np.zeros(drawn_BU.shape)
    for stratum in np.unique(stratum_U):
        members = np.flatnonzero(stratum_U == stratum)
        chosen_BU = members[(drawn_BU[:, members] * len(members)).astype(np.int64)]
        np.add.at(counts_BU, (np.arange(DRAWS)[:, None], chosen_BU), 1)
    return counts_BU
