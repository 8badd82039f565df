"""Two ranks train as one does, whichever way the model is spread over them."""

import pytest
import torch
from cellmill.checkpoints import load_checkpoint, model_tensors
from cellmill.training.parallel import Ranks
from ranks_runs import N_STEPS, cells_of_steps, ended, losses_of, server, start_ranks, train_ranks
from small_runs import make_corpus

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
        processes = start_ranks(
            context, world, train_ranks, str(corpus.folder), name, str(folder), world, options
        )
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
