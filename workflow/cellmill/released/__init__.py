"""Released checkpoints, in and out: one module for each published layout, named as its architecture.

``read(path, ...)`` gives a `Released`; ``write(model, meta, out)`` writes a checkpoint of ours in the published layout.
"""

import importlib
from pathlib import Path

from cellmill.checkpoints import save_checkpoint
from cellmill.errors import CellmillError
from cellmill.files import sha256
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


def import_released(name: str, architecture: str, path: Path, genes: Path | None, out: Path) -> list[str]:
    """Write a released checkpoint as one of ours into `out`; returns what was tolerated.

    Its cells are unknown, so every benchmark is marked as "unknown" whether seen.
    """
    released = read_released(architecture, path, genes)
    source = Path(path) if Path(path).exists() else Path(str(path).partition("#")[0])
    files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.is_file())
    if genes is not None and Path(genes).is_file():
        files.append(Path(genes))
    meta = {
        "name": name,
        "seed": 0,
        "recipe": {"architecture": architecture, "preset": "released", "sizes": {}},
        "feature_ids": released.genes,
        "released": {"files": {file.name: sha256(file) for file in files}, "remarks": released.remarks},
        "datasets": None,
        "primary_only": False,
    }
    save_checkpoint(Path(out), released.model, meta)
    return released.remarks


def write_released(architecture: str, model, meta: dict, out: Path) -> None:
    """Write a model of ours, with the description of its checkpoint, as files of the published layout into `out`."""
    _layout(architecture).write(model, meta, Path(out))


def _layout(architecture: str):
    if architecture not in LAYOUTS:
        raise CellmillError(
            f"there is no released layout of the architecture '{architecture}'; take one of {', '.join(LAYOUTS)}"
        )
    return importlib.import_module(f"{__name__}.{architecture}")
