"""Tasks: one module each, found by name. A module that defines ``TASK`` (a `Task`) is a task."""

import importlib
import pkgutil
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from cellmill.errors import CellmillError
from cellmill.progress import Progress
from cellmill.scores import row
from cellmill.shards.dataset import Shards
from cellmill.tasks.base import Task
from cellmill.tasks.data import Target


def tasks() -> list[str]:
    """Names of the tasks in `cellmill.tasks`, in alphabetical order."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "TASK")]


def load_task(name: str) -> type[Task]:
    """The task `name`: a module of `cellmill.tasks`, or the dotted path of your own module.

    Raises
    ------
    CellmillError
        If there is none of that name, your module cannot be imported, or its ``TASK`` is no `Task`.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in tasks():
        raise CellmillError(
            f"task '{name}' is unknown; take one of {', '.join(tasks())}, or the dotted path of your own module"
        )
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise CellmillError(f"task '{name}' cannot be imported ({error}); check its path and PYTHONPATH") from error
    task = getattr(module, "TASK", None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise CellmillError(f"task '{name}' sets no TASK; set TASK in {path} to your subclass of Task")
    return task


def score_embeddings(
    task: type[Task],
    settings,
    dataset: str,
    embeddings: list[tuple[Path, dict]],
    shards: Path,
    section,
    provenance: dict,
    cache: Path | None = None,
) -> list[dict]:
    """Score embeddings of one benchmark in one process, so that libraries load and programs are compiled once.

    Parameters
    ----------
    task, settings
        A `Task` and an instance of its `Settings`.
    dataset
        The benchmark's name.
    embeddings
        For each embedding its .npy file, float32 [cells, E] in the order of the shards, and what is known of it:
        `model` (the name in the table), `kind`, `seed`, `seen` and `checkpoint` (its hash, or None).
    shards
        The benchmark's folder of shards.
    section
        What the config says of the benchmark: `label`, `batch`, `min_cells_per_label`.
    provenance
        The columns `run`, `code_version`, `commit` and `config_hash`.
    cache
        Folder in which compiled programs are kept for later processes. Default: none are kept.

    Returns
    -------
    list of dict
        Rows of the table (`cellmill.scores.row`).

    Raises
    ------
    CellmillError
        If a file or a column is missing, or an embedding does not have one row per cell.
    """
    cells = Shards(shards)
    target = Target.read(cells, section.label, section.batch, section.min_cells_per_label)
    scorer = task(settings, cache)
    scorer.start()
    rows = []
    # one thread, set after the libraries are loaded: sums depend on the number of threads, to the bit
    with Progress(f"{task.name} of {dataset}", len(embeddings)) as progress, threadpool_limits(1):
        if target.left_out:
            few = ", ".join(f"{name or '(none)'} {n}" for name, n in target.left_out.items())
            progress.say(f"{sum(target.left_out.values())} of {target.n_all} cells are left out: {few}")
        for path, meta in embeddings:
            x_NE = read_embedding(path, target.n_all)[target.rows_N]
            start = time.perf_counter()
            scored = scorer.score(x_NE, target, meta["seed"])
            columns = {name: meta[name] for name in ("model", "kind", "seed", "seen", "checkpoint")}
            rows += [row(task=task.name, dataset=dataset, **columns, **provenance, **score) for score in scored]
            seconds = time.perf_counter() - start
            progress.say(f"{meta['model']}, seed {meta['seed']}: {len(scored)} scores, {seconds:.1f} s")
    return rows


def read_embedding(path: Path, n_cells: int) -> np.ndarray:
    """float32 [cells, E] from an .npy file.

    Raises
    ------
    CellmillError
        If the file cannot be read, is not a matrix of floats, or has another number of cells.
    """
    try:
        x_NE = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CellmillError(f"{path} cannot be read as an embedding; delete it and run again ({error})") from error
    if x_NE.ndim != 2 or x_NE.dtype.kind != "f" or x_NE.shape[0] != n_cells or x_NE.shape[1] < 1:
        raise CellmillError(
            f"{path} holds {x_NE.dtype} of shape {x_NE.shape}, but the benchmark's shards hold {n_cells} cells; "
            "delete it and run again"
        )
    return x_NE.astype(np.float32, copy=False)
