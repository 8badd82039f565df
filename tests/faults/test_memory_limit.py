"""Training under a limit of memory that the system enforces, too small for the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from limited_runs import SIZES
from small_runs import make_corpus

TESTS = Path(__file__).resolve().parents[1]
TRAINING = {"steps": 4, "batch_size": 64, "validate_every": 4, "checkpoint_every": 2}
WHOLE = 10**6
ADDRESSES = 3 * 10**8
"""Bytes that a process may take after its imports; the whole batch in one pass takes more."""


def run(shards: Path, **given) -> dict:
    """`limited_runs.run` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "limited_runs.py"), json.dumps({"shards": str(shards), "sizes": SIZES} | given)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent / "workflow")))},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), data).folder


@pytest.fixture(scope="module")
def unlimited(corpus) -> dict:
    found = run(corpus, training=TRAINING | {"micro_batch_tokens": WHOLE})
    assert found["error"] is None
    return found


def same_curve(found: dict, unlimited: dict) -> None:
    """The run ended with the losses of the one without a limit."""
    assert found["error"] is None, found["said"]
    np.testing.assert_allclose(found["losses"], unlimited["losses"], rtol=1e-5)


def test_a_limit_of_addresses_is_found(corpus, unlimited):
    found = run(corpus, training=TRAINING | {"micro_batch_tokens": "auto"}, addresses=ADDRESSES)
    same_curve(found, unlimited)
    assert "ulimit -v" in found["said"]
    assert "more than a step has" not in found["said"]


def test_a_step_that_runs_out_of_memory_is_done_again(corpus, unlimited):
    found = run(corpus, training=TRAINING | {"micro_batch_tokens": "auto"}, addresses=ADDRESSES, blind=True)
    same_curve(found, unlimited)
    assert "memory ran out in step 1: done again with micro batches of" in found["said"]


def test_a_fixed_number_of_tokens_ends_in_a_sentence(corpus):
    found = run(corpus, training=TRAINING | {"micro_batch_tokens": WHOLE}, addresses=ADDRESSES)
    assert "memory ran out" in found["error"]
    assert "micro_batch_tokens to auto" in found["error"]


def test_memory_gb_is_kept(corpus, unlimited):
    limit = 0.8 * unlimited["peak"]
    found = run(corpus, training=TRAINING | {"micro_batch_tokens": "auto", "memory_gb": limit / 1e9})
    same_curve(found, unlimited)
    assert found["peak"] <= limit
    assert "training.memory_gb" in found["said"]
