"""When training stops by itself, and what it leaves behind of the batch that stopped it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from cellmill.checkpoints import build_model, model_tensors, save_checkpoint, write_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import total_loss
from cellmill.models.packing import Layout, Packing
from cellmill.recipes import Training
from cellmill.shards.statistics import compute_statistics
from cellmill.training import offending_batch
from cellmill.training.guard import Guard, clip_gradients, largest_norms
from cellmill.training.log import Log
from cellmill.training.offending_batch import (
    OffendingBatch,
    batch_terms,
    cell_terms,
    datasets_of,
    describe_model,
    load_batch,
    load_model,
    save_batch,
    stopped,
)
from small_runs import META, N_GENES, RECIPES, make_corpus

TRAINING = Training(warmup_steps=5, spike_factor=3.0, early_stop=2)


def heard(losses: list[float], training: Training = TRAINING) -> Guard:
    guard = Guard(training)
    for step, loss in enumerate(losses, start=1):
        assert guard.check(step, loss, 1.0) is None
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_stops_from_the_first_step(loss, norm):
    said = Guard(TRAINING).check(1, loss, norm)
    assert ("loss became" if loss != 1.0 else "gradient_norm became") in said
    assert "at step 1" in said


def test_a_spike_stops_outside_of_the_warm_up():
    losses = [9.0, 1.0] * 3 + [2.0] * 20
    guard = heard(losses)
    assert guard.check(27, 5.9, 1.0) is None
    said = guard.check(28, 6.1, 1.0)
    assert "jumped to 6.1 at step 28" in said
    assert "median 2 of" in said
    assert "training.spike_factor is 3" in said


def test_the_median_is_that_of_the_last_fifty_steps():
    guard = heard([10.0] * 40 + [1.0] * 50)
    assert guard.check(91, 3.5, 1.0)
    heard([10.0] * 40 + [1.0] * 20 + [3.5])  # of 50 steps 30 had a loss of 10


def test_no_spike_is_looked_for_in_the_warm_up_or_where_it_is_not_asked_for():
    long = replace(TRAINING, warmup_steps=100)
    heard([1.0] * 60 + [50.0], long)
    heard([1.0] * 60 + [50.0], replace(TRAINING, spike_factor=None))
    heard([1.0] * 6 + [50.0])  # too few losses for a median
    heard([-1.0] * 60 + [0.5])  # a negative median has no multiples


def test_patience():
    guard = Guard(TRAINING)
    ends = []
    for loss in (3.0, 2.0, 2.5, 1.9, 1.9, 1.95):
        guard.validated(loss)
        ends.append(guard.out_of_patience)
    assert ends == [False, False, False, False, False, True]
    never = Guard(replace(TRAINING, early_stop=None))
    for loss in (1.0, 2.0, 3.0, math.nan):
        never.validated(loss)
    assert not never.out_of_patience


def test_a_guard_goes_on_from_the_log():
    log = Log()
    for step in range(1, 31):
        log.add(step, "train", {"loss": 2.0, "mlm": 9.0}, seconds=1.0)
    for loss in (3.0, 4.0):
        log.add(30, "validation", {"loss": loss, "mlm": 1.0}, seconds=1.0)
    guard = Guard(TRAINING)
    guard.recall(log.table())
    assert "median 2 " in guard.check(31, 6.1, 1.0)
    assert not guard.out_of_patience
    guard.validated(3.5)
    assert guard.out_of_patience


# --- gradients and the batch, on real cells ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


def make_model(statistics, kind="packed"):
    recipe = RECIPES["geneformer"]
    model = build_model(replace(recipe, sizes=recipe.sizes | {"dropout": 0.0}), N_GENES, statistics, 0)
    model.packing = Packing(kind, grain=64)
    return model


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_is_torchs_own(corpus, statistics, limit):
    grads, norms = [], []
    for clip in (clip_gradients, lambda m, x: (torch.nn.utils.clip_grad_norm_(m.parameters(), x), None)):
        model = make_model(statistics)
        total_loss(model(model.pretrain_inputs(next(corpus.batches("train", 8)), seed=0, step=0))).backward()
        norm, norms_P = clip(model, limit)
        norms.append(norm)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        if norms_P is not None:
            assert float(norms_P.square().sum().sqrt()) == pytest.approx(float(norm), rel=1e-5)
            assert norms_P.max() == max(largest_norms(model, norms_P).values())
    assert torch.equal(*norms)
    assert torch.equal(*grads)


def test_the_parameter_at_fault_comes_first(corpus, statistics):
    model = make_model(statistics)
    total_loss(model(model.pretrain_inputs(next(corpus.batches("train", 4)), seed=0, step=0))).backward()
    model.layers[0].output.weight.grad[3, 3] = torch.nan
    norm, norms_P = clip_gradients(model, 1.0)
    found = largest_norms(model, norms_P)
    assert not norm.isfinite()
    assert len(found) == 10
    assert next(iter(found)) == "layers.0.output.weight"
    assert sum(not math.isfinite(value) for value in found.values()) == 1


def make_batch(corpus, model, **changes) -> OffendingBatch:
    cells = next(corpus.batches("train", 9))
    cuts = [cells.slice(0, 4), cells.slice(4, 9)]
    return OffendingBatch(
        reason="loss became nan at step 7",
        step=7,
        seed=3,
        values={"loss": math.nan, "mlm": math.inf, "gradient_norm": 1.5},
        gradient_norms={"a.weight": math.nan, "b.weight": 2.0},
        datasets=datasets_of(corpus, "train", cells),
        cells=cells,
        parts=[model.pretrain_inputs(cut, seed=3, step=6) for cut in cuts],
        model=describe_model(model, "geneformer"),
        **changes,
    )


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_a_batch_comes_back_as_it_was(corpus, statistics, tmp_path, kind):
    batch = make_batch(corpus, make_model(statistics, kind))
    path = save_batch(tmp_path / "state", batch)
    content = json.loads(path.read_text())
    assert content["joinids"] == batch.cells.joinids.tolist()
    assert content["values"]["loss"] == "nan"
    for given in (path, path.with_suffix(".safetensors"), path.parent):
        again = load_batch(given)
        assert (again.step, again.seed, again.reason) == (7, 3, batch.reason)
        assert again.model == batch.model
        assert again.datasets == batch.datasets
        assert set(batch.datasets) == set(corpus.datasets("train"))
        assert math.isnan(again.values["loss"])
        assert math.isinf(again.values["mlm"])
        assert list(again.gradient_norms) == ["a.weight", "b.weight"]
        for name in ("joinids", "offsets", "genes", "counts", "totals"):
            assert (getattr(again.cells, name) == getattr(batch.cells, name)).all()
        for inputs, before in zip(again.parts, batch.parts, strict=True):
            assert inputs.keys() == before.keys()
            for name, value in before.items():
                if isinstance(value, Layout):
                    same = inputs[name]
                    assert (same.lengths == value.lengths).all()
                    assert (same.starts == value.starts).all()
                    assert (same.n_slots, same.width) == (value.n_slots, value.width)
                else:
                    assert torch.equal(inputs[name], value)
                    assert inputs[name].dtype == value.dtype


def test_the_batch_is_run_again_from_a_checkpoint_or_a_state(corpus, statistics, tmp_path):
    """Cells alone have the losses that they had in the batch: together they give the micro batches' terms."""
    model = make_model(statistics).eval()
    batch = load_batch(save_batch(tmp_path, make_batch(corpus, model)))
    meta = {"recipe": {"architecture": "geneformer"}, "feature_ids": META["feature_ids"]}
    save_checkpoint(tmp_path / "checkpoint", model, meta)
    state = tmp_path / "seed0.state" / "step-00000006"
    state.mkdir(parents=True)
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    write_tensors(tensors | {"optimizer.x": torch.zeros(2)}, state / "tensors.safetensors")
    expected = batch_terms(model, batch)
    for path in (tmp_path / "checkpoint", state, state.parent):
        loaded = load_model(path, batch)
        assert batch_terms(loaded, batch) == expected
        terms = cell_terms(loaded, batch)
        assert len(terms) == 9
    counts = [len(model.pretrain_inputs(batch.cells.slice(i, i + 1), seed=3, step=6)["targets"]) for i in range(9)]
    mean = sum(term["mlm"] * count for term, count in zip(terms, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(expected["mlm"], rel=1e-5)
    with pytest.raises(CellmillError, match="neither a checkpoint nor a training state"):
        load_model(tmp_path / "nowhere", batch)


def test_the_error_says_where_the_batch_lies(corpus, statistics, tmp_path):
    error = stopped(tmp_path / "state", make_batch(corpus, make_model(statistics)))
    assert isinstance(error, CellmillError)
    assert "loss became nan at step 7" in str(error)
    assert f"cellmill show-batch {tmp_path / 'state' / 'offending_batch.json'}" in str(error)
    other = stopped(tmp_path / "state", make_batch(corpus, make_model(statistics)), rank=1)
    assert "offending_batch.rank1.json" in str(other)


def test_a_full_disk_does_not_hide_the_reason(corpus, statistics, tmp_path, monkeypatch):
    def full(*_):
        raise CellmillError("no space is left")

    monkeypatch.setattr(offending_batch, "save_batch", full)
    error = stopped(tmp_path, make_batch(corpus, make_model(statistics)))
    assert "loss became nan at step 7" in str(error)
    assert "the batch that did it is not: no space is left" in str(error)


def test_a_damaged_batch_is_one_sentence(corpus, statistics, tmp_path):
    with pytest.raises(CellmillError, match="cannot be read as an offending batch"):
        load_batch(tmp_path)
    path = save_batch(tmp_path, make_batch(corpus, make_model(statistics)))
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:5000])
    with pytest.raises(CellmillError, match="cannot be read as an offending batch"):
        load_batch(path)
