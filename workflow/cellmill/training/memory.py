"""How many tokens of a micro batch fit in memory, found by trying, and what is done where memory runs out all the same.

What fits is not computed from the model's sizes: a few forward and backward passes of real cells of the run are
measured, each well below what the passes before say would fit. Nothing of the run changes by them.

The memory is a GPU's, or that which this process may have resident; where the system limits its addresses (``ulimit
-v``), those as well.
"""

import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import CellModel, to_device
from cellmill.recipes import Training
from cellmill.shards.batch import CellBatch
from cellmill.training.micro_batches import cut
from cellmill.training.optimizer import Optimizer, optimizer_tensors
from cellmill.training.parallel import Ranks, Wrapped

SPARE = 0.1
"""Share of a limit that is left free. No trial tells what cells of other lengths take beyond their tokens, what is lost
between blocks of memory, and what the views of the next step take, which are made meanwhile. With it, the peaks of
Geneformer, scGPT and scMulan came to 77 to 91 % of limits of 0.8 and 1.2 GB."""
SPARE_BYTES = 64 * 1024**2
"""At least so much is spared: a process grows by about as much over a run, however small its model."""
ADDRESSES = "ulimit -v"
"""The limit that the C library's unused reserves count to: who seems to reach it need not run out of memory."""
FURTHEST = 1.5
"""How many times as large as the largest pass that was measured a micro batch may be."""
GB = 10**9
STEP = 1024
"""Limits are a multiple of it, or below it a power of two."""
TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -2, -3, -8
"""Parameters of mallopt(3)."""
LARGEST_KEPT = 2 * 1024**2
"""Bytes of an array that the C library may keep when it is freed."""
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "could not create a memory",
    "start new thread",
)
"""What the messages of torch, its libraries and C++ say."""


class Limit(NamedTuple):
    """A limit of memory, as it stands now."""

    total: int
    """Bytes that this process could have in all."""
    used: int
    """Bytes that it has."""
    source: str

    @property
    def free(self) -> int:
        """Bytes that training may take besides, leaving `SPARE` of all, or of the addresses that are left."""
        if self.source == ADDRESSES:
            return int((self.total - self.used) * (1 - SPARE))
        return self.total - self.used - max(int(SPARE * self.total), SPARE_BYTES)


NO_LIMIT = Limit(2**62, 0, "no limit is known")


class Choice(NamedTuple):
    """How many tokens of a micro batch were chosen."""

    tokens: int
    why: str
    """One line."""


# --- what there is ----------------------------------------------------------------------------------------------------


