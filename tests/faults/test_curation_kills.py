"""Curation that is killed at random moments and run again gives the bytes of one that never was."""

import multiprocessing
import os
import random
import shutil
import time

import curation_kills
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kills")]

KILLS = int(os.environ.get("CELLMILL_KILLS", "50"))
BLOCKS = 3


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported what they need, and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curation_kills"])
    return context


def run(processes, soma, folder, seconds: float | None = None) -> bool:
    """Run the corpus phase, killed after so many seconds; did it come to its end?"""
    process = processes.Process(target=curation_kills.child, args=(str(soma), str(folder), BLOCKS))
    process.start()
    process.join(seconds)
    ended = process.exitcode is not None
    if not ended:
        process.kill()
        process.join()
    assert not ended or process.exitcode == 0
    return ended


def test_killed_at_random_moments(processes, demo_census, tmp_path):
    run(processes, demo_census.soma, tmp_path / "warm")
    started = time.monotonic()
    assert run(processes, demo_census.soma, tmp_path / "whole")
    duration = time.monotonic() - started
    expected = curation_kills.shard_bytes(tmp_path / "whole")
    assert len(expected) > 3

    moments, killed, again = random.Random(0), 0, tmp_path / "again"
    while killed < KILLS:
        if run(processes, demo_census.soma, again, moments.uniform(0, duration)):
            assert curation_kills.shard_bytes(again) == expected
            shutil.rmtree(again)
        else:
            killed += 1
    assert run(processes, demo_census.soma, again)
    assert curation_kills.shard_bytes(again) == expected
    left = [path for path in again.rglob("*") if ".tmp" in path.name]
    assert not left
