"""Pretraining: from shards and a recipe to a checkpoint and a log, with exact resume.

A run is a pure function of (shards, statistics, recipe, seed): what a cell's view hides is keyed by (seed, step, cell),
the order of the cells by the seed, and dropout by torch's generators, whose states are saved. On the CPU every
operation is deterministic, so a run that was killed and went on ends in the same weights, to the bit, as one that was
not.
"""

import dataclasses
import hashlib
import math
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cellmill import __version__
from cellmill.checkpoints import build_model, fill_model, model_tensors, save_checkpoint, vocabulary_hash
from cellmill.device import set_up_torch
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import mean_losses, spread_batches
from cellmill.files import atomic
from cellmill.models.base import CellModel, GeneStatistics, Inputs, Losses, LossTerm, to_device, total_loss
from cellmill.training.optimizer import fill_optimizer, learning_rate, make_optimizer, optimizer_tensors
from cellmill.progress import Progress
from cellmill.provenance import content_hash
from cellmill.randomness import hash64
from cellmill.recipes import ModelRecipe
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.loader import Loader
from cellmill.training.state import State, load_state, save_state

LOG = "log.parquet"
LOG_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimiser steps done
        ("split", pa.string()),
        ("metric", pa.string()),  # loss, its terms, learning_rate, gradient_norm; cells, genes: read so far
        ("value", pa.float64()),
        ("seconds", pa.float64()),  # of training so far, over all processes
    ]
)


def pretrain(
    shards: Shards,
    statistics: GeneStatistics,
    recipe: ModelRecipe,
    *,
    name: str,
    seed: int,
    out: Path,
    state: Path,
    meta: dict,
) -> None:
    """Train a model, or go on training it, and write its checkpoint and log.

    Parameters
    ----------
    shards
        The corpus: splits ``train`` and, where there are held-out cells, ``validation``.
    statistics
        The corpus statistics of the training split.
    recipe
        The model and its training.
    name
        The model's name, for messages.
    seed
        Decides the initial weights, the order of the cells, what is hidden of them, and dropout.
    out
        Folder that gets ``checkpoint.safetensors``, ``checkpoint.json`` and ``log.parquet``.
    state
        Folder for the training state; a killed run goes on from it, and it is removed when `out` is complete.
    meta
        Provenance for ``checkpoint.json``. ``feature_ids``, the vocabulary's ordered gene ids, is required. A changed
        ``code_version`` makes an older training state unusable.

    Raises
    ------
    CellmillError
        If the input does not fit, the loss or its gradient is not finite, or a file cannot be written. The last state
        is kept.
    """
    out, state, training = Path(out), Path(state), recipe.training
    shards.check_vocabulary(vocabulary_hash(meta["feature_ids"]))
    fingerprint = _fingerprint(shards, statistics, recipe, seed, meta)
    found, remarks = load_state(state, fingerprint)
    run = _Run(shards, statistics, recipe, seed)
    n_cells = training.batch_size * training.steps
    n_done = training.batch_size * found.step if found else 0
    with run.loader, Progress(f"{name} seed {seed}", n_cells, n_done) as progress:
        for remark in remarks:
            progress.say(remark)
        if found:
            run.restore(found)
            progress.say(f"goes on from step {run.step} of {training.steps}")
        run.train(state, fingerprint, progress)
    provenance = {
        **meta,
        "name": name,
        "seed": seed,
        "steps": training.steps,
        "recipe": {key: value for key, value in dataclasses.asdict(recipe).items() if key != "embedding"},
        "corpus": {"organism": shards.manifest["organism"], "census": shards.manifest["census"]},
        "primary_only": shards.primary_only,
        "datasets": sorted(set().union(*(shards.datasets(split) for split in shards.splits))),
        "shards_hash": content_hash(shards.manifest),
    }
    save_checkpoint(out, run.model, provenance)
    with atomic(out / LOG) as path:
        pq.write_table(run.log.table(), path)
    shutil.rmtree(state, ignore_errors=True)