def limits(training: Training, device: torch.device) -> list[Limit]:
    """The limits that hold for this process, as they stand; empty where none can be learnt."""
    given = training.memory_gb and int(training.memory_gb * GB)
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        if given:
            return [Limit(given, used, "training.memory_gb")]
        free, _ = torch.cuda.mem_get_info(device)
        return [Limit(free + torch.cuda.memory_reserved(device), used, "free memory of the GPU")]
    found, resident = [], _status("VmRSS")
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if addresses != resource.RLIM_INFINITY:
        found.append(Limit(addresses, _status("VmSize"), ADDRESSES))
    if given:
        return [*found, Limit(given, resident, "training.memory_gb")]
    shared = {"free memory of the machine": _available(), "free memory of the control group": control_group()}
    found += [
        Limit(resident + max(free, 0) // training.ranks, resident, source)
        for source, free in shared.items()
        if free is not None
    ]
    job = slurm_job(os.environ)
    return [*found, Limit(job // training.ranks, resident, "memory of the SLURM job")] if job else found


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status; where there is none, the peak of the resident memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, which counts in bytes
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _available() -> int | None:
    """Bytes that the machine could give to a process."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def control_group(of: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process's control group and those above it have left; None without a limit.

    Files that the system keeps in memory count as free, since it gives them up when memory is needed.

    Parameters
    ----------
    of
        The file that names the control groups of this process, versions 1 and 2.
    root
        Where they are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in of.read_text().splitlines()]
    except OSError:
        return None
    left = []
    for number, controllers, path in lines:
        if number == "0":
            mount, names, files = root, ("memory.max", "memory.current"), ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            files = ("total_active_file", "total_inactive_file")
        else:
            continue
        inside = mount / path.lstrip("/")
        while True:
            try:
                most, used = ((inside / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (inside / "memory.stat").read_text().splitlines())
                if most != "max" and int(most) < 2**60:  # version 1 has a huge number for none
                    left.append(int(most) - int(used) + sum(int(stat.get(name, 0)) for name in files))
            except OSError:
                pass  # a group above the ones that this process sees, or without this controller
            if inside == mount:
                break
            inside = inside.parent
    return min(left, default=None)


def slurm_job(environment: dict[str, str]) -> int | None:
    """Bytes that a SLURM job may have on this machine; None outside of one, or where it may have all."""
    node, core = (int(environment.get(f"SLURM_MEM_PER_{unit}") or 0) for unit in ("NODE", "CPU"))
    megabytes = node or core * int(environment.get("SLURM_CPUS_ON_NODE") or 0)
    return megabytes * 2**20 or None


# --- what a micro batch takes -----------------------------------------------------------------------------------------


class Peak:
    """The memory that is taken between its making and `read`, beyond what was taken before."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        give_back()
        with suppress(OSError):  # where it cannot be set, the peak is the one since the process began: no less
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return max(torch.cuda.max_memory_allocated(self.device) - self.before, 0)
        return max(_status("VmHWM") - self.before, 0)


def give_back() -> None:
    """Have the C library give freed memory back to the system, where it can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_at_once() -> None:
    """Have the C library give arrays back to the system when they are freed, but for small ones.

    What it keeps (`cellmill.memory`) cannot all be used again by arrays of other sizes: in steps of several micro
    batches up to a half more would be resident than is in use (scGPT, measured).
    """
    _mallopt(MMAP_THRESHOLD, LARGEST_KEPT)


def save_addresses() -> None:
    """Where addresses are limited, have all threads share one heap: each would reserve 128 MB or more for its own."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        _mallopt(ARENA_MAX, 1)
        _mallopt(TOP_PAD, LARGEST_KEPT)


def _mallopt(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(parameter, value)


def later_bytes(model: CellModel, optimizer: Optimizer, device: torch.device) -> int:
    """Bytes that training will take besides micro batches, and has not taken yet.

    The optimiser's two moments of every weight, made in the first step, and on the CPU the copy of weights and moments
    that is written while training goes on.
    """
    weights = sum(_here(parameter).nbytes for parameter in model.parameters())
    made = sum(_here(tensor).nbytes for tensor in optimizer_tensors(optimizer).values())
    copy = 0
    if device.type == "cpu":
        copy = sum(t.numel() * t.element_size() for t in model_tensors(model).values())
        copy += 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    return max(2 * weights - made, 0) + copy


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that lies with this rank."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose_tokens(
    wrapped: Wrapped,
    optimizer: Optimizer,
    cells: CellBatch,
    training: Training,
    ranks: Ranks,
    *,
    seed: int,
    step: int,
    autocast: AbstractContextManager,
    known: int | None = None,
) -> Choice:
    """The largest number of tokens of a micro batch that fits in memory; every rank must ask for it.

    Passes of growing size are measured; what they take is taken to grow as the tokens do. Weights, buffers, gradients,
    moments and random states are afterwards what they were.

    Parameters
    ----------
    wrapped, optimizer
        The model and its optimiser, without gradients.
    cells
        This rank's cells of one step.
    training
        Its ``memory_gb``, and the ranks that share a machine's memory.
    ranks
        Who else trains: the smallest of their numbers counts.
    seed, step
        Of the views.
    autocast
        The arithmetic of forward passes.
    known
        The number that an earlier process of the run had. It is kept where it fits with nothing to spare, so that the
        run's cells are cut as before; there is never a larger one.

    Raises
    ------
    CellmillError
        If a single cell does not fit.
    """
    model = wrapped.model
    device = next(model.parameters()).device
    lengths_B = np.maximum(model.token_lengths(cells), 1)
    longest, whole = ranks.most(int(lengths_B.max())), ranks.most(int(lengths_B.sum()))
    most = -(-whole * 5 // 4 // STEP) * STEP  # steps of other cells are longer
    if device.type == "cpu":
        give_back_at_once()
    with _unchanged(wrapped, optimizer, device):
        trial = _Trial(wrapped, cells, lengths_B, ranks, autocast, seed, step)
        with suppress(TooMuch):  # kernels are made ready, and gradients stay, as between the micro batches of a step
            trial(longest)
        later = later_bytes(model, optimizer, device)
        tokens, fitted = longest, 0
        while True:
            try:
                taken, measured = trial(tokens)
            except TooMuch:
                fitting = max(fitted, tokens // 2)
                break
            fitted, per_token = tokens, max(taken / measured, 1.0)
            tightest = min(limits(training, device), key=lambda limit: limit.free, default=NO_LIMIT)
            full = _least(ranks, (tightest.total - tightest.used - later) / per_token)
            fitting = _least(ranks, (tightest.free - later) / per_token)
            if full < longest or tokens >= min(whole, fitting / FURTHEST):
                break
            tokens = min(whole, max(int(fitting / FURTHEST), tokens + 1))
    if not fitted:
        raise too_long(longest, "found by trying")
    if full < longest and tightest.source != ADDRESSES:
        raise too_long(longest, tightest.source)
    chosen = min(max(rounded(fitting), longest), most)
    if known is not None:
        chosen = known if known <= full else min(chosen, known)
    size = f"{chosen:,} tokens{', more than a step has' if chosen == most else ''}"
    left = f"{_mb(tightest.free - later)} MB are left for it of {_mb(tightest.total)} MB ({tightest.source})"
    each = f"1,000 tokens take {_mb(1000 * per_token)} MB, as measured with {measured:,}"
    return Choice(chosen, f"micro batches of at most {size}: {left}, and {each}")


def _mb(n_bytes: float) -> str:
    return f"{max(n_bytes, 0) / 1e6:,.0f}"


def _least(ranks: Ranks, number: float) -> int:
    """The smallest of the ranks' numbers, rounded down."""
    return -ranks.most(-int(min(max(number, 0), 2**62)))


def rounded(tokens: int) -> int:
    """The largest multiple of `STEP` that is not above `tokens`, or below `STEP` the largest power of two."""
    return tokens // STEP * STEP or 1 << max(tokens.bit_length() - 1, 0)


class TooMuch(Exception):
    """Memory ran out in a trial."""


class _Trial:
    """Forward and backward passes whose memory is measured."""

    def __init__(self, wrapped, cells, lengths_B, ranks, autocast, seed, step):
        self.wrapped, self.cells, self.lengths_B = wrapped, cells, lengths_B
        self.ranks, self.autocast, self.seed, self.step = ranks, autocast, seed, step
        self.device = next(wrapped.model.parameters()).device

    def __call__(self, tokens: int) -> tuple[int, int]:
        """Bytes that micro batches of at most so many tokens take one after the other, and the tokens of the largest.

        Two to four are computed: the C library keeps what one frees, and the next cannot use all of it.

        Raises
        ------
        TooMuch
            If a rank has not so much memory.
        """
        parts = sorted(cut(self.lengths_B, tokens), key=lambda rows: -self.lengths_B[rows].sum())
        failed, peak = False, Peak(self.device)
        try:
            for rows in (parts * 2)[: max(2, min(4, len(parts)))]:
                self._pass(rows)
        except Exception as error:
            if not ran_out(error) or self.wrapped.even:  # ranks that meet within the pass cannot agree after it
                raise
            failed = True
        taken = peak.read()
        free_memory(self.device)
        if self.ranks.agree(failed):
            raise TooMuch
        return taken, int(self.lengths_B[parts[0]].sum())

    def _pass(self, rows: np.ndarray) -> None:
        inputs = self.wrapped.model.pretrain_inputs(self.cells.take(rows), seed=self.seed, step=self.step)
        with self.wrapped.no_sync():
            with self.autocast:
                terms = self.wrapped.forward(to_device(inputs, self.device), self.step)
            sum(term.sum / term.count.clamp(min=1) for term in terms.values()).backward()


@contextmanager
def _unchanged(wrapped: Wrapped, optimizer: Optimizer, device: torch.device) -> Iterator[None]:
    """Put back what forward and backward passes change: mode, buffers, gradients, random states."""
    model = wrapped.model
    was_training, buffers = model.training, [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.train()
            yield
    finally:
        optimizer.zero_grad()
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        free_memory(device)


# --- where memory runs out --------------------------------------------------------------------------------------------


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back()


class RandomStates:
    """The states of torch's generators, as they are when this is made."""

    def __init__(self, device: torch.device):
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to them."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def halved(limit: int, lengths_B: np.ndarray) -> int:
    """The next lower limit, half of the tokens that micro batches of these cells have now.

    Raises
    ------
    CellmillError
        If each cell is a micro batch of its own already.
    """
    largest = max(cut(lengths_B, limit), key=lambda rows: lengths_B[rows].sum())
    if len(largest) == 1:
        raise too_long(int(lengths_B[largest[0]]), "found by trying")
    return rounded(max(int(lengths_B[largest].sum()) // 2, 1))


def too_long(tokens: int, source: str) -> CellmillError:
    """The error of a micro batch that cannot be cut further."""
    return CellmillError(
        f"training: a cell of {tokens:,} tokens does not fit in memory ({source}); set a smaller max_length in sizes, "
        "training.checkpoint_activations to true, or give the job more memory"
    )


@contextmanager
def explained(training: Training) -> Iterator[None]:
    """Turn an error that says that memory ran out into one sentence.

    Raises
    ------
    CellmillError
        Instead of the error.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        tokens = training.micro_batch_tokens
        if tokens == "auto":
            how = "lower training.memory_gb, so that micro batches are smaller"
        else:
            how = f"micro batches have up to {tokens:,} tokens: set training.micro_batch_tokens to auto"
        raise CellmillError(
            f"training: memory ran out; {how}, or give the job more memory (the last saved state is kept)"
        ) from error
