"""Trainings that end by themselves, on real cells: what is said, kept and gone on from."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.files import sha256
from cellmill.training.memory import Choice
from cellmill.training.meter import Meter
from cellmill.training.offending_batch import load_batch
from cellmill.training.state import save_state
from small_runs import make_corpus, make_shards, train


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


def read_log(out) -> list[dict]:
    return pq.read_table(out / "log.parquet").to_pylist()


def test_a_spike_ends_training_and_leaves_its_batch(corpus, tmp_path):
    wild = {"learning_rate": 30.0, "warmup_steps": 3, "steps": 40, "checkpoint_every": 5}
    with pytest.raises(CellmillError, match="the loss jumped to .*cellmill show-batch .*offending_batch.json"):
        train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", spike_factor=1.2, **wild)
    assert not (tmp_path / "out").exists()
    batch = load_batch(tmp_path / "state")
    assert len(batch.cells) == 8
    assert batch.values["loss"] > 1.2 * 8
    assert math.hypot(*batch.gradient_norms.values()) == pytest.approx(batch.values["gradient_norm"], rel=0.05)
    assert set(batch.datasets) == corpus.datasets("train")
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", **wild)  # goes on from the state
    assert not (tmp_path / "state").exists()


def test_what_is_not_finite_names_the_parameter(corpus, tmp_path, monkeypatch):
    """A gradient that breaks in the backward pass of one layer, while the loss is still finite."""
    from cellmill.models.geneformer import Geneformer

    own = Geneformer.forward

    def breaks_in_step_four(self, inputs, *, step=None):
        terms = own(self, inputs, step=step)
        if step == 4:
            self.layers[0].output.bias.register_hook(lambda gradient: gradient * torch.nan)
        return terms

    monkeypatch.setattr(Geneformer, "forward", breaks_in_step_four)
    with pytest.raises(CellmillError, match="gradient_norm became nan at step 5"):
        train(corpus, "geneformer", tmp_path / "out", tmp_path / "state")
    content = json.loads((tmp_path / "state" / "offending_batch.json").read_text())
    assert next(iter(content["gradient_norms"])) == "layers.0.output.bias"
    assert sum(value == "nan" for value in content["gradient_norms"].values()) == 1


def test_training_ends_when_validations_bring_no_more(corpus, tmp_path):
    idle = {"learning_rate": 1e-9, "early_stop": 2, "steps": 40, "validate_every": 3}
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", **idle)
    log = read_log(tmp_path / "out")
    assert max(row["step"] for row in log) == 6
    assert [row["value"] for row in log if row["metric"] == "early_stop"] == [2.0]
    assert json.loads((tmp_path / "out" / "checkpoint.json").read_text())["steps"] == 6
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("where", ["save_state", "save_checkpoint"])
def test_a_run_that_was_to_end_ends_there_when_it_is_started_again(corpus, tmp_path, monkeypatch, where):
    """Stopped after the validation that ends it, before its last state or its checkpoint is written."""
    idle = {"learning_rate": 1e-9, "early_stop": 2, "steps": 40, "validate_every": 4, "micro_batch_tokens": "auto"}
    train(corpus, "geneformer", tmp_path / "expected", tmp_path / "state", **idle)

    def stop(*arguments):
        if where == "save_checkpoint" or arguments[1].step == 8:
            raise KeyboardInterrupt
        return save_state(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(f"cellmill.pretrain.{where}", stop)
        with pytest.raises(KeyboardInterrupt):
            train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", **idle)
    if where == "save_checkpoint":  # there is nothing left to find memory for
        monkeypatch.setattr("cellmill.training.memory.choose_tokens", None)
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", **idle)
    expected, found = (
        [row for row in read_log(tmp_path / name) if row["split"] != "machine"] for name in ("expected", "out")
    )
    for row in expected + found:
        row.pop("seconds")
    assert found == expected
    assert max(row["step"] for row in found) == 8
    weights = [sha256(tmp_path / name / "checkpoint.safetensors") for name in ("expected", "out")]
    assert weights[0] == weights[1]


def test_early_stop_needs_held_out_cells(data, tmp_path):
    shards = make_shards(tmp_path / "shards", data, {"train": np.arange(40)}, cells_per_shard=40)
    with pytest.raises(CellmillError, match=r"early_stop needs held-out cells and the corpus has none; set corpus"):
        train(shards, "geneformer", tmp_path / "out", tmp_path / "state", early_stop=2)


def test_a_held_out_loss_that_is_not_finite_ends_training(corpus, tmp_path, monkeypatch):
    losses = iter([5.0, math.nan])
    monkeypatch.setattr("cellmill.pretrain.mean_losses", lambda *_, **__: {"loss": next(losses), "cells": 16})
    with pytest.raises(CellmillError, match="the held-out loss became nan at step 5; lower training.learning_rate"):
        train(corpus, "geneformer", tmp_path / "out", tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000003"]


def test_finding_memory_is_not_training(corpus, tmp_path, monkeypatch):
    pauses, paused = [], Meter.paused

    @contextmanager
    def noting(meter):
        pauses.append(1)
        with paused(meter):
            yield
        pauses.pop()

    def choose(*_, **__):
        assert pauses
        return Choice(300, "chosen")

    monkeypatch.setattr(Meter, "paused", noting)
    monkeypatch.setattr("cellmill.training.memory.choose_tokens", choose)
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", micro_batch_tokens="auto", steps=2)


def test_speed_stands_in_the_log_beside_what_is_reproducible(corpus, tmp_path):
    logs = []
    for name in ("a", "b"):
        train(corpus, "geneformer", tmp_path / name, tmp_path / "state", log_every=3)
        logs.append(read_log(tmp_path / name))
    machine = [row for row in logs[0] if row["split"] == "machine"]
    assert {row["step"] for row in machine} == {3, 6, 9, 12}
    values = {row["metric"]: row["value"] for row in machine}
    assert values["cells_per_second"] > 0
    assert 0 < values["mfu"] < 1
    assert 0 <= values["waiting_share"] < 1
    assert values["padding_share"] == 0
    assert values["mfu"] == pytest.approx(values["flops_per_second"] / values["peak_flops_per_second"])
    rows = [[(r["step"], r["metric"], r["value"]) for r in log if r["split"] != "machine"] for log in logs]
    assert rows[0] == rows[1]
