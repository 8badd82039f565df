"""Which code, versions and settings made a result."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
WORKFLOW = PACKAGE.parent
PROJECT = WORKFLOW.parent
"""The folder of the Snakefile."""

# Imported by jobs, but without a say in their results: types of settings whose values are parameters of the rules, and
# what is said, logged or recorded around the work. An edit to them reruns nothing.
_WITHOUT_RESULTS = frozenset(
    PACKAGE / f"{name}.py" for name in ("config", "config_docs", "errors", "flow", "job", "progress", "provenance")
)


@lru_cache
def _parsed(path: Path) -> tuple[str, frozenset[Path]]:
    """Hash of a source's syntax tree, for which comments, layout and docstrings do not count; what it imports of ours.

    Imports inside functions count. Of ``from cellmill.models import load_architecture`` the package's ``__init__`` is
    the source, of ``from cellmill.models import base`` only that module is.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported |= {_module(f"{node.module}.{alias.name}") or _module(node.module) for alias in node.names}
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), frozenset(imported - {None})


def _is_text(statement: ast.stmt) -> bool:
    """A docstring, of whatever it stands below."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _module(name: str) -> Path | None:
    """The source of a module of this package, None for anything else."""
    top, *parts = name.split(".")
    if top != PACKAGE.name:
        return None
    path = PACKAGE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def sources(script: str, *more: str | Path) -> list[Path]:
    """The sources that a job runs: its script, further files, and all that these import of this package, in turn.

    An architecture or task is loaded by name, which no import statement shows: it must be among `more`.

    Parameters
    ----------
    script
        Name of a file in ``workflow/scripts``, without ``.py``.
    *more
        Further files, relative to the package (``models/scgpt.py``) or absolute (a user's own module; what it imports
        of other packages is not followed).
    """
    found, waiting = set(), [WORKFLOW / "scripts" / f"{script}.py", *(PACKAGE / path for path in more)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _parsed(path)[1] - _WITHOUT_RESULTS
    return sorted(found)


def code_version(script: str, *more: str | Path) -> str:
    """A short hash of the `sources` that a job runs.

    Snakemake reruns a job when its rule or script changes, but does not see edits inside an imported package. Rules
    therefore carry this hash as a parameter.
    """
    digest = hashlib.sha256()
    for path in sources(script, *more):
        name = path.relative_to(WORKFLOW).as_posix() if path.is_relative_to(WORKFLOW) else path.name
        digest.update(f"{name} {_parsed(path)[0]}\n".encode())
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
