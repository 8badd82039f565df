"""Architectures: one module each, found by name. A module that defines ``MODEL`` (a `CellModel`) is an architecture."""

import importlib.util
import pkgutil
from dataclasses import fields, replace
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from cellmill.errors import CellmillError
from cellmill.models.base import CellModel


def architectures() -> list[str]:
    """Names of the architectures in `cellmill.models`, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "MODEL")]


def load_architecture(name: str) -> type[CellModel]:
    """The architecture `name`: a module of `cellmill.models`, or the dotted path of your own module.

    Raises
    ------
    CellmillError
        If there is none of that name, your module cannot be imported, or its ``MODEL`` is no `CellModel`.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and importlib.util.find_spec(path) is None:
        raise CellmillError(
            f"architecture '{name}' is unknown; take one of {', '.join(architectures())}, "
            "or the dotted path of your own module"
        )
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise CellmillError(
            f"architecture '{name}' cannot be imported ({error}); check its path and PYTHONPATH"
        ) from error
    model = getattr(module, "MODEL", None)
    if not (isinstance(model, type) and issubclass(model, CellModel)):
        raise CellmillError(f"architecture '{name}' sets no MODEL; set MODEL in {path} to your subclass of CellModel")
    return model


def resolve_sizes(model_class: type[CellModel], preset: str, overrides: dict):
    """The sizes of `preset` with `overrides` put in: an instance of ``model_class.Sizes``.

    Raises
    ------
    CellmillError
        If the preset or a size is unknown, or a value has the wrong type or is out of bounds.
    """
    where = model_class.__name__
    if preset not in model_class.presets:
        raise CellmillError(f"{where} has no preset '{preset}'; take one of {', '.join(model_class.presets)}")
    kinds = get_type_hints(model_class.Sizes)
    known = {size.name: size for size in fields(model_class.Sizes)}
    for name, value in overrides.items():
        if name not in known:
            raise CellmillError(f"{where} has no size '{name}'; its sizes are {', '.join(known)}")
        fault = _fault(value, kinds[name], known[name].metadata)
        if fault:
            raise CellmillError(f"{where}: size '{name}' is {value!r}, but must be {fault}; change it under sizes")
    return replace(model_class.presets[preset], **overrides)


def _fault(value, kind, bounds) -> str | None:
    """What `value` must be and is not, or None."""
    if get_origin(kind) is Literal:
        return None if value in get_args(kind) else f"one of {', '.join(map(str, get_args(kind)))}"
    if isinstance(kind, UnionType):  # of a type, or None
        if value is None:
            return None
        (kind,) = set(get_args(kind)) - {NoneType}
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, f"of type {kind.__name__}")
    tests = {
        "ge": (lambda bound: value >= bound, "at least"),
        "gt": (lambda bound: value > bound, "more than"),
        "le": (lambda bound: value <= bound, "at most"),
        "lt": (lambda bound: value < bound, "less than"),
    }
    for key, (holds, words) in tests.items():
        if key in bounds and not holds(bounds[key]):
            return f"{words} {bounds[key]}"
    return None
