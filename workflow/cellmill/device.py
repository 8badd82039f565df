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
    return device, arithmetic(training.precision, device, "training.precision")


def arithmetic(precision: str, device: torch.device, key: str) -> AbstractContextManager:
    """The context of forward passes: `EXACT`, or autocast to bfloat16; "auto" is bfloat16 on a GPU that has it.

    Raises
    ------
    CellmillError
        If `precision`, a setting named `key`, asks for bfloat16 of a GPU that has none.
    """
    if precision == "float32" or (precision == "auto" and device.type == "cpu"):
        return EXACT
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision == "auto":
            return EXACT
        raise CellmillError(f"the GPU {torch.cuda.get_device_name(device)} has no bfloat16; set {key} to float32")
    return torch.autocast(device.type, torch.bfloat16)
