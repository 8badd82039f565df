"""An edit reruns the jobs that it can change, and no others."""

import ast
import importlib.metadata
import re
import shutil
import sys

import pytest
import yaml
from cellmill import provenance
from cellmill.errors import CellmillError
from cellmill.flow import module_file
from cellmill.provenance import PACKAGE, PROJECT, WORKFLOW, code_version, sources

SCRIPTS = sorted(path.stem for path in (WORKFLOW / "scripts").glob("*.py"))
RULES = [path.read_text() for path in sorted((WORKFLOW / "rules").glob("*.smk"))]
BY_NAME = {"score": ("tasks", "TASK = "), "import_released": ("released", "def read\\(")} | dict.fromkeys(
    ("pretrain", "embed_model", "embed_untrained", "score_pretraining", "score_yardstick"), ("models", "MODEL = ")
)
"""Scripts that load a module by name: the room that it is in, and what makes it one."""


def named(script: str) -> list[str]:
    """The package's modules that `script` may load by name, relative to the package."""
    if script not in BY_NAME:
        return []
    room, mark = BY_NAME[script]
    paths = sorted((PACKAGE / room).glob("[!_]*.py"))
    return [f"{room}/{path.name}" for path in paths if re.search(rf"^{mark}", path.read_text(), re.MULTILINE)]


