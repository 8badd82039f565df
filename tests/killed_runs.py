"""A training process that kills itself at a chosen moment."""

import importlib
import os
import signal
from pathlib import Path

from cellmill.shards.dataset import Shards
from cellmill.training import meter
from small_runs import train


def child(shards: str, name: str, out: str, state: str, moment: tuple | None, training: dict) -> None:
    """One process of a run, with these changes of its training."""
    meter.cpu_peak = lambda *_: 1e11  # a fifth of a second each time, and no test reads it
    if moment:
        _die_at(*moment)
    train(Shards(shards), name, Path(out), Path(state), **training)


def _die_at(where: str, call: int, when: str) -> None:
    """Replace a function by one that kills the process in its `call`-th call: before, after or half through it."""
    module, _, path = where.partition(":")
    *holders, attribute = path.split(".")
    holder = importlib.import_module(module)
    for part in holders:
        holder = getattr(holder, part)
    original, calls = getattr(holder, attribute), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) < call:
            return original(*args, **kwargs)
        if when != "before":
            result = original(*args, **kwargs)
        if when == "half":  # the file that was just written loses its second half
            os.truncate(args[1], args[1].stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, attribute, deadly)
