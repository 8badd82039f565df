"""Runs that are killed with SIGKILL while two ranks train, go on with one, and back, end as one that was never killed.

Dropout is off: what it drops depends on the number of ranks.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cellmill
import pytest
from cellmill.recipes import ModelRecipe
from ranks_runs import (
    N_STEPS,
    cells_of_steps,
    ended,
    kill,
    losses_of,
    make_job,
    server,
    start_ranks,
    train_ranks,
)
from small_runs import RECIPES, TRAINING, make_corpus

OPTIONS = {"checkpoint_every": 2}
WAYS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def start(corpus):
    """Start some ranks on a folder of results."""
    context = server("cellmill.models.geneformer")

    def start(folder, world, parallel):
        options = OPTIONS | {"parallel": parallel}
        arguments = (str(corpus.folder), "geneformer", str(folder), world, options)
        return start_ranks(context, world, train_ranks, *arguments)

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The folder of a run of one rank that was never killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert ended(start(folder, 1, "ddp")) == [0]
    return folder


def _steps_begun(folder: Path) -> int:
    return len(cells_of_steps(folder))


@pytest.mark.parametrize("way", WAYS)
def test_killed_on_two_ranks_gone_on_with_one_and_back(start, uninterrupted, tmp_path, way):
    moments = random.Random(way)
    worlds = [2, 1, 2]
    kills = []
    for world, last_step in zip(worlds, (7, 14, 21), strict=True):
        processes = start(tmp_path, world, way)
        while _steps_begun(tmp_path) < last_step and processes[0].exitcode is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        kills.append(kill(processes))
    assert kills == [True, True, True]
    assert list((tmp_path / "state").glob("step-*"))
    assert ended(start(tmp_path, 1, way)) == [0]

    assert cells_of_steps(tmp_path) == cells_of_steps(uninterrupted)
    expected, losses = losses_of(uninterrupted), losses_of(tmp_path)
    assert losses.keys() == expected.keys()
    assert max(step for step, _, _ in losses) == N_STEPS
    for key, value in expected.items():
        assert losses[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def _alive(job: Path) -> list[int]:
    """The processes whose command names a job's file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(job) in path.read_text().split("\0"):
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux alone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_told_to_end_leaves_no_rank_behind(corpus, tmp_path, number):
    recipe = ModelRecipe(
        architecture="geneformer",
        sizes=RECIPES["geneformer"].sizes,
        training=dataclasses.replace(TRAINING, ranks=2, steps=100_000),
    )
    (tmp_path / "job.json").write_text(json.dumps(make_job(tmp_path, corpus, recipe)))
    code = "import json, sys; from cellmill.training.launch import train; train(json.load(open(sys.argv[1])))"
    library = str(Path(cellmill.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "job.json")],
        env=os.environ | {"PYTHONPATH": library},
        stdout=subprocess.DEVNULL,
    )
    job, until = tmp_path / "seed0.ranks" / "job.json", time.monotonic() + 60
    while not list(tmp_path.glob("seed0.state/step-*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(_alive(job)) == 3  # torchrun and two ranks
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    until = time.monotonic() + 30
    while _alive(job):
        assert time.monotonic() < until
        time.sleep(0.05)
