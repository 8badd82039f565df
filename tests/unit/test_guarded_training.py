"""Trainings that end by themselves, on real cells: what is said, kept and gone on from."""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.training.offending_batch import load_batch
from small_runs import make_corpus, train


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