def used(script: str, *more: str) -> set[str]:
    return {path.relative_to(WORKFLOW).as_posix() for path in sources(script, *more)}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the workflow that may be edited."""
    workflow = tmp_path / "workflow"
    for folder in ("cellmill", "scripts"):
        shutil.copytree(WORKFLOW / folder, workflow / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "WORKFLOW", workflow)
    monkeypatch.setattr(provenance, "PACKAGE", workflow / "cellmill")
    without = {workflow / path.relative_to(WORKFLOW) for path in provenance._WITHOUT_RESULTS}
    monkeypatch.setattr(provenance, "_WITHOUT_RESULTS", without)
    provenance._parsed.cache_clear()
    yield workflow / "cellmill"
    provenance._parsed.cache_clear()


def reruns(copy, name: str, new_code: str) -> set[str]:
    """The jobs (SCRIPT, or SCRIPT:NAME where it loads a module by name) that new code in a file of ours reruns."""
    provenance._parsed.cache_clear()
    before = versions()
    path = copy / name
    path.write_text(path.read_text() + new_code)
    provenance._parsed.cache_clear()
    after = versions()
    return {job for job in before if before[job] != after[job]}


def versions() -> dict[str, str]:
    jobs = {}
    for script in SCRIPTS:
        modules = named(script)
        jobs |= {f"{script}:{name}": code_version(script, name) for name in modules}
        if not modules:
            jobs[script] = code_version(script)
    return jobs


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("score", {"tasks/base.py", "tasks/baselines.py", "tasks/__init__.py", "embed.py", "scores.py"}),
        ("embed_baseline", {"embed.py", "tasks/baselines.py", "tasks/controls.py", "methods.py", "files.py"}),
        ("embed_untrained", {"shards/statistics.py", "checkpoints.py", "models/__init__.py"}),
        ("statistics", {"models/base.py", "shards/statistics.py"}),
        ("pretrain", {"vocabulary.py", "evaluate_loss.py", "shards/loader.py"}),
        ("build_census", {"census/wheels.py", "census/ontology.py", "files.py"}),
        ("shards", {"splits.py", "qc.py", "__init__.py"}),
        ("write_report", {"report/charts.py", "report/page.py", "scores.py"}),
    ],
)
def test_sources_are_what_a_script_imports(script, expected):
    found = used(script)
    assert {f"cellmill/{name}" for name in expected} <= found
    assert f"scripts/{script}.py" in found
    assert not found & {"cellmill/config.py", "cellmill/job.py", "cellmill/errors.py", "cellmill/models/scgpt.py"}


def test_a_module_that_is_loaded_by_name_brings_what_it_imports():
    assert "cellmill/models/attention.py" not in used("pretrain")
    assert {"cellmill/models/attention.py", "cellmill/views/ragged.py"} <= used("pretrain", "models/scgpt.py")
    assert "cellmill/models/geneformer.py" not in used("pretrain", "models/scgpt.py")


def test_every_rule_carries_the_version_of_its_own_script():
    for text in RULES:
        for rule in text.split("\nrule ")[1:]:
            script = re.search(r'"\.\./scripts/(\w+)\.py"', rule)[1]
            version = re.search(r'code=(?:code_version\("(\w+)"\)|flow\.(\w+))', rule)
            assert version[1] == script or version[2] in (f"{script}_code", "embed_code"), rule
    assert "embed_code" in "".join(RULES)


def test_an_edit_of_one_model_or_task_leaves_the_others(copy):
    scgpt = {f"{script}:models/scgpt.py" for script, (room, _) in BY_NAME.items() if room == "models"}
    assert reruns(copy, "models/scgpt.py", "x = 1\n") == scgpt | {"import_released:released/scgpt.py"}
    assert reruns(copy, "tasks/annotation.py", "x = 1\n") == {"score:tasks/annotation.py"}


def test_an_edit_reruns_what_imports_it(copy):
    assert reruns(copy, "census/wheels.py", "x = 1\n") == {"fetch_wheels", "demo_cells", "build_census"}
    assert reruns(copy, "report/charts.py", "x = 1\n") == {"write_report", "corpus_page"}
    assert reruns(copy, "files.py", "x = 1\n") == set(versions())
    assert reruns(copy, "config.py", "x = 1\n") == set()


def test_comments_and_docstrings_do_not_count(copy):
    before = versions()
    for path in copy.rglob("*.py"):
        lines = path.read_text().replace('"""', '"""New words. ')
        path.write_text(re.sub(r"New words\. (\s*\n)", r"\1", lines) + "# a comment\n")
    provenance._parsed.cache_clear()
    assert versions() == before


def test_a_users_module_is_hashed(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "model.py"
    path.write_text("from cellmill.models.attention import attend\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = module_file("models", "mine.model")
    assert found == str(path)
    assert PACKAGE / "models" / "attention.py" in sources("pretrain", found)
    before = code_version("pretrain", found)
    path.write_text("from cellmill.models.attention import attend\nx = 1\n")
    provenance._parsed.cache_clear()
    assert code_version("pretrain", found) != before
    assert module_file("models", "scgpt") == "models/scgpt.py"
    for name in ("mine.none", "no_such.model"):
        with pytest.raises(CellmillError, match=f"the module '{name}' is not found; check its path and PYTHONPATH"):
            module_file("models", name)


def imports(path, into_functions: bool) -> set[str]:
    """Dotted names that a source imports, when it is loaded or also when its functions run."""
    names, waiting = set(), [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif into_functions or not isinstance(node, ast.FunctionDef):
            waiting += ast.iter_child_nodes(node)
    return names


def third_party(script: str) -> set[str]:
    """Top-level modules that a job needs: those that all it loads of this package imports, sooner or later.

    A module of this package that is imported inside a function does not count: `cellmill.vocabulary` so reads a Census
    in one job and is light in all others.
    """
    found, waiting = set(), [WORKFLOW / "scripts" / f"{script}.py", *(PACKAGE / name for name in named(script))]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imports(path, into_functions=False):
            parts = name.split(".")
            modules = [provenance._module(".".join(parts[:n])) for n in range(1, len(parts) + 1)]
            waiting += [module for module in modules if module is not None]
    names = {name.partition(".")[0] for path in found for name in imports(path, into_functions=True)}
    return names - sys.stdlib_module_names - {"cellmill"}


def project_name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def with_dependencies(names: set[str]) -> set[str]:
    """Installed distributions and, in turn, what they require without extras."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        waiting |= {project_name(line) for line in required if "extra ==" not in line} - found
    return found


@pytest.mark.parametrize("environment", sorted(path.name for path in (PROJECT / "envs").glob("*.yaml")))
def test_conda_files_name_what_their_scripts_import(environment):
    serves = {
        re.search(r'"\.\./scripts/(\w+)\.py"', rule)[1]
        for text in RULES
        for rule in text.split("\nrule ")[1:]
        if f"envs/{environment}" in rule
    }
    assert serves
    content = yaml.safe_load((PROJECT / "envs" / environment).read_text())
    pip = next(part["pip"] for part in content["dependencies"] if isinstance(part, dict))
    named_in_it = {"cellmill" if line.startswith("-e") else project_name(line) for line in pip if line[:2] != "-c"}
    installed = with_dependencies(named_in_it)
    distributions = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in set().union(*map(third_party, serves))
        if not installed & {project_name(found) for found in distributions.get(name, [name])}
    }
    assert not missing
