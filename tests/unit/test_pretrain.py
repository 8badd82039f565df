"""Pretraining: schedule, gradients, validation, log, errors, and what happens to a training state."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.checkpoints import build_model, load_checkpoint
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import held_out_losses, spread_batches, trivial_held_out
from cellmill.files import sha256
from cellmill.models.geneformer import Geneformer
from cellmill.training.optimizer import learning_rate, parameter_groups
from cellmill.pretrain import _fingerprint, accumulate_gradients, pretrain
from cellmill.recipes import Training
from cellmill.shards.batch import CellBatch
from cellmill.shards.statistics import compute_statistics
from small_runs import META, N_GENES, RECIPES, make_corpus, make_shards, train

NO_DROPOUT = {name: replace(recipe, sizes=recipe.sizes | {"dropout": 0.0}) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


def read_log(out) -> dict:
    """{(step, split, metric): value}"""
    rows = pq.read_table(out / "log.parquet").to_pylist()
    return {(row["step"], row["split"], row["metric"]): row["value"] for row in rows}


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    training = Training(steps=10, warmup_steps=4, learning_rate=0.8, final_learning_rate_fraction=0.25)
    rates = [learning_rate(step, training) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[7] == pytest.approx((0.8 + 0.2) / 2)  # the middle of the cosine
    assert rates[9] > rates[10]  # the last step still learns
    assert rates[10] == pytest.approx(0.2)
    assert learning_rate(0, Training(steps=1, warmup_steps=0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_matrices_decay_and_nothing_else(statistics, name):
    model = build_model(RECIPES[name], N_GENES, statistics, 0)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"] + kept["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in decayed["params"])
    plain = (torch.nn.Embedding, torch.nn.LayerNorm)
    spared = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, plain)}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert set(decayed["names"]) == matrices - spared
    assert not any(name.endswith("bias") for name in decayed["names"])


@pytest.mark.parametrize("name", RECIPES)
def test_accumulated_gradients_are_those_of_the_whole_batch(corpus, statistics, name):
    model = build_model(NO_DROPOUT[name], N_GENES, statistics, 0).train()
    cells = next(corpus.batches("train", 16))
    order = np.argsort(cells.lengths)  # micro batches with very different numbers of positions
    results = []
    for cuts in ([order], [order[:3], order[3:10], order[10:]]):
        parts = [model.pretrain_inputs(cells.take(rows), seed=0, step=9) for rows in cuts]
        model.zero_grad()
        terms = accumulate_gradients(model, parts, 9, torch.autocast("cpu", enabled=False))
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((gradients, terms))
    (whole, terms), (cut, cut_terms) = results
    assert len(terms) == (3 if name == "scgpt" else 1)
    assert (cut - whole).norm() < 1e-5 * whole.norm()
    assert all(int(cut_terms[key].count) == int(terms[key].count) for key in terms)


@pytest.mark.parametrize("name", RECIPES)
def test_log_holds_every_step_and_the_validations(corpus, tmp_path, name):
    train(corpus, name, tmp_path / "out", tmp_path / "state")
    log = read_log(tmp_path / "out")
    assert {s for s, split, _ in log if split == "train"} == set(range(1, 13))
    assert {s for s, split, _ in log if split == "validation"} == {0, 5, 10, 12}
    terms = {"geneformer": {"mlm"}, "scfoundation": {"mse"}, "scgpt": {"gep", "mvc", "gep_prompt"}}[name]
    always = {"loss", "learning_rate", "gradient_norm", "cells", "genes"}
    assert {metric for s, split, metric in log if (s, split) == (12, "train")} == always | terms
    assert log[12, "validation", "loss"] == pytest.approx(sum(log[12, "validation", t] for t in terms))
    assert log[12, "train", "cells"] == 96
    model, meta = load_checkpoint(tmp_path / "out")
    assert (meta["steps"], meta["seed"], meta["recipe"]["training"]["batch_size"]) == (12, 0, 8)
    # the checkpoint is the model that the last validation saw
    losses = held_out_losses(model, corpus, "validation", 8, seed=0, max_cells=16)
    assert losses["loss"] == pytest.approx(log[12, "validation", "loss"], rel=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_validation_does_not_change_the_training(corpus, tmp_path):
    for every in (1, 100):
        train(corpus, "scgpt", tmp_path / f"{every}", tmp_path / "state", validate_every=every)
    ours, theirs = load_checkpoint(tmp_path / "1")[0].state_dict(), load_checkpoint(tmp_path / "100")[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_seed_decides(corpus, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(corpus, "geneformer", tmp_path / out, tmp_path / "state", seed=seed, steps=4)
    a, b, c = (sha256(tmp_path / out / "checkpoint.safetensors") for out in "abc")
    assert a == b != c


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_micro_batches_train_alike(data, corpus, tmp_path, precision):
    for size in (8, 3):
        options = {"micro_batch_size": size, "precision": precision, "steps": 3, "validate_every": 1}
        train(corpus, "geneformer", tmp_path / f"{size}", tmp_path / "state", **options)
    whole, cut = read_log(tmp_path / "8"), read_log(tmp_path / "3")
    assert cut[1, "train", "loss"] == pytest.approx(whole[1, "train", "loss"], rel=1e-2)  # dropout differs
    assert cut[3, "validation", "loss"] == pytest.approx(whole[3, "validation", "loss"], rel=1e-3)


@pytest.mark.parametrize(("name", "share"), [("geneformer", 0.95), ("scgpt", 0.5)])
def test_training_beats_the_untrained_twin(corpus, statistics, tmp_path, name, share):
    options = {"steps": 50, "batch_size": 16, "learning_rate": 1e-2, "validate_every": 200, "checkpoint_every": 200}
    train(corpus, name, tmp_path / "out", tmp_path / "state", **options)
    trained = held_out_losses(load_checkpoint(tmp_path / "out")[0], corpus, "validation", 50, seed=1)
    twin = build_model(RECIPES[name], N_GENES, statistics, seed=0)
    untrained = held_out_losses(twin, corpus, "validation", 50, seed=1)
    trivial = trivial_held_out(twin, corpus, "train", "validation", 50, seed=1)
    assert trained.keys() == untrained.keys() == trivial.keys()
    assert trained["cells"] == untrained["cells"] == trivial["cells"] == 60
    assert trained["loss"] < share * untrained["loss"]
    assert trivial["loss"] < untrained["loss"]


def test_losses_do_not_depend_on_the_batch(corpus, statistics):
    model = build_model(RECIPES["scgpt"], N_GENES, statistics, seed=0)
    a, b = (held_out_losses(model, corpus, "validation", size, seed=1) for size in (7, 60))
    assert a == pytest.approx(b, rel=1e-5)
    c, d = (trivial_held_out(model, corpus, "train", "validation", size, seed=1) for size in (7, 60))
    assert c == pytest.approx(d, rel=1e-5)


def test_spread_batches_cover_a_split_evenly(corpus):
    joinids = corpus.batches("train", 300)
    every = next(joinids).joinids
    for n_kept, batch_size in ((300, 7), (60, 7), (7, 16), (1, 1)):
        batches = list(spread_batches(corpus, "train", batch_size, n_kept))
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        kept = CellBatch.concatenate(batches).joinids
        assert len(set(kept.tolist())) == n_kept
        rows = np.searchsorted(every, kept, sorter=np.argsort(every))
        rows = np.argsort(every)[rows]
        starts = rows[::batch_size]
        if len(starts) > 1:  # runs of neighbours, equally far from each other, from the first cell to the last
            assert rows[0] == 0
            assert rows[-1] == 299
            assert np.ptp(np.diff(starts)) <= 1


def test_an_absent_split_is_named(corpus, statistics):
    model = build_model(RECIPES["scgpt"], N_GENES, statistics, seed=0)
    with pytest.raises(CellmillError, match="no cells of the split 'test'"):
        held_out_losses(model, corpus, "test", 8, seed=0)


def test_a_corpus_without_held_out_cells_trains(data, tmp_path):
    shards = make_shards(tmp_path / "shards", data, {"train": np.arange(40)}, cells_per_shard=40)
    train(shards, "geneformer", tmp_path / "out", tmp_path / "state", steps=2)
    assert {split for _, split, _ in read_log(tmp_path / "out")} == {"train"}


def test_a_model_that_learns_from_categories_gets_their_codes(corpus, statistics, tmp_path, monkeypatch):
    seen = []
    ours = Geneformer.pretrain_inputs
    monkeypatch.setattr(Geneformer, "obs_columns", ("cell_type", "sex"))
    monkeypatch.setattr(Geneformer, "pretrain_inputs", lambda *a, **k: seen.append((k["step"], a[1])) or ours(*a, **k))
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", steps=2, micro_batch_size=3)
    model, _ = load_checkpoint(tmp_path / "out")
    assert model.categories == {"cell_type": statistics.categories["cell_type"], "sex": []}
    held_out_losses(model, corpus, "validation", 50, seed=0)
    monkeypatch.setattr(
        model, "fit_trivial", lambda batches: seen.extend((0, c) for c in batches) or torch.zeros(N_GENES)
    )
    trivial_held_out(model, corpus, "train", "validation", 50, seed=0)
    assert {step for step, _ in seen} == {0, 1, None}
    for split in ("train", "validation"):
        obs = corpus.obs(split)
        type_of = dict(zip(obs["soma_joinid"].to_pylist(), obs["cell_type"].to_pylist(), strict=True))
        batches = [cells for _, cells in seen if cells.joinids[0] in type_of]
        assert len(batches) > 5
        for cells in batches:
            known, types = model.categories["cell_type"], [type_of[joinid] for joinid in cells.joinids]
            assert cells.codes["cell_type"].tolist() == [known.index(t) if t in known else -1 for t in types]
            assert (cells.codes["sex"] == -1).all()


def test_other_categories_make_an_older_state_unusable(corpus, statistics):
    other = replace(statistics, categories=statistics.categories | {"sex": ["female"]})
    a, b = (_fingerprint(corpus, s, RECIPES["scgpt"], 0, META) for s in (statistics, other))
    assert a != b
    assert a == _fingerprint(corpus, replace(statistics), RECIPES["scgpt"], 0, META)


def test_another_vocabulary_is_refused(corpus, statistics, tmp_path):
    meta = {"feature_ids": META["feature_ids"][::-1]}
    paths = {"out": tmp_path / "out", "state": tmp_path / "state"}
    with pytest.raises(CellmillError, match="vocabulary"):
        pretrain(corpus, statistics, RECIPES["scgpt"], name="m", seed=0, **paths, meta=meta)


def test_training_and_embedding_need_little(corpus, tmp_path):
    """A GPU node without pandas, scipy, rich and the like: Python does not find them."""
    code = """