class _Run:
    """One training run between its first and its last step."""

    def __init__(self, shards: Shards, statistics: GeneStatistics, recipe: ModelRecipe, seed: int):
        training = recipe.training
        self.training, self.seed = training, seed
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size, training.batch_size)
        self.device, self.autocast = set_up_torch(training)
        self.model = build_model(recipe, shards.n_genes, statistics, seed).to(self.device)
        self.optimizer = make_optimizer(self.model, training)
        self.loader = Loader(shards, "train", training.batch_size, seed, categories=self.model.categories)
        self.validation = []
        if "validation" in shards.splits and shards.n_cells("validation"):
            size, n_cells = self.micro_batch_size, training.validation_cells
            self.validation = list(spread_batches(shards, "validation", size, n_cells, self.model.categories))
        self.log = _Log()
        self.step, self.genes = 0, 0
        self.seconds_before, self.began = 0.0, time.monotonic()
        torch.manual_seed(int(hash64(seed, "dropout").view("int64")[0]))  # of the CPU and of every GPU

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all processes."""
        return self.seconds_before + time.monotonic() - self.began

    def train(self, folder: Path, fingerprint: str, progress: Progress) -> None:
        """Take the steps that are left; validate, log and save states (under `folder`) on the way."""
        training = self.training
        if self.step == 0:
            self._validate()
        self.model.train()
        if self.step < training.steps:
            batch, parts = self._next_batch()
        while self.step < training.steps:
            position = self.loader.state_dict()
            measured = self._update(parts)
            self.step, self.genes = self.step + 1, self.genes + len(batch.genes)
            if self.step < training.steps:  # made while a GPU still works on the step
                batch, parts = self._next_batch()
            loss = self._record(measured)
            progress.update(self.step * training.batch_size, f"step {self.step}, loss {loss:.4f}")
            last = self.step == training.steps
            if last or self.step % training.validate_every == 0:
                self._validate()
            if last or self.step % training.checkpoint_every == 0:
                save_state(folder, self._state(position), fingerprint)

    def restore(self, state: State) -> None:
        """Go back to where `state` was saved."""
        tensors = {"model.": {}, "optimizer.": {}, "random.": {}}
        for name, tensor in state.tensors.items():
            room, _, rest = name.partition(".")
            tensors[f"{room}."][rest] = tensor
        fill_model(self.model, tensors["model."], "the training state")
        fill_optimizer(self.optimizer, tensors["optimizer."])
        torch.set_rng_state(tensors["random."]["cpu"])
        if self.device.type == "cuda" and "cuda" in tensors["random."]:
            torch.cuda.set_rng_state(tensors["random."]["cuda"], self.device)
        self.loader.load_state_dict(state.loader)
        self.log = _Log(state.log)
        self.step, self.genes = state.step, state.genes
        self.seconds_before, self.began = state.seconds, time.monotonic()

    def _state(self, position: dict) -> State:
        tensors = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return State(
            step=self.step,
            seconds=self.seconds,
            genes=self.genes,
            loader=position,
            tensors=tensors,
            log=self.log.table(),
        )

    def _next_batch(self) -> tuple[CellBatch, list[Inputs]]:
        """The next step's cells and their view, cut into micro batches."""
        batch = next(self.loader)
        parts = []
        for i in range(0, len(batch), self.micro_batch_size):
            cells = batch.slice(i, min(i + self.micro_batch_size, len(batch)))
            parts.append(to_device(self.model.pretrain_inputs(cells, seed=self.seed, step=self.step), self.device))
        return batch, parts

    def _update(self, parts: list[Inputs]) -> dict[str, torch.Tensor]:
        """Take one optimiser step; returns what to log of it, still on the device."""
        rate = learning_rate(self.step, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        terms = accumulate_gradients(self.model, parts, self.step, self.autocast)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        means = {name: term.sum / term.count.clamp(min=1) for name, term in terms.items()}
        return {"loss": total_loss(terms), **means, "gradient_norm": norm, "learning_rate": torch.tensor(rate)}

    def _record(self, measured: dict[str, torch.Tensor]) -> float:
        """Wait for a step's numbers, check and log them; returns the loss."""
        numbers = torch.stack([number.to(self.device, torch.float64) for number in measured.values()]).tolist()
        values = dict(zip(measured, numbers, strict=True))
        for metric in ("loss", "gradient_norm"):
            if not math.isfinite(values[metric]):
                raise CellmillError(
                    f"training: {metric} became {values[metric]} at step {self.step}; lower training.learning_rate, "
                    "raise training.warmup_steps or set training.precision to float32 (the last saved state is kept)"
                )
        if self.step % self.training.log_every == 0 or self.step == self.training.steps:
            read = {"cells": self.step * self.training.batch_size, "genes": self.genes}
            self.log.add(self.step, "train", values | read, self.seconds)
        return values["loss"]

    def _validate(self) -> None:
        if self.validation:
            losses = mean_losses(self.model, self.validation, self.seed, self.autocast)
            self.log.add(self.step, "validation", losses, self.seconds)


def accumulate_gradients(model: CellModel, parts: list[Inputs], step: int, autocast: AbstractContextManager) -> Losses:
    """Add the gradient of one optimiser step's objective to the parameters, micro batch by micro batch.

    A micro batch's objective is weighed by its number of predicted positions. The sum is the gradient of the whole
    batch's objective wherever the terms' numbers of positions keep one ratio over the micro batches (always, if there
    is one term or all share their positions), and an approximation of it elsewhere.

    Returns
    -------
    dict
        The whole batch's terms, detached.
    """
    sums, counts = {}, {}
    n_positions = torch.zeros((), device=next(model.parameters()).device)
    for inputs in parts:
        with autocast:
            terms = model(inputs, step=step)
        n_here = sum(term.count for term in terms.values())
        loss = total_loss(terms)
        (loss if len(parts) == 1 else loss * n_here).backward()
        n_positions = n_positions + n_here
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.sum.detach()
            counts[name] = counts.get(name, 0) + term.count
    if len(parts) > 1:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, n_positions.clamp(min=1))
    return {name: LossTerm(sums[name], counts[name]) for name in sums}


