"""Runs of the whole workflow on the demo's real cells, with models so small that they train in a second."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from cellmill.files import sha256

ROOT = Path(__file__).resolve().parents[1]

SIZES = {"n_layers": 1, "width": 16, "n_heads": 2, "hidden": 16, "max_length": 64}
MODEL = {
    "preset": "demo",
    "sizes": SIZES,
    "training": {"steps": 6, "batch_size": 8, "warmup_steps": 2, "validate_every": 3, "validation_cells": 16},
}


def tiny_config(census: Path) -> dict:
    """The demo on a Census that is there already, with two seeds."""
    config = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    config["run"] = "tiny"
    config["seeds"] = [0, 1]
    config["census"] |= {"source": "local", "path": str(census)}
    return config


class Workflow:
    """A working folder with a run's config, in which Snakemake is run as a user would run it.

    Parameters
    ----------
    folder
        The working folder; results land in ``folder/results/tiny``.
    census
        A Census on disk.
    """

    def __init__(self, folder: Path, census: Path):
        self.folder = folder
        self.config = tiny_config(census)
        self.models = {
            "little-geneformer": {"architecture": "geneformer", **copy.deepcopy(MODEL)},
            "little-scgpt": {"architecture": "scgpt", **copy.deepcopy(MODEL)},
        }
        self.config["models"] = [str(folder / f"{name}.yaml") for name in self.models]

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny"

    def write_config(self) -> Path:
        """Write the config and the models as they now stand."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, model in self.models.items():
            (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(model))
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def run(self, *arguments: str, cores: int = 2, **environment: str) -> subprocess.CompletedProcess:
        """Run Snakemake; its output is captured."""
        command = [
            *(str(Path(sys.executable).with_name("snakemake")), "--snakefile", str(ROOT / "Snakefile")),
            *("--directory", str(self.folder), "--configfile", str(self.write_config()), "--cores", str(cores)),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs per rule that a run would do now."""
        ended = self.run("--dry-run", *arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        counts = dict(re.findall(r"^(\w+) +(\d+)$", ended.stdout + ended.stderr, flags=re.MULTILINE))
        counts.pop("total", None)
        return {rule: int(count) for rule, count in counts.items()}


def said(ended: subprocess.CompletedProcess) -> str:
    """The one sentence that a run ended with."""
    output = ended.stdout + ended.stderr
    assert ended.returncode != 0, output
    assert "Traceback" not in output, output
    lines = output.splitlines()
    sentences = {line for line in lines if line.startswith("cellmill: ")}
    assert sentences == {lines[-1]}, output
    return lines[-1]


def succeeds(ended: subprocess.CompletedProcess) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr


def contents(folder: Path) -> dict[Path, str]:
    """The hash of every result below a folder."""
    passing = {"logs", "benchmarks", "ballast"}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: sha256(path) for path in paths if passing.isdisjoint(path.relative_to(folder).parts)}


def one_model(folder: Path, census: Path) -> Workflow:
    """A run of one small model on the cell lines."""
    workflow = Workflow(folder, census)
    workflow.models.pop("little-geneformer")
    workflow.config["models"] = [str(folder / "little-scgpt.yaml")]
    workflow.config["seeds"] = [0]
    workflow.config["corpus"] |= {"blocks": 1, "include": {"dataset_id": ["li_cell_lines"]}}
    return workflow
