"""Which device computes, and with what arithmetic."""

from contextlib import AbstractContextManager, nullcontext

import torch

from cellmill.errors import CellmillError
from cellmill.recipes import Training

EXACT = nullcontext()
"""The context of forward passes in float32."""


def best_device() -> torch.device:
    """The current CUDA device where there is one (CUDA_VISIBLE_DEVICES chooses it), else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def use_threads(threads: int) -> torch.device:
    """Set the process's CPU threads, make the CPU's operations deterministic, and return the device."""
    device = best_device()
    torch.set_num_threads(threads)
    # as use_deterministic_algorithms, which imports torch's compiler first and so takes seconds
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return device


def set_up_torch(training: Training) -> tuple[torch.device, AbstractContextManager]:
    """Set the process's threads and determinism; return the device and the context of forward passes.

    On the CPU every operation is deterministic, or raises. On a GPU the fastest kernels are allowed, some of which add
    in no fixed order. Products of float32 matrices are true float32 everywhere (no TF32).

    Raises
    ------
    CellmillError
        If ``training.precision`` asks for bfloat16 of a GPU that has none.
    """
    device = use_threads(training.threads)
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if training.precision == "bfloat16" and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise CellmillError(f"the GPU {name} has no bfloat16; set training.precision to auto or float32")
    automatic = training.precision == "auto" and device.type == "cuda" and has_bfloat16
    if training.precision == "bfloat16" or automatic:
        return device, torch.autocast(device.type, torch.bfloat16)
    return device, EXACT
