"""Released checkpoints, in and out: one module for each published layout, named as its architecture.

``read(path, ...)`` gives a `Released`; ``write(model, meta, out)`` writes a checkpoint of ours in the published layout.
"""

import importlib
from pathlib import Path

from cellmill.errors import CellmillError
from cellmill.released.files import Released

LAYOUTS = ("scgpt", "scfoundation", "geneformer", "exceiver", "scmulan")


def read_released(architecture: str, path: Path, genes: Path | None = None) -> Released:
    """Read the released checkpoint of an architecture.

    Parameters
    ----------
    architecture
        One of `LAYOUTS`.
    path
        The file, or the folder of the files, as published.
    genes
        The ordered list of genes, where it does not lie beside the weights: see the architecture's module.

    Raises
    ------
    CellmillError
        If there is no such layout, a file is missing, damaged, foreign or malicious, or does not fit the others.
    """
    return _layout(architecture).read(Path(path), genes=None if genes is None else Path(genes))


def write_released(architecture: str, model, meta: dict, out: Path) -> None:
    """Write a model of ours, with the description of its checkpoint, as files of the published layout into `out`."""
    _layout(architecture).write(model, meta, Path(out))


def _layout(architecture: str):
    if architecture not in LAYOUTS:
        raise CellmillError(
            f"there is no released layout of the architecture '{architecture}'; take one of {', '.join(LAYOUTS)}"
        )
    return importlib.import_module(f"{__name__}.{architecture}")
