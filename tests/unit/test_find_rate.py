"""The learning-rate finder: what it reads from a curve, and what it says of real cells."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.shards.statistics import compute_statistics
from cellmill.training import find_rate as module
from cellmill.training.find_rate import HIGHEST, LOWEST, find_rate, has_diverged, read_curve
from small_runs import RECIPES, make_corpus, train

RECIPE = replace(RECIPES["geneformer"], training=replace(RECIPES["geneformer"].training, batch_size=32, warmup_steps=2))


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


def curve(fall_at: float, rise_at: float, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A loss that falls from 9 to 7 around one rate, and rises again around another."""
    rates_T = np.geomspace(LOWEST, HIGHEST, 100)
    place_T = np.log10(rates_T)
    falls_T = 2 / (1 + np.exp(-5 * (place_T - np.log10(fall_at))))
    rises_T = 5 / (1 + np.exp(-9 * (place_T - np.log10(rise_at))))
    return rates_T, 9 - falls_T + rises_T + noise * np.random.default_rng(0).normal(size=100)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("fall_at", [3e-5, 1e-3])
def test_the_steepest_descent_is_found(fall_at, noise):
    test = read_curve(*curve(fall_at, 0.1, noise))
    assert abs(np.log10(test.suggestion / fall_at)) < 0.25
    assert 0.03 < test.divergence < 0.2
    assert np.abs(test.smoothed_T - curve(fall_at, 0.1)[1])[:70].max() < 0.2


def test_a_loss_that_never_rises_does_not_diverge():
    rates_T, losses_T = curve(1e-2, 1e9)
    assert read_curve(rates_T, losses_T).divergence is None


def test_a_loss_that_never_falls_has_no_suggestion():
    rates_T = np.geomspace(LOWEST, HIGHEST, 50)
    assert read_curve(rates_T, np.linspace(5, 9, 50)).suggestion is None


def test_what_is_not_finite_ends_the_curve():
    rates_T, losses_T = curve(1e-3, 1e9)
    losses_T[80:] = np.nan
    test = read_curve(rates_T, losses_T)
    assert len(test.rates_T) == len(test.losses_T) == len(test.smoothed_T) == 80
    assert abs(np.log10(test.suggestion / 1e-3)) < 0.25
    with pytest.raises(CellmillError, match="not finite from the first steps on"):
        read_curve(rates_T, np.full(100, np.nan))


def test_the_test_ends_where_the_loss_diverges():
    losses = [*np.linspace(9, 7, 30).tolist(), *[30.0] * 5]
    assert not has_diverged(losses[:30])
    assert not has_diverged([9.0] * 14 + [40.0])  # one batch is no divergence
    assert has_diverged(losses)
    assert has_diverged([9.0, float("inf")])


def test_too_few_steps_are_refused(corpus):
    with pytest.raises(CellmillError, match="cannot be found in fewer than 20"):
        find_rate(corpus, compute_statistics(corpus), RECIPE, steps=10)


def test_the_suggestion_trains_as_well_as_ten_times_more_or_less(corpus, tmp_path, monkeypatch):
    """So small a model is as content with more (to 0.02 nats). The test is the same each time and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    statistics = compute_statistics(corpus)
    test, again = (find_rate(corpus, statistics, RECIPE, steps=60) for _ in range(2))
    assert np.array_equal(test.losses_T, again.losses_T)
    assert list(tmp_path.iterdir()) == []
    assert torch.is_grad_enabled()
    losses = {}
    for factor in (0.1, 1, 10):
        out = tmp_path / str(factor)
        changed = {"batch_size": 32, "warmup_steps": 5, "steps": 60, "validate_every": 60, "checkpoint_every": 60}
        train(corpus, "geneformer", out, tmp_path / "s", learning_rate=factor * test.suggestion, **changed)
        log = pq.read_table(out / "log.parquet").to_pylist()
        rows = [row for row in log if (row["split"], row["metric"], row["step"]) == ("validation", "loss", 60)]
        losses[factor] = rows[0]["value"]
    assert losses[1] < losses[0.1] - 0.1
    assert losses[1] < losses[10] + 0.02
    assert LOWEST < test.suggestion < (test.divergence or HIGHEST)


def test_steps_have_the_tokens_that_the_recipe_says(corpus, monkeypatch):
    seen, views = [], module.views
    monkeypatch.setattr(
        module, "views", lambda model, cells, *a, **k: seen.append(cells) or views(model, cells, *a, **k)
    )
    training = replace(RECIPE.training, batch_size=8, batch_tokens=1000)
    test = find_rate(corpus, compute_statistics(corpus), replace(RECIPE, training=training), steps=20)
    assert [len(cells) for cells in seen] == [16] * len(test.losses_T)  # of 64 tokens a cell at most
