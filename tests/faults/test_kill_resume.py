"""A run that is killed with SIGKILL, at whatever moment, and started again ends as one that was never killed.

Children are forked from a server that has imported torch already, so that each costs its training alone.
"""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cellmill.files import sha256
from killed_runs import child
from small_runs import RECIPES, make_corpus

# Where a child kills itself: a function that the training calls, in which of its calls, before or after it.
MOMENTS = [
    ("cellmill.pretrain:mean_losses", 1, "before"),  # before anything was saved
    ("cellmill.pretrain:accumulate_gradients", 2, "after"),  # in the second step, between gradient and update
    ("cellmill.training.state:write_tensors", 1, "half"),  # while the first state is being written
    ("cellmill.training.state:write_tensors", 1, "after"),  # tensors are there, the log and the record are not
    ("cellmill.training.state:os.rename", 1, "before"),  # the state is complete under its temporary name
    ("cellmill.training.state:os.rename", 1, "after"),  # it has its name (step 3), older ones are not removed
    ("cellmill.training.state:write_tensors", 1, "half"),  # the second state: the first must survive
    ("cellmill.training.state:os.rename", 1, "after"),  # two complete states, steps 3 and 6
    ("cellmill.pretrain:accumulate_gradients", 2, "before"),
    ("cellmill.pretrain:save_state", 2, "after"),  # step 12, the last
    ("cellmill.checkpoints:write_tensors", 1, "half"),  # while the checkpoint is being written
    ("cellmill.checkpoints:write_tensors", 1, "after"),
    ("cellmill.pretrain:save_checkpoint", 1, "after"),  # the checkpoint is there, the log is not
    ("cellmill.pretrain:shutil.rmtree", 1, "before"),  # all is there, and the state still is
]
# In each of the 12 steps in turn: a state is saved every 3 steps, so step k is call k % 3 + 1 of the process it ends.
STEPS = [("cellmill.pretrain:learning_rate", step % 3 + 1, "after") for step in range(12)]
N_KILLS = 20
"""At random moments."""


@pytest.fixture(scope="module")
def server(data, tmp_path_factory):
    """Start a child on a folder of results: ``start(name, folder, moment, **training)``."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"), data)
    context = multiprocessing.get_context("forkserver")
    # all that a child would otherwise import on its own; torch.optim imports torch._dynamo at first use
    modules = ["pandas", "torch._dynamo", "cellmill.pretrain", *(f"cellmill.models.{name}" for name in RECIPES)]
    context.set_forkserver_preload(modules)

    def start(name, folder, moment=None, **training):
        arguments = (str(corpus.folder), name, str(folder / "out"), str(folder / "state"), moment, training)
        process = context.Process(target=child, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory):
    """The results of a run of each architecture that was never killed, and how long it took, in seconds."""
    results = {}
    for name in RECIPES:
        folder = tmp_path_factory.mktemp(f"{name}-uninterrupted")
        began = time.monotonic()
        process = server(name, folder)
        process.join()
        assert process.exitcode == 0
        results[name] = _results(folder), time.monotonic() - began
    return results


def _results(folder: Path) -> tuple:
    """The weights' hash, the description and the log without what depends on the machine."""
    log = pq.read_table(folder / "out/log.parquet", filters=[("split", "!=", "machine")]).drop_columns("seconds")
    assert not (folder / "state").exists()
    files = sorted(path.name for path in (folder / "out").iterdir())
    assert files == ["checkpoint.json", "checkpoint.safetensors", "log.parquet"]
    return sha256(folder / "out/checkpoint.safetensors"), (folder / "out/checkpoint.json").read_text(), log.to_pylist()


@pytest.mark.parametrize("moments", [MOMENTS, STEPS], ids=["dangerous", "steps"])
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_every_moment(server, uninterrupted, tmp_path, name, moments):
    for moment in moments:
        process = server(name, tmp_path, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    process = server(name, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert _results(tmp_path) == uninterrupted[name][0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_chooses_its_micro_batches_goes_on_exactly(server, tmp_path, name):
    """Killed in its tenth step, between gradient and update: what a trial computes must not be seen afterwards."""
    options = {"micro_batch_tokens": "auto", "checkpoint_every": 4}
    moment = ("cellmill.pretrain:accumulate_gradients", 10, "after")
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder, when, code in ((folders[0], None, 0), (folders[1], moment, -signal.SIGKILL), (folders[1], None, 0)):
        process = server(name, folder, when, **options)
        process.join()
        assert process.exitcode == code
    assert _results(folders[1]) == _results(folders[0])


def test_killed_at_random_moments(server, uninterrupted, tmp_path):
    """Twenty moments of as many runs as it takes, one architecture after the other."""
    moments, kills, completed = random.Random(5), 0, 0
    while kills < N_KILLS or completed < len(RECIPES):
        name, folder = list(RECIPES)[completed % len(RECIPES)], tmp_path / f"{completed}"
        results, seconds = uninterrupted[name]
        process = server(name, folder)
        if kills < N_KILLS * (completed + 1) / len(RECIPES):
            process.join(moments.uniform(0, 1) * seconds)
            kills += process.exitcode is None
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert _results(folder) == results
            completed += 1
        else:
            assert process.exitcode == -signal.SIGKILL
    assert kills >= N_KILLS
