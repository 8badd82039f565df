"""What every importer of released checkpoints does alike: reading without running code, and checking what was read.

A pickle is a program. Nothing here runs one: torch files are read with ``weights_only``, which builds tensors and plain
containers and refuses the rest, and plain pickles by an unpickler that knows nothing beyond `PLAIN`. Files may also
claim what they do not hold, so nothing is computed, unpacked or built before its size is compared with the file's.
"""

import gzip
import io
import json
import pathlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
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
NUMBERS = frozenset(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool]
    + [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
"""What a released tensor is made of."""
MAX_UNPACKED = 256 * 2**20
"""Bytes that a gzip file unpacks to at most: the published dictionaries take 2 MB, and a small file can ask for any."""
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
        _check_stored(path)
        with torch.serialization.safe_globals(list(HARMLESS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CellmillError:
        raise
    except Exception as error:  # a damaged file may raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise CellmillError(
                f"{path} is refused: it holds more than tensors and plain values, {asked[1]}, which could run code; "
                "take the published file, or save its state_dict alone"
            ) from error
        raise CellmillError(
            f"{path} cannot be read as a torch file: it is truncated, corrupt or of another format{_because(error)}; "
            "copy it again"
        ) from error


def _check_stored(path: Path) -> None:
    """`CellmillError` if a torch file is compressed, which can make a small file fill the memory."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the format before torch 1.6 compresses nothing
            return
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CellmillError(
            f"{path} is refused: it is compressed ({_some(packed)}), which torch.save never does; "
            "take the published file"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    _exists(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CellmillError(
            f"{path} cannot be read as safetensors: it is truncated, corrupt or of another format{_because(error)}; "
            "copy it again"
        ) from error


def read_json(path: Path):
    """The content of a JSON file, plain or gzipped."""
    _exists(path)
    try:
        return json.loads(read_bytes(path))
    except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise CellmillError(f"{path} is no JSON{_because(error)}; copy it again") from error


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
            content = _Unpickler(io.BytesIO(read_bytes(path))).load()
        except _RefusedError as error:
            raise CellmillError(f"{path} is refused: {error}; give the published file") from error
        except CellmillError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise CellmillError(f"{path} is no pickled dictionary{_because(error)}; copy it again") from error
    if not isinstance(content, dict):
        raise CellmillError(f"{path} holds a {type(content).__name__}, not a dictionary; give the published file")
    return content


class _RefusedError(Exception):
    """A pickle asks for what is no plain value."""


class _Kind:
    """A number's type, in the place of ``numpy.dtype``: that one lets a pickle make an object of any bytes."""

    def __init__(self, name: str, *_):
        if not (isinstance(name, str) and re.fullmatch(r"[<>=|]?[biuf][1248]", name)):
            raise _RefusedError(f"it asks for numpy values of type {name!r:.40}, not numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        """Of numpy's description of a type (version, byte order, ...) the byte order alone is heeded."""
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Made:
    """A function that a pickle may call and not change: a function of Python's takes attributes from it."""

    def __init__(self, make: Callable):
        self._make = make

    def __call__(self, *arguments):
        return self._make(*arguments)

    def __setstate__(self, state) -> None:
        raise _RefusedError("it changes a function")


def _number(kind: _Kind, content: bytes) -> int | float | bool:
    """A number of numpy's, as Python's."""
    if not (isinstance(kind, _Kind) and isinstance(content, bytes) and len(content) == kind.dtype.itemsize):
        raise _RefusedError("it holds a numpy value that is no number")
    return np.frombuffer(content, kind.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """The bytes of a number, which old pickles hold as text."""
    if not (isinstance(text, str) and encoding == "latin1"):
        raise _RefusedError(f"it encodes by {encoding!r:.40}")
    return text.encode("latin1")


PLAIN = {
    ("collections", "OrderedDict"): dict,
    ("numpy", "dtype"): _Kind,
    ("numpy.core.multiarray", "scalar"): _Made(_number),
    ("numpy._core.multiarray", "scalar"): _Made(_number),
    ("_codecs", "encode"): _Made(_encode),
}
"""What a released dictionary is made of, beside Python's containers, numbers and strings; nothing is numpy's own."""


class _Unpickler(pickle.Unpickler):
    """Builds plain values only."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise _RefusedError(f"it asks for {module}.{name}, which could run code")
        return PLAIN[module, name]


def strip(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors without any of `prefixes` in front of their names."""
    stripped = {}
    for name, tensor in tensors.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        stripped[name] = tensor
    return stripped


def check_depth(n_layers: int, tensors: dict[str, Tensor], where: Path) -> None:
    """`CellmillError` if settings claim more layers than there are tensors, before names of so many are made."""
    if n_layers > len(tensors):
        raise CellmillError(
            f"{where} lacks tensors of the {n_layers:,} layers that its settings say: it holds {len(tensors):,} "
            "tensors in all; take weights and settings of one release"
        )


def build(
    make: Callable[[], CellModel],
    names_of: Callable[[CellModel], dict[str, str]],
    tensors: dict[str, Tensor],
    where: Path,
) -> CellModel:
    """A model, not yet filled, once released tensors are known to fit it: settings may claim any size.

    Parameters
    ----------
    make
        Builds the model; called twice, first without memory for its tensors (torch's device ``meta``).
    names_of
        Of the model, for each tensor that is released, its name there.
    tensors
        As released.
    where
        The file, for messages.

    Raises
    ------
    CellmillError
        If the settings are impossible, or a tensor is missing or of another shape.
    """
    try:
        with torch.device("meta"):
            shapes = make()
    except CellmillError:
        raise
    except Exception as error:  # sizes without bounds raise whatever overflows first
        raise CellmillError(
            f"{where}: its settings make no model{_because(error)}; take weights and settings of one release"
        ) from error
    _check_fit(shapes, tensors, names_of(shapes), where)
    return make()


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
    _check_fit(model, tensors, names, where)
    wrong = [released for released in names.values() if not tensors[released].isfinite().all()]
    if wrong:
        raise CellmillError(f"{where} holds values that are not finite ({_some(wrong)}); copy it again")
    own = model_tensors(model)
    for name, released in names.items():
        own[name].copy_(tensors[released])
    assert not own.keys() - names.keys(), f"no released name for {sorted(own.keys() - names.keys())}"


def _check_fit(model: CellModel, tensors: dict[str, Tensor], names: dict[str, str], where: Path) -> None:
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


def ignored(tensors: dict[str, Tensor], used: dict[str, str], where: Path) -> list[str]:
    """One remark on the released tensors that nothing was made of; none if there are none."""
    rest = sorted(tensors.keys() - set(used.values()))
    return [f"{where.name}: {len(rest)} tensors are not used ({_some(rest)})"] if rest else []


def state_dict_of(content, where: Path) -> dict[str, Tensor]:
    """`content` if it maps names to tensors; `CellmillError` otherwise."""
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    ):
        raise CellmillError(f"{where} holds no state_dict (names and tensors); give the published file")
    n_bytes = where.stat().st_size
    strange = [name for name, tensor in content.items() if not _is_plain(tensor, n_bytes)]
    if strange:
        raise CellmillError(
            f"{where} holds {len(strange)} tensors that are not plain numbers stored one by one ({_some(strange)}): "
            "sparse, quantised, nested, complex, repeated or absent ones; give the published file"
        )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in content.items()}


def _is_plain(tensor: Tensor, n_bytes: int) -> bool:
    """Whether every element stands in the file, of `n_bytes`: strides and old files can claim any number of them."""
    plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    if not plain or tensor.dtype not in NUMBERS:
        return False
    return tensor.numel() * tensor.element_size() <= min(tensor.untyped_storage().nbytes(), n_bytes)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _exists(path: Path) -> None:
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; give the path of the released file")


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is gzipped."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            file.seek(0)
            return file.read()
    with gzip.open(path) as file:
        content = file.read(MAX_UNPACKED + 1)
    if len(content) > MAX_UNPACKED:
        raise CellmillError(
            f"{path} is refused: it unpacks to more than {MAX_UNPACKED // 2**20} MiB; give the published file"
        )
    return content


def _because(error: Exception) -> str:
    """The reason in brackets, where an error's first line says one in words; torch's follows a warning."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0][:160]
    return f" ({reason})" if re.search(r"[A-Za-z]{2}", reason) else ""
