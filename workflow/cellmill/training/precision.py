"""How the layers of a model compute: in which arithmetic, compiled or not, kept or computed again."""

import functools
import os
import shutil

import torch
from torch.utils.checkpoint import checkpoint

from cellmill.errors import CellmillError
from cellmill.models.base import CellModel
from cellmill.models.graphs import keep_outside
from cellmill.recipes import Training

GRAPHS = 64
"""Graphs of one layer that the compiler keeps: in training, in evaluation, of each kind of layer."""


def is_compiled(training: Training, device: torch.device) -> bool:
    """Whether layers are to be compiled."""
    if training.compile == "auto":
        return device.type == "cuda" and training.packing == "packed"
    return training.compile == "on"


def prepare_blocks(model: CellModel, training: Training, device: torch.device) -> None:
    """Have the layers of a model compiled and computed again in the backward pass, where the recipe says so.

    Only the layers' `forward` is replaced, so parameters, their names and hooks stay what they were. Equal layers share
    their graphs, in which the number of tokens is a symbol.

    Raises
    ------
    CellmillError
        If layers are to be compiled and there is no compiler.
    """
    blocks = model.blocks()
    if is_compiled(training, device):
        _check_compiler(device)
        keep_outside()
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, GRAPHS)
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if training.checkpoint_activations:
        for block in blocks:
            block.forward = _again(block.forward)


def _again(forward):
    """`forward` that keeps its inputs alone, and computes the rest again, with the same dropout, when it is needed."""

    @functools.wraps(forward)
    def wrapped(*inputs, **options):
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return wrapped


def _check_compiler(device: torch.device) -> None:
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None and not (device.type == "cuda" and shutil.which("clang")):
        raise CellmillError(
            f"training.compile needs the compiler {compiler}, which is not installed; install it (on Debian: "
            "apt-get install g++), name another one in the variable CXX or CC, or set compile: off"
        )
