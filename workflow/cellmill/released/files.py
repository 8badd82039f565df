"""What every importer of released checkpoints does alike: reading without running code, and checking what was read.

A pickle is a program. Nothing here runs one: torch files are read with ``weights_only``, which builds tensors and plain
containers and refuses the rest, and plain pickles by an unpickler that knows no class beyond those in `PLAIN`.
"""

import gzip
import io
import json
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import CellModel

HARMLESS = (pathlib.PosixPath, pathlib.PurePosixPath, set)
"""Classes that released torch files hold beside tensors; building one runs nothing."""
PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,
    ("numpy._core.multiarray", "scalar"): np._core.multiarray.scalar,
}
"""What a released dictionary is made of, beside Python's own containers, numbers and strings."""
MAX_NAMED = 3
"""Tensors that a sentence names at most."""


class Released(NamedTuple):
    """A released model as it was read."""

    model: CellModel
    """In evaluation mode, float32, on the CPU."""
    genes: list[str]
    """The model's genes in the order of its ids: Ensembl ids, or symbols."""
    remarks: list[str]
    """What was tolerated, one sentence each."""


def read_torch(path: Path):
    """The content of a torch file, without running any code of it.

    Raises
    ------
    CellmillError
        If the file is missing, truncated, no torch file, or holds objects that could run code.
    """
    _exists(path)
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise CellmillError(
            f"{path} is refused: it holds more than tensors and plain values"
            f"{f', {asked[1]}' if asked else ''}, which could run code; "
            "take the published file, or save its state_dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CellmillError(
            f"{path} cannot be read as a torch file: it is truncated, corrupt or of another format "
            f"({_first_line(error)}); copy it again"
        ) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    _exists(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CellmillError(
            f"{path} cannot be read as safetensors: it is truncated, corrupt or of another format "
            f"({_first_line(error)}); copy it again"
        ) from error


def read_json(path: Path):
    """The content of a JSON file, plain or gzipped."""
    _exists(path)
    try:
        return json.loads(_bytes(path))
    except (ValueError, OSError, EOFError) as error:
        raise CellmillError(f"{path} is no JSON ({_first_line(error)}); copy it again") from error


def read_dictionary(path: Path) -> dict:
    """A dictionary from JSON (.json, .json.gz) or from a pickle of plain values (any other name), numbers as Python's.

    Raises
    ------
    CellmillError
        As `read_torch`, and if the content is no dictionary.
    """
    if path.name.removesuffix(".gz").endswith(".json"):
        content = read_json(path)
    else:
        _exists(path)
        try:
            content = _Unpickler(io.BytesIO(_bytes(path))).load()
        except CellmillError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise CellmillError(f"{path} is no pickled dictionary ({_first_line(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise CellmillError(f"{path} holds a {type(content).__name__}, not a dictionary; give the published file")
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    """Builds plain values only."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise CellmillError(
                f"the pickle is refused: it asks for {module}.{name}, which could run code; give the published file"
            )
        return PLAIN[module, name]


def strip(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors without any of `prefixes` in front of their names."""
    stripped = {}
    for name, tensor in tensors.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        stripped[name] = tensor
    return stripped


def fill(model: CellModel, tensors: dict[str, Tensor], names: dict[str, str], where: Path) -> None:
    """Copy released tensors into a model.

    Parameters
    ----------
    model
        Gets them in place.
    tensors
        As released.
    names
        For each tensor of the model (`cellmill.checkpoints.model_tensors`), the released name.
    where
        The file, for messages.

    Raises
    ------
    CellmillError
        If a tensor is missing, of another shape, or not finite.
    """
    own = model_tensors(model)
    missing = [released for name, released in names.items() if released not in tensors]
    if missing:
        raise CellmillError(
            f"{where} lacks {len(missing)} of the {len(names)} tensors of a {type(model).__name__} "
            f"({_some(missing)}); it is of another model or incomplete"
        )
    unlike = [
        f"{released} is {list(tensors[released].shape)}, expected {list(own[name].shape)}"
        for name, released in names.items()
        if tensors[released].shape != own[name].shape
    ]
    if unlike:
        raise CellmillError(
            f"{where} does not fit its own description or vocabulary: {len(unlike)} tensors have other shapes "
            f"({_some(unlike)}); take weights, settings and vocabulary of one release"
        )
    wrong = [released for released in names.values() if not tensors[released].isfinite().all()]
    if wrong:
        raise CellmillError(f"{where} holds values that are not finite ({_some(wrong)}); copy it again")
    for name, released in names.items():
        own[name].copy_(tensors[released])
    assert not own.keys() - names.keys(), f"no released name for {sorted(own.keys() - names.keys())}"


def ignored(tensors: dict[str, Tensor], used: dict[str, str], where: Path) -> list[str]:
    """One remark on the released tensors that nothing was made of; none if there are none."""
    rest = sorted(tensors.keys() - set(used.values()))
    return [f"{where.name}: {len(rest)} tensors are not used ({_some(rest)})"] if rest else []


def state_dict_of(content, where: Path) -> dict[str, Tensor]:
    """`content` if it maps names to tensors; `CellmillError` otherwise."""
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CellmillError(f"{where} holds no state_dict (names and tensors); give the published file")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _exists(path: Path) -> None:
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; give the path of the released file")


def _bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__
