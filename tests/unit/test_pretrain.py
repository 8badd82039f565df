"""Pretraining: schedule, gradients, validation, log, errors, and what happens to a training state."""

import json
import math
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cellmill.checkpoints import build_model, load_checkpoint
from cellmill.device import EXACT
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import held_out_losses, spread_batches, trivial_held_out
from cellmill.files import sha256
from cellmill.models.base import total_loss
from cellmill.models.geneformer import Geneformer
from cellmill.models.packing import Packing
from cellmill.pretrain import _fingerprint, accumulate_gradients, pretrain
from cellmill.recipes import ModelRecipe, Training
from cellmill.shards.batch import CellBatch
from cellmill.shards.loader import Loader
from cellmill.shards.statistics import compute_statistics
from cellmill.training.micro_batches import cut
from cellmill.training.optimizer import learning_rate
from cellmill.training.parallel import Wrapped
from cellmill.training.precision import prepare_blocks
from cellmill.training.state import load_state
from small_runs import META, N_GENES, RECIPES, make_corpus, make_shards, train

SMALL = {"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 32, "max_length": 400, "dropout": 0.0}
NO_DROPOUT = {
    "geneformer": replace(RECIPES["geneformer"], sizes=SMALL),
    "scfoundation": replace(RECIPES["scfoundation"], sizes=RECIPES["scfoundation"].sizes | {"dropout": 0.0}),
    "scgpt": replace(RECIPES["scgpt"], sizes=SMALL | {"cell_prompt_after": 4}),
    "exceiver": ModelRecipe(architecture="exceiver"),
    "scmulan": ModelRecipe(architecture="scmulan", sizes={k: v for k, v in SMALL.items() if k != "hidden"}),
}
"""Cells of different lengths."""


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


def read_log(out) -> dict:
    """{(step, split, metric): value}, without what depends on the machine."""
    rows = pq.read_table(out / "log.parquet", filters=[("split", "!=", "machine")]).to_pylist()
    return {(row["step"], row["split"], row["metric"]): row["value"] for row in rows}


def gradients(model, parts, step=9) -> tuple[torch.Tensor, dict]:
    """The flat gradient of one step's objective, and its terms."""
    model.zero_grad()
    terms = accumulate_gradients(Wrapped(model, model), parts, step, EXACT)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), terms


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_any_cut_gives_the_gradient_of_the_whole_batch(corpus, statistics, name):
    model = build_model(NO_DROPOUT[name], N_GENES, statistics, 0).train()
    cells = next(corpus.batches("train", 16, categories=model.categories))
    tokens = model.token_lengths(cells)
    order = np.argsort(cells.lengths)  # micro batches with very different numbers of positions
    whole, terms = gradients(model, [model.pretrain_inputs(cells, seed=0, step=9)])
    objective = total_loss(model(model.pretrain_inputs(cells, seed=0, step=9), step=9))
    assert float(total_loss(terms)) == pytest.approx(objective.item(), rel=1e-6)
    assert len(terms) == {"scgpt": 3, "scmulan": 2}.get(name, 1)
    for rows in (
        [order[:1], order[1:3], order[3:10], order[10:]],
        cut(tokens, int(tokens.sum()) // 3),
        cut(tokens, 1),  # each cell alone
    ):
        parts = [model.pretrain_inputs(cells.take(some), seed=0, step=9) for some in rows]
        assert len(parts) > 2
        ours, our_terms = gradients(model, parts)
        assert (ours - whole).norm() < 1e-5 * whole.norm()
        for key, term in terms.items():
            assert float(our_terms[key].count) == float(term.count)
            assert float(our_terms[key].sum) == pytest.approx(float(term.sum), rel=1e-5)


@pytest.mark.parametrize("name", NO_DROPOUT)
def test_layouts_and_checkpoints_of_activations_change_no_gradient(corpus, statistics, name):
    recipe = NO_DROPOUT[name]
    plain = build_model(recipe, N_GENES, statistics, 0).train()
    cells = next(corpus.batches("train", 12, categories=plain.categories))
    whole, _ = gradients(plain, [plain.pretrain_inputs(cells, seed=0, step=9)])
    for packing in (Packing("padded"), Packing(grain=300)):
        other = build_model(recipe, N_GENES, statistics, 0).train()
        other.packing = packing
        prepare_blocks(other, Training(checkpoint_activations=True), torch.device("cpu"))
        ours, _ = gradients(other, [other.pretrain_inputs(cells, seed=0, step=9)])
        assert (ours - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("name", RECIPES)
def test_layers_computed_again_drop_what_they_dropped(corpus, statistics, name):
    found = []
    for again in (False, True):
        model = build_model(RECIPES[name], N_GENES, statistics, 0).train()
        prepare_blocks(model, Training(checkpoint_activations=again), torch.device("cpu"))
        cells = next(corpus.batches("train", 8, categories=model.categories))
        torch.manual_seed(5)
        found.append(gradients(model, [model.pretrain_inputs(cells, seed=0, step=9)])[0])
    assert torch.equal(*found)


def test_compiled_layers_compute_the_same_with_few_graphs(corpus, statistics):
    """All layers share their graphs, and a few numbers of tokens bring the last one."""
    recipe = replace(NO_DROPOUT["geneformer"], sizes=NO_DROPOUT["geneformer"].sizes | {"n_layers": 3})
    plain, compiled = (build_model(recipe, N_GENES, statistics, 0).train() for _ in range(2))
    prepare_blocks(compiled, Training(compile="on"), torch.device("cpu"))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    cells = next(corpus.batches("train", 48))
    graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
    for start, stop in ((0, 5), (5, 12), (12, 24), (24, 30), (30, 48)):
        some = cells.slice(start, stop)
        expected, _ = gradients(plain, [plain.pretrain_inputs(some, seed=0, step=9)])
        ours, _ = gradients(compiled, [compiled.pretrain_inputs(some, seed=0, step=9)])
        assert (ours - expected).norm() < 1e-5 * expected.norm()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] < graphs[3] == graphs[4] == graphs[5]
    assert graphs[5] - graphs[0] <= 18


def test_without_a_compiler_the_recipe_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CellmillError, match=r"needs the compiler no-such-compiler.*compile: off"):
        train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", compile="on")


