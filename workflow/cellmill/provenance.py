"""Which code, versions and settings made a result."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent

# The sources that each kind of job runs, as globs inside the package: an edit to one of them reruns that kind of job.
_BASE = ("errors.py", "files.py", "randomness.py")
_SHARDS = (*_BASE, "shards/batch.py", "shards/format.py", "shards/manifest.py", "shards/dataset.py")
_MODELS = ("views.py", "models/__init__.py", "models/base.py", "models/attention.py", "recipes.py", "checkpoints.py")
_TRAINING = ("device.py", "optimizer.py", "training_state.py", "evaluate_loss.py", "pretrain.py")
ROOMS = {
    "wheels": ("census/wheels.py",),
    "demo_cells": ("census/wheels.py", "census/demo.py", "census/ontology.py"),
    "build_census": ("census/build.py", "census/genes.py", "census/h5ad.py", "census/ontology.py"),
    "plan_cells": ("census/read.py", "census/plan.py", "splits.py", "qc.py"),
    "vocabulary": ("census/read.py", "vocabulary.py"),
    "curate_block": (*_SHARDS, "census/read.py", "shards/curate.py", "qc.py", "vocabulary.py"),
    "shards": (*_SHARDS, "shards/assemble.py", "qc.py", "vocabulary.py"),
    "statistics": (*_SHARDS, "shards/statistics.py"),
    "pretrain": (*_SHARDS, *_MODELS, "shards/loader.py", "shards/statistics.py", *_TRAINING),
    "embed_model": (*_SHARDS, *_MODELS, "device.py", "embed.py"),
    "embed_baseline": (*_SHARDS, "tasks/data.py", "tasks/baselines.py", "tasks/controls.py"),
    "score": (*_SHARDS, "scores.py", "tasks/__init__.py", "tasks/base.py", "tasks/data.py"),
    "score_pretraining": (*_SHARDS, *_MODELS, "device.py", "evaluate_loss.py", "pretraining_scores.py", "scores.py"),
    "collect_scores": ("scores.py",),
    "report": (*_SHARDS, "report/*.py", "census/genes.py", "vocabulary.py", "scores.py"),
}


@lru_cache
def _source_hash(path: Path) -> str:
    """Hash of a module's syntax tree: comments and layout do not count."""
    return hashlib.sha256(ast.dump(ast.parse(path.read_text())).encode()).hexdigest()


def code_version(room: str, *more: str) -> str:
    """A short hash of the sources that a kind of job runs.

    Snakemake reruns a job when its rule or script changes, but does not see edits inside an imported package. Rules
    therefore carry this hash as a parameter.

    Parameters
    ----------
    room
        A key of `ROOMS`.
    *more
        Further files relative to the package, such as ``models/scgpt.py``.
    """
    digest = hashlib.sha256()
    for pattern in (*ROOMS[room], *more):
        paths = sorted(PACKAGE.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"provenance.ROOMS[{room!r}] names {pattern}, which is not in the package")
        for path in paths:
            digest.update(f"{path.relative_to(PACKAGE)} {_source_hash(path)}\n".encode())
    return digest.hexdigest()[:12]


def content_hash(content) -> str:
    """A short hash of JSON-like content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def git_commit(folder: Path = PACKAGE) -> str:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it; ``unknown`` outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of every installed package."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | dict(sorted(packages.items(), key=_lower_name))


def _lower_name(item: tuple[str, str]) -> str:
    return item[0].lower()
