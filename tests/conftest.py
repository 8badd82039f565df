"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets (CELLMILL_DATA, default ../shared/data); the test is skipped where it is absent."""
    folder = Path(os.environ.get("CELLMILL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data sets not found: {folder} does not exist (set CELLMILL_DATA)")
    return folder