import sys
from importlib.machinery import PathFinder

absent = ("pandas", "scipy", "sklearn", "anndata", "pydantic", "yaml", "rich", "tiledbsoma", "snakemake")
find = PathFinder.find_spec
hide = lambda cls, name, path=None, target=None: None if name.split(".")[0] in absent else find(name, path, target)
PathFinder.find_spec = classmethod(hide)
sys.path.insert(0, sys.argv[1])

from pathlib import Path
from cellmill.checkpoints import load_checkpoint
from cellmill.embed import embed_shards
from cellmill.shards.dataset import Shards
from small_runs import train

shards, out = Shards(sys.argv[2]), Path(sys.argv[3])
train(shards, "scgpt", out, out.with_suffix(".state"), steps=2)
assert embed_shards(load_checkpoint(out)[0], shards, "validation", 16).shape == (60, 16)
"""
    arguments = [str(Path(__file__).parents[1]), str(corpus.folder), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "scgpt seed 0: 16 of 16 cells, step 2" in done.stderr  # plain lines where there is no terminal


# --- training states --------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(corpus, tmp_path, monkeypatch):
    """A run that broke off in step 8, with the state of step 6; its folder, and how to stop one."""

    def stop(**training):
        with monkeypatch.context() as patch:
            patch.setattr("cellmill.pretrain.learning_rate", _fail_at(7))
            with pytest.raises(KeyboardInterrupt):
                train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", **training)

    stop()
    return tmp_path


def _fail_at(last):
    def rate(step, training):
        if step == last:
            raise KeyboardInterrupt
        return learning_rate(step, training)

    return rate


def test_a_stopped_run_goes_on(corpus, stopped, capsys):
    assert [path.name for path in (stopped / "state").iterdir()] == ["step-00000006"]
    assert not (stopped / "out").exists()
    train(corpus, "geneformer", stopped / "out", stopped / "state")
    assert "goes on from step 6 of 12" in capsys.readouterr().err
    train(corpus, "geneformer", stopped / "again", stopped / "state")
    assert sha256(stopped / "out/checkpoint.safetensors") == sha256(stopped / "again/checkpoint.safetensors")
    assert read_log(stopped / "out") == read_log(stopped / "again")
    seconds = pq.read_table(stopped / "out/log.parquet")["seconds"].to_numpy()
    assert (np.diff(seconds) >= 0).all()


@pytest.mark.parametrize("file", ["tensors.safetensors", "log.parquet", "state.json"])
def test_a_torn_state_is_not_used(corpus, stopped, capsys, file):
    path = stopped / "state/step-00000006" / file
    path.write_bytes(path.read_bytes()[:-5])
    train(corpus, "geneformer", stopped / "out", stopped / "state")
    said = capsys.readouterr().err
    assert "step-00000006 is not used" in said
    assert "damaged" in said
    assert "goes on" not in said
    train(corpus, "geneformer", stopped / "again", stopped / "state")
    assert sha256(stopped / "out/checkpoint.safetensors") == sha256(stopped / "again/checkpoint.safetensors")


def test_a_foreign_state_is_not_used(corpus, stopped, capsys):
    train(corpus, "geneformer", stopped / "out", stopped / "state", learning_rate=2e-3, steps=4)
    said = capsys.readouterr().err
    assert "step-00000006 is not used: it belongs to another recipe" in said
    assert not (stopped / "state").exists()


def test_a_foreign_state_goes_when_an_own_one_is_saved(corpus, stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("cellmill.pretrain.learning_rate", _fail_at(4))
    with pytest.raises(KeyboardInterrupt):
        train(corpus, "geneformer", stopped / "out", stopped / "state", learning_rate=2e-3)
    assert [path.name for path in (stopped / "state").iterdir()] == ["step-00000003"]


def test_a_full_disk_keeps_the_state_before(corpus, stopped, monkeypatch):
    before = sha256(stopped / "state/step-00000006/tensors.safetensors")

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cellmill.training.state.write_tensors", full)
        with pytest.raises(CellmillError, match="step-00000009 could not be written .No space left on device"):
            train(corpus, "geneformer", stopped / "out", stopped / "state")
    assert [path.name for path in (stopped / "state").iterdir()] == ["step-00000006"]
    assert sha256(stopped / "state/step-00000006/tensors.safetensors") == before


def test_a_loss_that_is_not_finite_names_the_step(corpus, stopped, monkeypatch):
    def explode(step, training):
        return math.inf if step == 7 else learning_rate(step, training)

    monkeypatch.setattr("cellmill.pretrain.learning_rate", explode)
    with pytest.raises(CellmillError, match="loss became nan at step 9; lower training.learning_rate"):
        train(corpus, "geneformer", stopped / "out", stopped / "state")
    assert [path.name for path in (stopped / "state").iterdir()] == ["step-00000006"]
    assert json.loads((stopped / "state/step-00000006/state.json").read_text())["step"] == 6
