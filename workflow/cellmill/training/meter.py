"""How fast training runs, and how much of the device it uses.

A step's floating-point operations are those of the model's body: forward passes as `CellModel.body_flops` counts them,
times 3, since the backward pass has two products for every one of the forward pass. That is 6 for every weight and
token, plus attention (Kaplan et al., arXiv 2001.08361; Chowdhery et al., arXiv 2204.02311, appendix B, whose MFU this
is). Embeddings, the vocabulary's logits, norms and what is computed a second time do not count.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from cellmill.models.base import CellModel, Inputs
from cellmill.models.packing import Layout

FORMULA = "MFU = 3 x forward FLOPs of the body (2 N a token + attention) / seconds / peak FLOP/s"
"""What is printed beside an MFU."""
PASSES = 3
"""A forward pass, and a backward pass of twice as many operations."""
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOP/s with float32 sums, from the makers' data sheets, by what `torch.cuda.get_device_name` holds;
the first that fits counts."""


def gpu_peak(name: str) -> float | None:
    """Peak FLOP/s of a GPU by its name; None where it is not in `PEAKS`, or a part of a GPU."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    spaced = f" {' '.join(words)} "
    return next((peak for known, peak in PEAKS.items() if f" {known} " in spaced), None)


@cache
def cpu_peak(dtype: torch.dtype, threads: int, seconds: float = 0.2) -> float:
    """FLOP/s of the best of many large matrix products of this type, with the threads that torch now uses.

    `threads` is their number: the answer is kept for each.
    """
    size = 1024
    a, b = (torch.full((size, size), 0.5, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best, began = math.inf, time.monotonic()
    while time.monotonic() - began < seconds or math.isinf(best):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that MFU is measured against; `dtype` is that of matrix products."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return cpu_peak(dtype, torch.get_num_threads()) if device.type == "cpu" else None


class Meter:
    """Measures training between two reads; made once a process, after the device and its threads are set up.

    ::

        with meter.step():
            ...                                       # forward, backward, optimiser
        meter.count(model, parts, n_cells, step)      # what the step worked on
        with meter.paused():
            ...                                       # validation, saving a state
        log.add(step, MACHINE, meter.read(), seconds) # every rank, at the same steps

    Parameters
    ----------
    device
        Where training runs.
    dtype
        The type of its matrix products.
    ranks
        Processes that train together (``sum(tensor)`` over them, ``world``); None if there is one.

    Attributes
    ----------
    peak
        FLOP/s of one device, or None if unknown.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, ranks=None):
        self.device, self.ranks = device, ranks
        self.peak = device_peak(device, dtype)
        self._measures_gpu = device.type == "cuda"
        self._last_end = None
        self._peak_is_told = False
        self._start_window()

    def _start_window(self) -> None:
        self._began = time.monotonic()
        self._pauses = self._inside = 0.0
        self._cells = self._tokens = self._slots = self._flops = 0.0
        self._stream_ends: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the work of one optimiser step: what is spent outside is time that training waits."""
        began = time.monotonic()
        if self._measures_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            if self._last_end is not None:
                self._stream_ends.append((self._last_end, start))
        yield
        if self._measures_gpu:
            end.record()
            self._last_end = end
        self._inside += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training; its time does not count."""
        began = time.monotonic()
        yield
        self._pauses += time.monotonic() - began
        self._last_end = None  # the stream stood still for another reason

    def count(self, model: CellModel, parts: list[Inputs], n_cells: int, step: int) -> None:
        """Add a step's cells, and the tokens, slots and operations of its micro batches.

        Tokens are those of every layout but `layout_asked`, which asks some of the same tokens again.
        """
        self._cells += n_cells
        for inputs in parts:
            layouts = [value for name, value in inputs.items() if isinstance(value, Layout) and name != "layout_asked"]
            self._tokens += sum(layout.n_tokens for layout in layouts)
            self._slots += sum(layout.n_slots for layout in layouts)
            try:
                self._flops += PASSES * model.body_flops(inputs, step=step)
            except NotImplementedError:  # an architecture of the user's own, which may leave it out
                self._flops = math.nan

    def read(self) -> dict[str, float]:
        """What was measured since the last read (or since the meter was made), and begin anew.

        Returns
        -------
        dict
            ``cells_per_second``, ``tokens_per_second`` (tokens through the body), ``padding_share`` (of slots, unused),
            ``waiting_share`` (of time, in which no step is computed: on the host's clock, on a GPU on its own),
            ``memory_mb`` (peak so far; the GPU's, or the process's), ``flops_per_second`` and ``mfu`` (of all devices).
            The first read also has ``peak_flops_per_second``, of one device. What is not known is left out.
        """
        seconds = max(time.monotonic() - self._began - self._pauses, 1e-9)
        waiting = self._waited(seconds)
        sums, world = [self._cells, self._tokens, self._slots, self._flops, waiting / seconds], 1
        if self.ranks is not None and self.ranks.world > 1:
            world = self.ranks.world
            sums = self.ranks.sum(torch.tensor(sums, dtype=torch.float64, device=self.device)).tolist()
        cells, tokens, slots, flops, waiting_shares = sums
        values = {
            "cells_per_second": cells / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - tokens / slots if slots else None,
            "waiting_share": waiting_shares / world,
            "memory_mb": self._memory_mb(),
            "flops_per_second": flops / seconds if flops else None,
            "mfu": flops / seconds / (self.peak * world) if self.peak and flops else None,
        }
        if not self._peak_is_told:
            values["peak_flops_per_second"], self._peak_is_told = self.peak, True
        self._start_window()
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def _waited(self, seconds: float) -> float:
        if not self._measures_gpu:
            return min(max(seconds - self._inside, 0.0), seconds)
        if self._stream_ends:
            self._stream_ends[-1][1].synchronize()
        return sum(end.elapsed_time(start) for end, start in self._stream_ends) / 1000

    def _memory_mb(self) -> float:
        if self._measures_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        units = 2**20 if sys.platform == "darwin" else 2**10  # in which ru_maxrss counts
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units

    def explain(self) -> str:
        """One line for the start of a run: against which peak MFU is measured, and how."""
        if self.peak is None:
            return "MFU is not given: this device's peak is not known to cellmill.training.meter.PEAKS"
        kind = "data sheet, bfloat16" if self._measures_gpu else "measured"
        return f"{FORMULA} ({in_flops(self.peak)}, {kind})"


def in_flops(peak: float) -> str:
    """FLOP/s as people read them: 32.5 GFLOP/s, 989 TFLOP/s."""
    return f"{peak / 1e9:.3g} GFLOP/s" if peak < 1e12 else f"{peak / 1e12:.4g} TFLOP/s"


def note(values: dict[str, float]) -> str:
    """Speed in few words, for a line of progress."""
    said = []
    if "tokens_per_second" in values:
        said.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        said.append(f"MFU {100 * values['mfu']:.1f} %")
    return ", ".join(said)
