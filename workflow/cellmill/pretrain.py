"""Pretraining: from shards and a recipe to a checkpoint and a log, with exact resume.

A run is a pure function of (shards, statistics, recipe, seed) and, where there is dropout, of how its steps were cut:
what a cell's view hides is keyed by (seed, step, cell), the order of the cells by the seed, and dropout by torch's
generators, whose states are saved. On the CPU every
operation is deterministic, so a run that was killed and went on ends in the same weights, to the bit, as one that was
not.

A step's objective is the sum over its terms of each term's mean over all cells of all ranks. The counts of the
predicted positions are known before the first forward pass, so every micro batch is weighed exactly.
"""

import dataclasses
import hashlib
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from cellmill import __version__
from cellmill.checkpoints import build_model, save_checkpoint, vocabulary_hash
from cellmill.device import EXACT, set_up_torch
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import TOKENS, mean_losses, spread_batches
from cellmill.files import atomic
from cellmill.models.base import GeneStatistics, Inputs, Losses, LossTerm, total_loss
from cellmill.models.packing import Packing
from cellmill.progress import Progress
from cellmill.provenance import content_hash
from cellmill.recipes import ModelRecipe
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.loader import Loader
from cellmill.training import memory
from cellmill.training.guard import Guard, largest_norms
from cellmill.training.log import LOG, MACHINE, Log
from cellmill.training.meter import Meter, note
from cellmill.training.micro_batches import Step, few_shapes, read_step, views
from cellmill.training.offending_batch import ADVICE, OffendingBatch, datasets_of, describe_model, stopped
from cellmill.training.optimizer import learning_rate, make_optimizer
from cellmill.training.parallel import Ranks, Wrapped, fill, shared_losses, whole_model, whole_tensors, wrap
from cellmill.training.precision import is_compiled, prepare_blocks
from cellmill.training.state import Aside, State, load_state, save_state

