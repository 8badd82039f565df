"""Functions that stay outside the graphs of the compiler: loops over cells, and what has its own backward pass."""

import functools
from collections.abc import Callable

import torch

_functions: list[Callable] = []
_outside: dict[Callable, Callable] = {}


def outside_graphs(function: Callable) -> Callable:
    """As ``torch.compiler.disable``, but that one loads the compiler where it is applied, which takes seconds."""
    _functions.append(function)

    @functools.wraps(function)
    def call(*inputs, **options):
        return _outside.get(function, function)(*inputs, **options)

    return call


def keep_outside() -> None:
    """Have the compiler respect `outside_graphs`: called before the first layer is compiled."""
    for function in _functions:
        _outside.setdefault(function, torch.compiler.disable(function))
