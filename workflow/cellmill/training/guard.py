"""When training should not go on: a number that is not finite, a loss that jumps, validations that bring no more."""

import math
from collections import deque
from statistics import median

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from cellmill.recipes import Training

WINDOW = 50
"""Steps whose median loss a spike is measured by."""
FEWEST = 10
"""Steps without which there is no median to speak of."""


class Guard:
    """Watches the losses of a run.

    Parameters
    ----------
    training
        ``spike_factor``: how many times the median of the last `WINDOW` losses a loss may be (None: any).
        ``warmup_steps``: no spike is looked for in them. ``early_stop``: validations without a better loss after
        which training ends (None: never).
    """

    def __init__(self, training: Training):
        self.training = training
        self._losses = deque(maxlen=WINDOW)
        self._best, self.worse = math.inf, 0

    def check(self, step: int, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is.

        Parameters
        ----------
        step
            Optimiser steps done, this one included.
        loss
            Its loss, over all ranks.
        gradient_norm
            The norm of its gradient before clipping.
        """
        for metric, value in (("loss", loss), ("gradient_norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{metric} became {value} at step {step}"
        factor = self.training.spike_factor
        if factor and step > self.training.warmup_steps and len(self._losses) >= FEWEST:
            usual = median(self._losses)
            if usual > 0 and loss > factor * usual:
                return (
                    f"the loss jumped to {loss:.4g} at step {step}, {loss / usual:.1f} times the median {usual:.4g} of "
                    f"the {len(self._losses)} steps before (training.spike_factor is {factor:g})"
                )
        self._losses.append(loss)
        return None

    def validated(self, loss: float) -> None:
        """Hear the loss of a validation."""
        self.worse = 0 if loss < self._best else self.worse + 1
        self._best = min(self._best, loss)

    @property
    def out_of_patience(self) -> bool:
        """Whether ``early_stop`` validations in a row were no better than the best before them."""
        return self.training.early_stop is not None and self.worse >= self.training.early_stop

    def recall(self, log: pa.Table) -> None:
        """Hear again what the log of earlier processes holds (of training losses, those that were logged)."""
        for row in log.filter(pc.equal(log["metric"], "loss")).to_pylist():
            if row["split"] == "train":
                self._losses.append(row["value"])
            elif row["split"] == "validation":
                self.validated(row["value"])


def clip_gradients(model: nn.Module, limit: float) -> tuple[Tensor, Tensor]:
    """Scale gradients so that their norm is at most `limit`, as ``torch.nn.utils.clip_grad_norm_``, to the bit.

    Returns
    -------
    tuple
        The norm before, float32 []; and that of each parameter that has a gradient, float32 [P], which a gradient
        that is not finite would otherwise take with it.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms_P = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms_P)
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm, norms_P


def largest_norms(model: nn.Module, norms_P: Tensor, n: int = 10) -> dict[str, float]:
    """The `n` largest of the norms of `clip_gradients` by parameter, those that are not finite first."""
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    by_size = sorted(
        zip(names, norms_P.tolist(), strict=True),
        key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf,
        reverse=True,
    )
    return dict(by_size[:n])
