"""The originals of envs/parity.txt, against which tests hold our models; skipped where they are not installed."""

import importlib
import os

import pytest

INSTALL = "pip install --no-deps -r envs/parity.txt"


def original(name: str):
    """The module `name`; the test that asks is skipped, with the reason, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}); `{INSTALL}` puts it beside envs/lock.txt")


@pytest.fixture(scope="session")
def transformers():
    """Hugging Face's transformers, which fetches nothing."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return original("transformers")