class _Log:
    """The tidy log of a run, in rows of `LOG_SCHEMA`."""

    def __init__(self, before: pa.Table | None = None):
        self.before = before or LOG_SCHEMA.empty_table()
        self.rows = []

    def add(self, step: int, split: str, values: dict[str, float], seconds: float) -> None:
        """One row for every metric in `values`."""
        for metric, value in values.items():
            row = {"step": step, "split": split, "metric": metric, "value": value, "seconds": seconds}
            self.rows.append(row)

    def table(self) -> pa.Table:
        """All rows so far."""
        self.before = pa.concat_tables([self.before, pa.Table.from_pylist(self.rows, LOG_SCHEMA)]).combine_chunks()
        self.rows = []
        return self.before


def _fingerprint(shards: Shards, statistics: GeneStatistics, recipe: ModelRecipe, seed: int, meta: dict) -> str:
    """Hash of everything that a training state depends on; a state with another one cannot be gone on from."""
    statistics_hash = hashlib.sha256()
    for name, value in vars(statistics).items():
        if name != "categories":
            statistics_hash.update(value.numpy().tobytes())
    content = {
        "architecture": [recipe.architecture, recipe.preset, recipe.sizes],
        "training": dataclasses.asdict(recipe.training),
        "seed": seed,
        "shards": shards.manifest,
        "statistics": [statistics_hash.hexdigest(), statistics.categories],
        "code": [__version__, torch.__version__, meta.get("code_version")],
    }
    return content_hash(content)