@pytest.mark.parametrize("name", RECIPES)
def test_log_holds_every_step_and_the_validations(corpus, tmp_path, name):
    train(corpus, name, tmp_path / "out", tmp_path / "state")
    log = read_log(tmp_path / "out")
    assert {s for s, split, _ in log if split == "train"} == set(range(1, 13))
    assert {s for s, split, _ in log if split == "validation"} == {0, 5, 10, 12}
    terms = {"geneformer": {"mlm"}, "scfoundation": {"mse"}, "scgpt": {"gep", "mvc", "gep_prompt"}}[name]
    always = {"loss", "learning_rate", "gradient_norm", "cells", "genes"}
    assert {metric for s, split, metric in log if (s, split) == (12, "train")} == always | terms
    machine = pq.read_table(tmp_path / "out/log.parquet", filters=[("metric", "==", "padding_share")])
    assert machine["step"].to_pylist() == list(range(1, 13))
    assert set(machine["value"].to_pylist()) == {0.0}
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
def test_micro_batches_train_alike(corpus, tmp_path, monkeypatch, precision):
    monkeypatch.setitem(RECIPES, "geneformer", NO_DROPOUT["geneformer"])
    for limit in (16384, 150):
        options = {"micro_batch_tokens": limit, "precision": precision, "steps": 4, "validate_every": 4}
        train(corpus, "geneformer", tmp_path / f"{limit}", tmp_path / "state", **options)
    whole, cut = read_log(tmp_path / "16384"), read_log(tmp_path / "150")
    close = {"rel": 1e-5 if precision == "float32" else 1e-3}
    for step in (1, 4):
        for split, metric in (("train", "loss"), ("train", "gradient_norm"), ("validation", "loss")):
            if (step, split) == (1, "validation"):
                continue
            slack = {"rel": 20 * close["rel"]} if metric == "gradient_norm" else close
            assert cut[step, split, metric] == pytest.approx(whole[step, split, metric], **slack), (step, metric)


def test_steps_take_batches_until_they_have_their_tokens(corpus, statistics, tmp_path, capsys):
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", steps=4, batch_tokens=1000)
    log = read_log(tmp_path / "out")
    model = build_model(RECIPES["geneformer"], N_GENES, statistics, 0)
    with Loader(corpus, "train", 8, 0) as loader:
        n_cells, n_genes = 0, 0
        for step in range(1, 5):
            tokens = 0
            while tokens < 1000:
                cells = next(loader)
                tokens += model.token_lengths(cells).sum()
                n_cells, n_genes = n_cells + 8, n_genes + len(cells.genes)
            assert (log[step, "train", "cells"], log[step, "train", "genes"]) == (n_cells, n_genes)
    assert n_cells == 4 * 16  # two batches a step, of 64 tokens a cell at most
    assert "64 of 64 cells, step 4" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["geneformer", "scgpt"])
def test_muon_trains_too(corpus, tmp_path, name):
    options = {"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "validate_every": 40, "checkpoint_every": 40}
    train(corpus, name, tmp_path / "out", tmp_path / "state", optimizer="muon", **options)
    log = read_log(tmp_path / "out")
    assert log[40, "validation", "loss"] < 0.97 * log[0, "validation", "loss"]


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
    train(corpus, "geneformer", tmp_path / "out", tmp_path / "state", steps=2, micro_batch_tokens=200)
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


@pytest.mark.parametrize(("before", "after"), [(150, 16384), (16384, 150)])
def test_a_run_goes_on_with_the_micro_batches_that_it_is_given(corpus, stopped, monkeypatch, before, after):
    limits, ours = [], accumulate_gradients
    shutil.rmtree(stopped / "state")
    with monkeypatch.context() as patch:
        patch.setattr("cellmill.pretrain.learning_rate", _fail_at(4))
        with pytest.raises(KeyboardInterrupt):
            train(corpus, "geneformer", stopped / "out", stopped / "state", micro_batch_tokens=before)
    monkeypatch.setattr(
        "cellmill.pretrain.accumulate_gradients", lambda w, parts, *a: limits.append(len(parts)) or ours(w, parts, *a)
    )
    train(corpus, "geneformer", stopped / "out", stopped / "state", micro_batch_tokens=after)
    assert len(limits) == 9
    assert all((n_parts == 1) == (after == 16384) for n_parts in limits)


def test_a_state_is_forgotten_when_it_is_restored(corpus, stopped, monkeypatch):
    kept, load = [], load_state

    def loading(*arguments):
        found, remarks = load(*arguments)
        kept.extend(weakref.ref(tensor) for name, tensor in found.tensors.items() if name.startswith("model."))
        return found, remarks

    def rate(step, training):
        assert kept
        assert not any(tensor() is not None for tensor in kept)
        return learning_rate(step, training)

    monkeypatch.setattr("cellmill.pretrain.load_state", loading)
    monkeypatch.setattr("cellmill.pretrain.learning_rate", rate)
    train(corpus, "geneformer", stopped / "out", stopped / "state")


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
    assert [path.name for path in (stopped / "state").glob("step-*")] == ["step-00000006"]
    assert (stopped / "state/offending_batch.json").is_file()
    assert json.loads((stopped / "state/step-00000006/state.json").read_text())["step"] == 6