ELSEWHERE = (
    *("ranks", "nodes", "parallel", "micro_batch_tokens", "checkpoint_activations", "memory_gb"),
    *("spike_factor", "early_stop"),
)
"""Keys of the training that a run may change and still go on from its state: where it runs and how its steps are cut
there, and when it is stopped."""


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
        If the input does not fit, a loss or its gradient is not finite, the loss jumps (``spike_factor``), memory runs
        out, ``early_stop`` has no held-out cells to go by, ranks do not find the same state, or a file cannot be
        written. The last state is kept.
    """
    out, state, training = Path(out), Path(state), recipe.training
    shards.check_vocabulary(vocabulary_hash(meta["feature_ids"]))
    ranks = Ranks.from_environment()
    ranks.check(training)
    memory.save_addresses()
    fingerprint = _fingerprint(shards, statistics, recipe, seed, meta)
    found, remarks = load_state(state, fingerprint)
    step, n_done = (found.step, found.cells) if found else (0, 0)
    n_cells = n_done * training.steps // step if step else training.batch_size * training.steps
    with (
        memory.explained(training),
        ranks.joined(),
        Progress(f"{name} seed {seed}", n_cells, n_done, ranks.main) as bar,
    ):
        if ranks.most(step) != -ranks.most(-step):
            raise CellmillError(
                f"{state}: rank {ranks.rank} of {ranks.world} finds {f'the state of step {step}' if found else 'none'} "
                "and others find another one; the folder must lie on a disk that all machines share"
            )
        run = _Run(shards, statistics, recipe, seed, ranks)
        if ranks.world > 1:
            bar.say(f"{ranks.world} ranks, {training.parallel} over {ranks.kind}")
        with run.loader:
            for remark in remarks:
                bar.say(remark)
            if found:
                run.restore(found)
                found = None  # its tensors are the model's now
                bar.say(f"goes on from step {run.step} of {training.steps}")
            run.train(state, fingerprint, bar)
        model = whole_model(run.wrapped, lambda: build_model(recipe, shards.n_genes, statistics, seed))
        if not ranks.main:
            return
        provenance = {
            **meta,
            "name": name,
            "seed": seed,
            "steps": run.step,
            "recipe": {key: value for key, value in dataclasses.asdict(recipe).items() if key != "embedding"},
            "corpus": {"organism": shards.manifest["organism"], "census": shards.manifest["census"]},
            "primary_only": shards.primary_only,
            "datasets": sorted(set().union(*(shards.datasets(split) for split in shards.splits))),
            "shards_hash": content_hash(shards.manifest),
        }
        save_checkpoint(out, model, provenance)
        with atomic(out / LOG) as path:
            pq.write_table(run.log.table(), path)
        shutil.rmtree(state, ignore_errors=True)


class _Run:
    """One training run between its first and its last step, on one rank."""

    def __init__(
        self, shards: Shards, statistics: GeneStatistics, recipe: ModelRecipe, seed: int, ranks: Ranks | None = None
    ):
        training, ranks = recipe.training, ranks or Ranks()
        self.shards, self.architecture, self.guard = shards, recipe.architecture, Guard(training)
        self.training, self.seed, self.ranks = training, seed, ranks
        self.device, self.autocast = set_up_torch(training)
        self.model = build_model(recipe, shards.n_genes, statistics, seed).to(self.device)
        if is_compiled(training, self.device):
            usual = next(shards.batches("train", training.batch_size // ranks.world, categories=self.model.categories))
            self.usual = max(int(self.model.token_lengths(usual).sum()), (training.batch_tokens or 0) // ranks.world)
        else:
            self.usual = None
            self.model.packing = Packing(training.packing)
        self.limit_to(TOKENS if training.micro_batch_tokens == "auto" else training.micro_batch_tokens)
        prepare_blocks(self.model, training, self.device)
        self.wrapped = wrap(self.model, training, ranks)
        self.optimizer = make_optimizer(self.model, training)
        categories = self.model.categories
        self.loader = Loader(shards, "train", training.batch_size, seed, ranks.rank, ranks.world, categories=categories)
        self.validation = []
        if "validation" in shards.splits and shards.n_cells("validation"):
            size, n_cells = training.batch_size, training.validation_cells
            self.validation = list(spread_batches(shards, "validation", size, n_cells, categories))
        if training.early_stop is not None and not self.validation:
            raise CellmillError(
                "training.early_stop needs held-out cells and the corpus has none; set corpus.splits so that it has "
                "some, or leave early_stop out"
            )
        self.beside = dist.new_group(backend="gloo") if training.batch_tokens and ranks.world > 1 else None
        self.log, self.speed = Log(), ""
        self.meter = Meter(self.device, torch.float32 if self.autocast is EXACT else torch.bfloat16, ranks)
        self.step, self.cells, self.genes = 0, 0, 0
        self.seconds_before, self.began = 0.0, time.monotonic()
        ranks.seed(seed)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all processes."""
        return self.seconds_before + time.monotonic() - self.began

    def limit_to(self, tokens: int) -> None:
        """Let micro batches have so many tokens at most."""
        self.limit = tokens
        if self.usual is not None:
            self.model.packing = few_shapes(min(tokens, self.usual))

    def train(self, folder: Path, fingerprint: str, progress: Progress) -> None:
        """Take the steps that are left; validate, log and save states (under `folder`) on the way."""
        training = self.training
        progress.say(self.meter.explain())
        with Aside() as saving, ThreadPoolExecutor(1, "cellmill-views") as ahead:  # makes the views of the next step
            coming = ahead.submit(self.prepare, self.step)
            ended = self.step == training.steps or self.guard.out_of_patience
            if training.micro_batch_tokens == "auto" and not ended:
                cells = coming.result().cells
                with self.meter.paused():
                    self._fit_memory(cells, progress)
            if self.step == 0:
                self._validate()
            self.model.train()
            while self.step < training.steps and not self.guard.out_of_patience:
                now = coming.result()
                if self.step + 1 < training.steps:
                    coming = ahead.submit(self.prepare, self.step + 1)
                with self.meter.step():
                    now, measured = self.update(now, progress.say)
                    self.meter.count(self.model, now.parts, len(now.cells), self.step)
                self.step, self.cells = self.step + 1, self.cells + now.n_cells
                loss = self._record(measured, now, folder)
                progress.total = self.cells * training.steps // self.step  # with batch_tokens a guess until the end
                progress.update(self.cells, f"step {self.step}, loss {loss:.4f}", self.speed)
                last = self.step == training.steps
                if last or self.step % training.validate_every == 0:
                    self._validate()
                if self.guard.out_of_patience:
                    last = True
                    self.log.add(self.step, "train", {"early_stop": self.guard.worse}, self.seconds)
                    progress.say(f"ends at step {self.step}: {self.guard.worse} validations brought no better loss")
                if last or self.step % training.checkpoint_every == 0:
                    with self.meter.paused():
                        state = self.state(now.after)
                        if self.ranks.main:
                            saving.write(state, lambda kept: save_state(folder, kept, fingerprint))
                saving.check()

    def restore(self, state: State) -> None:
        """Go back to where `state` was saved."""
        random = {name.removeprefix("random."): t for name, t in state.tensors.items() if name.startswith("random.")}
        others = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("random.")}
        fill(self.model, self.optimizer, others, "the training state")
        self.ranks.restore_random(random, self.seed, state.step, self.device)
        self.loader.load_state_dict(state.loader)
        self.log = Log(state.log)
        self.guard.recall(state.log)
        self.step, self.cells, self.genes = state.step, state.cells, state.genes
        given = self.training.micro_batch_tokens
        self.limit_to(state.limit if given == "auto" else given)
        self.seconds_before, self.began = state.seconds, time.monotonic()

    def state(self, position: dict) -> State:
        """All that the rest of the run depends on, `position` being the loader's; every rank must ask for it."""
        random = self.ranks.random_tensors(self.device)
        return State(
            step=self.step,
            seconds=self.seconds,
            cells=self.cells,
            genes=self.genes,
            limit=self.limit,
            loader=position,
            tensors=whole_tensors(self.model, self.optimizer) | {f"random.{name}": t for name, t in random.items()},
            log=self.log.table(),
        )

    def prepare(self, step: int) -> Step:
        """Read this rank's cells of a step and make the views of their micro batches."""
        cells, n_batches = read_step(self.loader, self._tokens, self.training.batch_tokens)
        limit = self.limit
        parts = views(self.model, cells, limit, self.device, seed=self.seed, step=step)
        return Step(cells, parts, limit, n_batches * self.training.batch_size, self.loader.state_dict())

    def _tokens(self, cells: CellBatch) -> int:
        """Tokens of these cells and of what the other ranks read beside them."""
        tokens = torch.tensor(int(self.model.token_lengths(cells).sum()))
        if self.beside is not None:  # a group of its own: the main thread exchanges tensors at the same time
            dist.all_reduce(tokens, group=self.beside)
        return int(tokens)

    def update(self, now: Step, say: Callable[[str], object] = str) -> tuple[Step, dict[str, torch.Tensor]]:
        """Take one optimiser step; returns it as it was cut, and what to log of it, still on the device."""
        rate = learning_rate(self.step, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        now, terms = self._gradients(now, say)
        norm = self.wrapped.clip(self.training.gradient_clip)
        self.optimizer.step()
        measured = self._over_ranks(terms, len(now.cells.genes))
        return now, measured | {"gradient_norm": norm, "learning_rate": torch.tensor(rate)}

    def _gradients(self, now: Step, say: Callable[[str], object]) -> tuple[Step, Losses]:
        """Set the step's gradient; where memory runs out, from the same cells in smaller micro batches."""
        random = memory.RandomStates(self.device)
        while True:
            self.optimizer.zero_grad()
            if now.limit != self.limit:
                parts = views(self.model, now.cells, self.limit, self.device, seed=self.seed, step=self.step)
                now = now._replace(parts=parts, limit=self.limit)
            try:
                return now, accumulate_gradients(self.wrapped, now.parts, self.step, self.autocast, self.ranks)
            except Exception as error:
                if not (memory.ran_out(error) and self.training.micro_batch_tokens == "auto" and self.ranks.world == 1):
                    raise
            # here the error, whose frames hold tensors, is gone
            now = now._replace(parts=[])
            self.optimizer.zero_grad()
            memory.free_memory(self.device)
            random.restore()
            self.limit_to(memory.halved(now.limit, self.model.token_lengths(now.cells)))
            say(f"memory ran out in step {self.step + 1}: done again with micro batches of {self.limit:,} tokens")

    def _fit_memory(self, cells: CellBatch, progress: Progress) -> None:
        """Choose how many tokens a micro batch has, by trying with the cells of the next step."""
        known = self.limit if self.step else None
        found = memory.choose_tokens(
            self.wrapped,
            self.optimizer,
            cells,
            self.training,
            self.ranks,
            seed=self.seed,
            step=self.training.steps - 1,  # an objective may use more of the model in later steps
            autocast=self.autocast,
            known=known,
        )
        self.limit_to(found.tokens)
        progress.say(found.why)

    def _over_ranks(self, terms: Losses, n_genes: int) -> dict[str, torch.Tensor]:
        """The step's loss, the means of its terms and the expressed genes that were read, of all ranks."""
        genes = torch.full((), n_genes, dtype=torch.float64, device=self.device)  # nobody waits for it
        sums = self.ranks.sum(torch.stack([genes, *(term.sum.double() for term in terms.values())]))
        terms = {name: LossTerm(total, terms[name].count) for name, total in zip(terms, sums[1:], strict=True)}
        means = {name: term.sum / term.count.clamp(min=1) for name, term in terms.items()}
        return {"loss": total_loss(terms), **means, "genes": sums[0]}

    def _record(self, measured: dict[str, torch.Tensor], now: Step, folder: Path) -> float:
        """Wait for a step's numbers, check and log them; returns the loss."""
        numbers = torch.stack([number.to(self.device, torch.float64) for number in measured.values()]).tolist()
        values = dict(zip(measured, numbers, strict=True))
        self.genes += int(values["genes"])
        if reason := self.guard.check(self.step, values["loss"], values["gradient_norm"]):
            raise self._stopped(reason, values, now, folder)
        if self.step % self.training.log_every == 0 or self.step == self.training.steps:
            read = {"cells": self.cells, "genes": self.genes}
            self.log.add(self.step, "train", values | read, self.seconds)
            measured = self.meter.read()
            self.speed = note(measured)
            self.log.add(self.step, MACHINE, measured, self.seconds)
        return values["loss"]

    def _stopped(self, reason: str, values: dict[str, float], now: Step, folder: Path) -> CellmillError:
        """Save what this rank worked on, as every rank does; returns the error that ends the run."""
        batch = OffendingBatch(
            reason=reason,
            step=self.step,
            seed=self.seed,
            values=values,
            gradient_norms=largest_norms(self.model, self.wrapped.norms_P),
            datasets=datasets_of(self.shards, "train", now.cells),
            cells=now.cells,
            parts=now.parts,
            model=describe_model(self.model, self.architecture),
        )
        error = stopped(folder, batch, self.ranks.rank)
        self.ranks.agree(True)  # the first to leave ends the others, which may still be writing
        return error

    def _validate(self) -> None:
        if self.validation:
            with self.meter.paused():
                if self.ranks.world == 1:
                    losses = mean_losses(self.model, self.validation, self.seed, self.autocast, limit=self.limit)
                else:
                    losses = shared_losses(
                        self.wrapped, self.validation, self.seed, self.autocast, self.limit, self.ranks
                    )
            self.log.add(self.step, "validation", losses, self.seconds)
            if not math.isfinite(losses["loss"]):
                reason = f"the held-out loss became {losses['loss']} at step {self.step}"
                raise CellmillError(f"training: {reason}; {ADVICE} (the last saved state is kept)")
            self.guard.validated(losses["loss"])


def accumulate_gradients(
    wrapped: Wrapped,
    parts: list[Inputs],
    step: int,
    autocast: AbstractContextManager,
    ranks: Ranks | None = None,
) -> Losses:
    """Add the gradient of one optimiser step's objective to the parameters, micro batch by micro batch.

    The objective is the sum over terms of each one's mean over the whole step, of all ranks, so the gradient is the
    same however the cells are cut into micro batches and ranks.

    Parameters
    ----------
    wrapped
        The model.
    parts
        The views of this rank's micro batches, on its device.
    step
        Optimiser steps done.
    autocast
        The arithmetic of forward passes.
    ranks
        Who else works on the step.

    Returns
    -------
    dict
        The terms, detached: sums over this rank's cells, counts over those of all ranks.
    """
    ranks, model = ranks or Ranks(), wrapped.model
    counted = [model.loss_counts(inputs, step=step) for inputs in parts]
    names = list(counted[0])
    totals = ranks.sum(
        torch.stack([torch.stack([counts[name].double() for name in names]) for counts in counted]).sum(0)
    )
    counts = dict(zip(names, totals, strict=True))
    sums = dict.fromkeys(names, 0.0)
    n_passes = ranks.most(len(parts)) if wrapped.even else len(parts)
    for i in range(n_passes):  # a rank with fewer micro batches than the others repeats its last one, for nothing
        inputs, weight = parts[min(i, len(parts) - 1)], float(i < len(parts))
        with nullcontext() if i == n_passes - 1 else wrapped.no_sync():
            with autocast:
                terms = wrapped.forward(inputs, step)
            loss = sum(term.sum / counts[name].clamp(min=1).to(term.sum.dtype) for name, term in terms.items())
            (loss if weight else loss * 0).backward()
        for name, term in terms.items():
            sums[name] = sums[name] + weight * term.sum.detach()
    return {name: LossTerm(sums[name], counts[name]) for name in names}


def _fingerprint(shards: Shards, statistics: GeneStatistics, recipe: ModelRecipe, seed: int, meta: dict) -> str:
    """Hash of everything that a training state depends on; a state with another one cannot be gone on from."""
    statistics_hash = hashlib.sha256()
    for name, value in vars(statistics).items():
        if name != "categories":
            statistics_hash.update(value.numpy().tobytes())
    content = {
        "architecture": [recipe.architecture, recipe.preset, recipe.sizes],
        "training": {k: v for k, v in dataclasses.asdict(recipe.training).items() if k not in ELSEWHERE},
        "seed": seed,
        "shards": shards.manifest,
        "statistics": [statistics_hash.hexdigest(), statistics.categories],
        "code": [__version__, torch.__version__, meta.get("code_version")],
    }
    return content_hash(content)
