"""What a task is: settings, metrics with their direction, and a way to score one embedding.

Legend: N cells, E width of an embedding.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np

from cellmill.tasks.data import Target


class Task:
    """Base of every task that scores cell embeddings. A module ``cellmill/tasks/NAME.py`` sets ``TASK`` to a subclass.

    Parameters
    ----------
    settings
        An instance of the subclass's `Settings`.
    cache
        Folder in which a task may keep compiled programs for later processes.
    """

    name: ClassVar[str]
    """The module's name; the column `task` of the scores."""
    regimes: ClassVar[tuple[str, ...]]
    """The regimes that it scores (`cellmill.scores.REGIMES`)."""
    metrics: ClassVar[dict[str, bool]]
    """Its metrics; True where higher is better."""
    Settings: ClassVar[type]
    """Plain frozen dataclass; field metadata holds each setting's description and bounds."""

    def __init__(self, settings, cache: Path | None = None):
        self.settings, self.cache = settings, cache

    def start(self) -> None:
        """Import and set up what `score` needs: called once, before the number of threads is limited."""

    def score(self, x_NE: np.ndarray, target: Target, seed: int) -> list[dict]:
        """Score one embedding.

        Parameters
        ----------
        x_NE
            float32 [N, E], the embedding of the cells ``target.rows_N``.
        target
            The labelled cells of the benchmark.
        seed
            Seed of all of the task's own randomness.

        Returns
        -------
        list of dict
            Rows of the table of scores with the columns that the task knows: split, regime, metric, value,
            higher_is_better, n, seconds, reason.
        """
        raise NotImplementedError

    def measure(self, function: Callable[[], dict[str, float]], metrics: tuple[str, ...], **columns) -> list[dict]:
        """Rows for `metrics`, from one call of `function`.

        A metric that cannot be computed is a row with a null value and the reason: `function` raised, or the value is
        not finite. `seconds` is the whole call's, since its metrics share their work.

        Parameters
        ----------
        function
            Gives the value of each of `metrics`.
        metrics
            Names that `function` gives.
        **columns
            split, regime and n.
        """
        start = time.perf_counter()
        reason, values = None, {}
        try:
            values = function()
        except NotPossible as error:
            reason = str(error)
        except Exception as error:  # whatever a metric's library raises, the other metrics and embeddings go on
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        seconds = time.perf_counter() - start
        rows = []
        for metric in metrics:
            value = values.get(metric)
            why = reason
            if why is None and not math.isfinite(value):
                value, why = None, f"the value is {value}"
            rows.append(
                {
                    **columns,
                    "metric": metric,
                    "value": None if value is None else float(value),
                    "higher_is_better": self.metrics[metric],
                    "seconds": seconds,
                    "reason": why,
                }
            )
        return rows


class NotPossible(Exception):
    """A metric has no value on this data, and why; the text becomes the row's reason."""


def check_finite(x_NE: np.ndarray) -> None:
    """Raise `NotPossible` if an embedding holds NaN or infinity."""
    broken = int((~np.isfinite(x_NE)).any(axis=1).sum())
    if broken:
        raise NotPossible(f"the embedding of {broken} of {len(x_NE)} cells holds NaN or infinity")
