"""A learning rate for a model: train for a few steps while the rate grows, and see where the loss falls fastest.

The range test of Smith (WACV 2017, arXiv 1506.01186) with a rate that grows exponentially, on the run's own shards,
batches, optimiser and arithmetic. Nothing is saved: the model is forgotten.

Legend: T steps.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from cellmill.checkpoints import build_model
from cellmill.device import set_up_torch
from cellmill.errors import CellmillError
from cellmill.models.base import GeneStatistics, total_loss
from cellmill.models.packing import Packing
from cellmill.pretrain import accumulate_gradients
from cellmill.progress import Progress
from cellmill.recipes import ModelRecipe
from cellmill.shards.dataset import Shards
from cellmill.shards.loader import Loader
from cellmill.training.micro_batches import read_step, views
from cellmill.training.optimizer import make_optimizer
from cellmill.training.parallel import Ranks, wrap
from cellmill.training.precision import prepare_blocks

LOWEST, HIGHEST = 1e-6, 1.0
"""The first rate and the last."""
WIDTH = 0.25
"""Decades of rates over which losses are averaged and slopes are fitted (standard deviation of a Gaussian weight)."""
MICRO_BATCH_TOKENS = 16384
"""Where the recipe leaves it open."""


@dataclass(frozen=True, kw_only=True)
class RateTest:
    """What became of the loss as the rate grew.

    Attributes
    ----------
    rates_T
        float64 [T], the rate of each step; the test ends early where the loss diverges.
    losses_T
        float64 [T], the loss of each step's batch before its update.
    smoothed_T
        float64 [T], the mean loss of neighbouring rates.
    suggestion
        The rate at which the smoothed loss falls fastest; None where it never falls.
    divergence
        The rate from which the smoothed loss has lost half of what it had gained; None if it never does.
    """

    rates_T: np.ndarray
    losses_T: np.ndarray
    smoothed_T: np.ndarray
    suggestion: float | None
    divergence: float | None


def find_rate(
    shards: Shards,
    statistics: GeneStatistics,
    recipe: ModelRecipe,
    *,
    seed: int = 0,
    steps: int = 100,
    name: str = "learning rate",
) -> RateTest:
    """Train a fresh model for `steps` steps, or until it diverges, while the rate grows from `LOWEST` to `HIGHEST`.

    Raises
    ------
    CellmillError
        If there are too few steps to see anything.
    """
    if steps < 20:
        raise CellmillError(f"--steps is {steps}; a learning rate cannot be found in fewer than 20")
    training = replace(recipe.training, compile="off", ranks=1, nodes=1)  # compiling takes longer than all steps
    device, autocast = set_up_torch(training)
    model = build_model(recipe, shards.n_genes, statistics, seed).to(device).train()
    limit = MICRO_BATCH_TOKENS if training.micro_batch_tokens == "auto" else training.micro_batch_tokens
    model.packing = Packing(training.packing)
    prepare_blocks(model, training, device)
    wrapped = wrap(model, training, Ranks())
    optimizer = make_optimizer(model, training)
    Ranks().seed(seed)
    rates_T, losses, n_cells = np.geomspace(LOWEST, HIGHEST, steps), [], 0
    with (
        Loader(shards, "train", training.batch_size, seed, categories=model.categories) as loader,
        Progress(f"{name}, learning rate", training.batch_size * steps) as bar,
    ):
        for step, rate in enumerate(rates_T.tolist()):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            cells, n_batches = read_step(
                loader, lambda cells: int(model.token_lengths(cells).sum()), training.batch_tokens
            )
            parts = views(model, cells, limit, device, seed=seed, step=step)
            losses.append(float(total_loss(accumulate_gradients(wrapped, parts, step, autocast))))
            if has_diverged(losses):
                break
            wrapped.clip(training.gradient_clip)
            optimizer.step()
            n_cells += n_batches * training.batch_size
            bar.total = n_cells * steps // (step + 1)
            bar.update(n_cells, f"rate {rate:.1e}, loss {losses[-1]:.4f}")
    return read_curve(rates_T[: len(losses)], np.array(losses))


def has_diverged(losses: list[float]) -> bool:
    """Whether there is no need to go on: the last loss is not finite, or far above all that came before it began."""
    if not math.isfinite(losses[-1]):
        return True
    recent, first = np.median(losses[-5:]), np.median(losses[:10])
    return len(losses) > 15 and recent > first + 2 * max(first - min(losses), abs(first) / 2)


def read_curve(rates_T: np.ndarray, losses_T: np.ndarray) -> RateTest:
    """Smooth a curve and find where it falls fastest and where it turns.

    The value and the slope at a rate are those of a line through the losses around it, weighed by their distance in
    log10 of the rate (local linear regression; Cleveland, JASA 1979), which lags behind no change.
    """
    finite_T = np.isfinite(losses_T)
    rates_T, losses_T = rates_T[finite_T], losses_T[finite_T]
    if len(rates_T) < 5:
        raise CellmillError(
            "the loss is not finite from the first steps on, at the smallest learning rate; look at the data, or set "
            "training.precision to float32"
        )
    place_T = np.log10(rates_T)
    distance_TT = place_T - place_T[:, None]
    weight_TT = np.exp(-0.5 * (distance_TT / WIDTH) ** 2)
    weight_TT /= weight_TT.sum(1, keepdims=True)
    centre_T = (weight_TT * distance_TT).sum(1)
    mean_T = weight_TT @ losses_T
    off_TT = distance_TT - centre_T[:, None]
    slope_T = (weight_TT * off_TT * (losses_T - mean_T[:, None])).sum(1) / (weight_TT * off_TT**2).sum(1)
    smoothed_T = mean_T - slope_T * centre_T
    lowest = int(np.argmin(smoothed_T))
    steepest = int(np.argmin(slope_T[: lowest + 1]))
    fall = smoothed_T[: lowest + 1].max() - smoothed_T[lowest]
    turned = np.flatnonzero(smoothed_T[lowest:] > smoothed_T[lowest] + fall / 2)
    return RateTest(
        rates_T=rates_T,
        losses_T=losses_T,
        smoothed_T=smoothed_T,
        suggestion=float(rates_T[steepest]) if slope_T[steepest] < 0 and lowest > 0 else None,
        divergence=float(rates_T[lowest + turned[0]]) if len(turned) else None,
    )
