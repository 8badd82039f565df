"""Two ranks train as one does, whichever way the model is spread over them."""

import time
from dataclasses import replace

import pytest
import torch
from cellmill.checkpoints import load_checkpoint, model_tensors
from cellmill.errors import CellmillError
from cellmill.recipes import ModelRecipe
from cellmill.training.launch import command, train
from cellmill.training.parallel import Ranks
from ranks_runs import (
    FAILING,
    N_STEPS,
    cells_of_steps,
    ended,
    losses_of,
    make_job,
    server,
    start_ranks,
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
        torch.testing.assert_close(model_tensors(same)[parameter], tensor, rtol=0, atol=1e-3, equal_nan=True)


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
    [("refused", "these cells are not fit to be learned from; take others"), ("killed", "was killed by SIGKILL")],
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
