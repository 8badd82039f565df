"""Two ranks train as one does, whichever way the model is spread over them."""

import json
import time
from dataclasses import replace

import pytest
import torch
from cellmill.checkpoints import load_checkpoint, model_tensors
from cellmill.errors import CellmillError
from cellmill.recipes import ModelRecipe
from cellmill.training.launch import command, train
from cellmill.training.offending_batch import load_batch
from cellmill.training.parallel import Ranks
from ranks_runs import (
    FAILING,
    N_STEPS,
    blind_ranks,
    cells_of_steps,
    ended,
    losses_of,
    make_job,
    server,
    start_ranks,
    stopped_ranks,
    train_ranks,
)
from small_runs import RECIPES, TRAINING, make_corpus

MODELS = ["geneformer", "scgpt"]
WAYS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def context():
    return server(*(f"cellmill.models.{name}" for name in MODELS))


@pytest.fixture(scope="module")
def run(corpus, context, tmp_path_factory):
    """Train a model on a number of ranks: the folder of its results."""

    def run(name, world, **options):
        folder = tmp_path_factory.mktemp(f"{name}-{world}")
        processes = start_ranks(context, world, train_ranks, str(corpus.folder), name, str(folder), world, options)
        assert ended(processes) == [0] * world
        return folder

    return run


@pytest.fixture(scope="module", params=MODELS)
def alone(request, run):
    return request.param, run(request.param, 1)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one(alone, run, way):
    name, one = alone
    two = run(name, 2, parallel=way)
    cells = cells_of_steps(one)
    assert cells_of_steps(two) == cells
    assert len(cells) == N_STEPS
    expected, losses = losses_of(one), losses_of(two)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    (trained, meta), (same, same_meta) = load_checkpoint(one / "out"), load_checkpoint(two / "out")
    assert meta["recipe"]["training"]["ranks"] == 1
    assert same_meta["recipe"]["training"]["ranks"] == 2
    for parameter, tensor in model_tensors(trained).items():
        difference = (model_tensors(same)[parameter] - tensor).abs()
        if parameter.endswith("qkv.bias"):  # that of the keys changes no loss: its gradient is rounding, made large
            difference.view(3, -1)[1] = 0
        assert difference.nan_to_num(0).max() < 1e-5, parameter


def test_two_ranks_take_the_tokens_of_one(run):
    """Steps of several batches: the ranks count their tokens together."""
    one, two = (run("geneformer", world, batch_tokens=1000, steps=6) for world in (1, 2))
    cells, same = ({step: sorted(ids) for step, ids in cells_of_steps(folder).items()} for folder in (one, two))
    assert same == cells
    assert {len(ids) for ids in cells.values()} == {16}
    expected, losses = losses_of(one), losses_of(two)
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        assert losses[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_a_stopped_run_keeps_the_batch_of_every_rank(corpus, context, tmp_path):
    arguments = (str(corpus.folder), "geneformer", str(tmp_path), 2, {"spike_factor": 1e-6, "warmup_steps": 0})
    assert ended(start_ranks(context, 2, stopped_ranks, *arguments)) == [0, 0]
    errors, left = zip(*(json.loads((tmp_path / f"left-{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    assert all("the loss jumped to" in error for error in errors)
    assert left[0] == left[1] == ["offending_batch.json", "offending_batch.rank1.json"]
    first, second = (load_batch(tmp_path / "state" / name) for name in left[0])
    assert (first.step, first.values) == (second.step, second.values)
    assert len(first.cells) == len(second.cells) == 4
    assert set(first.cells.joinids).isdisjoint(second.cells.joinids)
    (tmp_path / "state" / "offending_batch.json").unlink()
    assert load_batch(tmp_path / "state").cells.joinids.tolist() == second.cells.joinids.tolist()


def test_ranks_that_find_different_states_do_not_start(corpus, context, tmp_path):
    arguments = (str(corpus.folder), "geneformer", str(tmp_path), 2)
    save = {"checkpoint_every": 3, "spike_factor": 1e-6, "warmup_steps": 0}
    assert ended(start_ranks(context, 2, stopped_ranks, *arguments, save)) == [0, 0]
    assert list((tmp_path / "state").glob("step-*"))
    assert ended(start_ranks(context, 2, blind_ranks, *arguments, {"checkpoint_every": 3, "warmup_steps": 0})) == [0, 0]
    errors = [json.loads((tmp_path / f"left-{rank}.json").read_text()) for rank in (0, 1)]
    assert "rank 0 of 2 finds the state of step 9 and others find another one" in errors[0]
    assert "rank 1 of 2 finds none" in errors[1]


def test_a_sum_of_one_rank_is_what_it_was():
    ranks = Ranks()
    assert ranks.main
    assert ranks.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert ranks.most(3) == 3
    assert (ranks.agree(True), ranks.agree(False)) == (True, False)


def test_another_number_of_processes_than_the_recipe_says_is_refused():
    with pytest.raises(CellmillError, match="for 4 processes .* and 1 run"):
        Ranks().check(replace(TRAINING, ranks=2, nodes=2))


# --- as the workflow starts it ----------------------------------------------------------------------------------------


@pytest.fixture
def job(corpus, tmp_path, monkeypatch):
    """A job of two ranks with a model of which one rank may fail."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "failing.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    training = replace(TRAINING, ranks=2, steps=6)
    recipe = ModelRecipe(architecture="mine.failing", sizes=RECIPES["geneformer"].sizes, training=training)
    return make_job(tmp_path, corpus, recipe)


def test_torchrun_starts_the_ranks(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAILS", "not")
    train(job)
    said = capsys.readouterr().err
    assert "little seed 0: 2 ranks, ddp over gloo" in said
    assert "48 of 48 cells" in said
    assert sorted(path.name for path in (tmp_path / "seed0").iterdir()) == [
        "checkpoint.json",
        "checkpoint.safetensors",
        "log.parquet",
    ]
    assert not list(tmp_path.glob("seed0.*"))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("refused", "these cells are not fit to be learned from; take others"),
        ("killed", "was killed by SIGKILL"),
        ("stuck", "ended with status 1"),
    ],
)
def test_what_ends_one_rank_ends_all(job, monkeypatch, tmp_path, how, sentence):
    monkeypatch.setenv("FAILS", how)
    began = time.monotonic()
    with pytest.raises(CellmillError, match=sentence):
        train(job)
    assert time.monotonic() - began < 60
    assert not (tmp_path / "seed0.ranks").exists()
    assert not (tmp_path / "seed0").exists()


def test_several_machines_need_slurm(job, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    job["recipe"]["training"] |= {"ranks": 1, "nodes": 2}
    with pytest.raises(CellmillError, match=r"training.nodes is 2, .* --workflow-profile"):
        train(job)


def test_a_job_of_slurm_starts_one_torchrun_a_machine(monkeypatch, tmp_path):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    parts = command(tmp_path / "job.json", replace(TRAINING, ranks=4, nodes=2, threads=3))
    assert parts[:5] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-id=41"} <= set(parts)
    assert parts[-3:] == ["-m", "cellmill.training.launch", str(tmp_path / "job.json")]
