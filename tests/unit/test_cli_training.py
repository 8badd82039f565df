"""The commands of training, on real cells."""

import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.checkpoints import build_model, save_checkpoint
from cellmill.cli import app
from cellmill.shards.statistics import compute_statistics, save_statistics
from cellmill.training import tensorboard as exports
from cellmill.training.log import LOG_SCHEMA, Log
from cellmill.training.offending_batch import OffendingBatch, describe_model, save_batch
from small_runs import META, N_GENES, RECIPES, make_corpus
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    """A folder with the corpus of a run called short, and its config."""
    folder = tmp_path_factory.mktemp("work")
    results = folder / "results" / "short"
    corpus = make_corpus(results / "shards" / "corpus", data)
    save_statistics(results / "statistics.safetensors", compute_statistics(corpus), corpus.vocabulary_hash)
    (folder / "short.yaml").write_text("run: short\nmodels: [geneformer-demo]\n")
    return folder, corpus


def call(*arguments) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


# --- find-learning-rate -----------------------------------------------------------------------------------------------


def test_find_learning_rate_prints_writes_and_draws(run_folder, monkeypatch):
    folder, _ = run_folder
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if path.is_file()}
    said = call("find-learning-rate", "--config", "short.yaml", "--model", "geneformer-demo", "--steps", 20)
    assert "suggestion: learning_rate: " in said
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    room = folder / "results" / "short" / "learning_rate"
    assert made == {room / "geneformer-demo.csv", room / "geneformer-demo.svg"}  # no training state, no log
    with (room / "geneformer-demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[0]["learning_rate"]), float(rows[-1]["learning_rate"])] == pytest.approx([1e-6, 1.0])
    assert float(rows[0]["loss"]) == pytest.approx(np.log(N_GENES), abs=1)
    svg = (room / "geneformer-demo.svg").read_text()
    assert svg.startswith("<svg")
    assert "falls fastest at" in svg
    assert "learning rate" in svg


def test_find_learning_rate_says_what_is_missing(run_folder, tmp_path, monkeypatch):
    folder, _ = run_folder
    config = folder / "short.yaml"
    monkeypatch.chdir(tmp_path)
    assert "results/short has no shards and statistics yet" in call(
        "find-learning-rate", "--config", config, "--model", "geneformer-demo"
    )
    said = call("find-learning-rate", "--config", config, "--model", "gpt")
    assert "trains no model 'gpt'; name one of geneformer-demo" in said


# --- show-batch -------------------------------------------------------------------------------------------------------


def test_show_batch_names_the_worst_cell(run_folder, tmp_path):
    """A place that only the longest cell reaches is spoilt: the model fails on that cell alone."""
    _, corpus = run_folder
    recipe = replace(RECIPES["geneformer"], sizes=RECIPES["geneformer"].sizes | {"dropout": 0.0, "max_length": 2048})
    model = build_model(recipe, N_GENES, compute_statistics(corpus), 0).eval()
    cells = next(corpus.batches("train", 6))
    worst, lengths = int(np.argmax(cells.lengths)), np.sort(cells.lengths)
    with torch.no_grad():
        model.position_embeddings.weight[lengths[-2] :] = torch.nan
    batch = OffendingBatch(
        reason="loss became nan at step 3",
        step=3,
        seed=5,
        values={"loss": float("nan"), "gradient_norm": 2.0},
        gradient_norms={"word_embeddings.weight": float("nan")},
        datasets=["first"] * 2 + ["second"] * 4,
        cells=cells,
        parts=[model.pretrain_inputs(cells, seed=5, step=2)],
        model=describe_model(model, "geneformer"),
    )
    path = save_batch(tmp_path / "seed5.state", batch)
    said = call("show-batch", path)
    assert "loss became nan at step 3 (seed 5, geneformer, micro batches: 1)" in said
    assert "word_embeddings.weight" in said
    assert "6 cells of second (4), first (2):" in said
    assert all(str(joinid) in said for joinid in cells.joinids)
    assert "worst" not in said
    save_checkpoint(tmp_path / "model", model, {**META, "recipe": asdict(recipe)})
    said = call("show-batch", path.parent, "--model", tmp_path / "model", "--rows", 3)
    assert f"worst in mlm: cell {cells.joinids[worst]}, nan" in said
    table = said.splitlines()[-3:]
    assert table[0].startswith(str(cells.joinids[worst]))
    assert table[0].split()[2:4] == [str(cells.lengths[worst]), str(cells.totals[worst])]
    assert "nan" in table[0]
    assert not any("nan" in line for line in table[1:])


def test_show_batch_of_nothing_is_one_sentence(tmp_path):
    assert "cannot be read as an offending batch" in call("show-batch", tmp_path / "none.json")


# --- export-tensorboard -----------------------------------------------------------------------------------------------


def write_log(path, losses: list[float]) -> None:
    log = Log()
    for step, loss in enumerate(losses, start=1):
        log.add(step, "train", {"loss": loss, "learning_rate": 1e-3}, seconds=2.0 * step)
        log.add(step, "machine", {"mfu": 0.5}, seconds=2.0 * step)
    path.parent.mkdir(parents=True)
    pq.write_table(log.table(), path)


def read_events(folder) -> dict[str, list]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_logs_of_all_models_and_seeds(tmp_path):
    pytest.importorskip("tensorboard")
    trainings = tmp_path / "run" / "pretrain"
    write_log(trainings / "a" / "seed0" / "log.parquet", [3.0, 2.5])
    write_log(trainings / "a" / "seed1" / "log.parquet", [4.0])
    write_log(trainings / "b" / "seed0.state" / "step-00000003" / "log.parquet", [7.0, 6.0, 5.0])  # still trains
    for _ in range(2):  # the second replaces the first
        said = call("export-tensorboard", tmp_path / "run", "--out", tmp_path / "tb")
    assert "3 logs" in said
    loss = read_events(tmp_path / "tb" / "a" / "seed0" / "train")["loss"]
    assert [(event.step, event.value) for event in loss] == [(1, 3.0), (2, 2.5)]
    assert loss[1].wall_time - loss[0].wall_time == pytest.approx(2.0)
    assert [e.value for e in read_events(tmp_path / "tb" / "b" / "seed0" / "train")["loss"]] == [7.0, 6.0, 5.0]
    assert [e.value for e in read_events(tmp_path / "tb" / "a" / "seed1" / "machine")["mfu"]] == [0.5]


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(exports.importlib, "import_module", absent)
    assert "pip install tensorboard" in call("export-tensorboard", tmp_path, "--out", tmp_path / "tb")


def test_tensorboard_without_a_readable_log(tmp_path):
    pytest.importorskip("tensorboard")
    assert "holds no training log" in call("export-tensorboard", tmp_path, "--out", tmp_path / "tb")
    path = tmp_path / "pretrain" / "a" / "seed0" / "log.parquet"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(str(LOG_SCHEMA)))
    assert "cannot be read as a training log" in call("export-tensorboard", tmp_path, "--out", tmp_path / "tb")
