"""Training state on disk, from which a killed run goes on.

Each state is a folder ``step-NNNNNNNN`` of its own: ``tensors.safetensors``, ``log.parquet`` and ``state.json``, whose
hashes bind the three. It is written under a temporary name, forced to the disk and renamed, and only then are older
states removed. So at whatever instant the process dies, the newest folder with a proper name is whole.

`Aside` writes while training goes on, of tensors that were copied.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cellmill.checkpoints import write_tensors
from cellmill.files import sha256, sync, unwritable

TENSORS, LOG, RECORD = "tensors.safetensors", "log.parquet", "state.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that the rest of a training run depends on.

    Attributes
    ----------
    step
        Optimiser steps done.
    seconds
        Time spent on them, over all processes.
    cells, genes
        Cells, and their expressed genes, that all ranks read in them.
    limit
        Tokens of a micro batch at most.
    loader
        The loader's ``state_dict()``.
    tensors
        Weights, moments and random states by name.
    log
        The log so far.
    """

    step: int
    seconds: float
    cells: int
    genes: int
    limit: int
    loader: dict
    tensors: dict[str, torch.Tensor]
    log: pa.Table


def save_state(folder: Path, state: State, fingerprint: str) -> None:
    """Add `state` to `folder`, then remove older states.

    Raises
    ------
    CellmillError
        If it cannot be written; the previous state is then still there.
    """
    final, temporary = folder / f"step-{state.step:08d}", folder / f".step-{state.step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_tensors(state.tensors, temporary / TENSORS)
        pq.write_table(state.log, temporary / LOG)
        record = {
            "fingerprint": fingerprint,
            "step": state.step,
            "seconds": state.seconds,
            "cells": state.cells,
            "genes": state.genes,
            "limit": state.limit,
            "loader": state.loader,
            "sha256": {name: sha256(temporary / name) for name in (TENSORS, LOG)},
        }
        (temporary / RECORD).write_text(json.dumps(record))
        for path in (temporary / TENSORS, temporary / LOG, temporary / RECORD, temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that this run did not start from
        os.rename(temporary, final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritable(final, error) from error
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


class Aside:
    """One thread that writes states, one at a time, while the caller goes on.

    Used as a context, which is left when the last state is written. What goes wrong is raised there, or by the next
    call.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "cellmill-state")
        self._writing: Future | None = None

    def __enter__(self) -> "Aside":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()

    def write(self, state: State, save: Callable[[State], None]) -> None:
        """Have `save` called with a copy of `state`, once the state before is written."""
        self.wait()
        kept = replace(state, tensors={name: _copy(tensor) for name, tensor in state.tensors.items()})
        self._writing = self._thread.submit(save, kept)

    def check(self) -> None:
        """Raise what has gone wrong so far, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was handed over is written.

        Raises
        ------
        CellmillError
            If it could not be.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that does not follow the original."""
    return tensor.detach().to("cpu", copy=True)


def load_state(folder: Path, fingerprint: str) -> tuple[State | None, list[str]]:
    """The newest usable state under `folder`, and one line for every state that is not used.

    A state is not used when it is damaged, or when it belongs to another recipe, seed, corpus or code (`fingerprint`).
    """
    remarks = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = json.loads((path / RECORD).read_text())
            if record["fingerprint"] != fingerprint:
                remarks.append(f"{path} is not used: it belongs to another recipe, seed, corpus or version of the code")
                continue
            damaged = [name for name, digest in record["sha256"].items() if sha256(path / name) != digest]
            if damaged:
                remarks.append(f"{path} is not used: {damaged[0]} is damaged")
                continue
            progress = {key: record[key] for key in ("step", "seconds", "cells", "genes", "limit", "loader")}
            return State(**progress, tensors=load_file(path / TENSORS), log=pq.read_table(path / LOG)), remarks
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            remarks.append(f"{path} is not used: it is damaged ({error})")
    return None, remarks
