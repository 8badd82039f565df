"""Embeddings: in order, and the same whatever the batch and however the file was cut."""

import json

import numpy as np
import pytest
import torch
from cellmill.checkpoints import build_model
from cellmill.embed import embed_and_write, embed_shards, read_meta, seen, write_embedding
from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import compute_statistics
from shard_cells import real_cells, write_shards
from small_runs import N_GENES, RECIPES, few_genes, make_corpus, make_shards

ROWS = np.arange(200, 330)


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    statistics = compute_statistics(make_corpus(tmp_path_factory.mktemp("corpus"), data))
    return {name: build_model(recipe, N_GENES, statistics, seed=0) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("whole"), data, {"all": ROWS}, cells_per_shard=1000)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_and_cuts_do_not_matter(models, whole, data, tmp_path, name):
    cut = make_shards(tmp_path, data, {"all": ROWS}, cells_per_shard=37, row_group=11)
    alone = [models[name].eval().embed_cells(models[name].embed_inputs(c)) for c in whole.batches("all", 1)]
    expected = torch.cat(alone).detach().numpy()
    assert np.abs(expected - expected[::-1]).max() > 0.01  # cells differ
    for shards in (whole, cut):
        for batch_size in (1, 7, 64):
            x_BE = embed_shards(models[name], shards, "all", batch_size, progress=False)
            assert x_BE.dtype == np.float32
            np.testing.assert_allclose(x_BE, expected, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_forward_pass_has_few_tokens(models, whole, monkeypatch, name):
    model, passes = models[name], []
    expected = embed_shards(model, whole, "all", 64, progress=False)
    longest = max(model.token_lengths(next(whole.batches("all", len(ROWS)))))
    ours = type(model).embed_inputs

    def noting(self, cells):
        passes.append(self.token_lengths(cells).sum())
        return ours(self, cells)

    monkeypatch.setattr(type(model), "embed_inputs", noting)
    monkeypatch.setattr("cellmill.embed.TOKENS", 5 * longest)
    x_BE = embed_shards(model, whole, "all", 64, progress=False)
    assert longest < max(passes) <= 5 * longest
    np.testing.assert_allclose(x_BE, expected, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_cells_without_genes_are_embedded(models, data, tmp_path, name):
    cells, obs = real_cells(data, "baron_h1")
    cells, obs = few_genes(cells.take(range(9))), obs.slice(0, 9)
    empty = np.array([0, 4, 8])
    lengths = cells.lengths.copy()
    lengths[empty] = 0
    kept = ~np.isin(cells.cell_of, empty)
    cells = CellBatch(
        cells.joinids, np.concatenate([[0], np.cumsum(lengths)]), cells.genes[kept], cells.counts[kept], cells.totals
    )
    shards = Shards(write_shards(tmp_path, {"all": (cells, obs)}, n_genes=N_GENES, cells_per_shard=9))
    results = [embed_shards(models[name], shards, "all", size, progress=False) for size in (1, 2, 9)]
    for x_BE in results:
        assert np.isfinite(x_BE).all()
        np.testing.assert_allclose(x_BE, results[0], atol=1e-5)
        if name != "scfoundation":  # which reads the depth of a cell, also of one without genes
            np.testing.assert_allclose(x_BE[empty], x_BE[empty[:1]].repeat(3, axis=0), atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_embeds_alike_and_says_float32(models, whole, name):
    exact = embed_shards(models[name], whole, "all", 64, progress=False)
    rounded = embed_shards(models[name], whole, "all", 64, progress=False, precision="bfloat16")
    assert rounded.dtype == np.float32
    similarity = (exact * rounded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert similarity.min() > 0.999
    assert not np.array_equal(exact, rounded)
    assert not torch.is_autocast_enabled("cpu")


def test_the_model_is_left_in_its_mode(models, whole):
    model = models["scgpt"].train()
    embed_shards(model, whole, "all", 64, progress=False)
    assert model.training


def test_a_diverged_model_is_named(models, whole):
    model = build_model(RECIPES["scgpt"], N_GENES, None, seed=0)
    with torch.no_grad():
        model.layers[0].linear1.weight.fill_(torch.nan)
    with pytest.raises(CellmillError, match="130 cells are not finite, the first is soma_joinid 200"):
        embed_shards(model, whole, "all", 64, progress=False)


def test_other_genes_are_refused(whole):
    model = build_model(RECIPES["scgpt"], N_GENES + 1, None, seed=0)
    with pytest.raises(CellmillError, match="3000 genes and the model 3001"):
        embed_shards(model, whole, "all", 64, progress=False)


def test_an_unknown_pooling_is_refused(models, whole):
    with pytest.raises(CellmillError, match="pooling"):
        embed_shards(models["scgpt"], whole, "all", 64, pooling="median", progress=False)


class Benchmark:
    """Shards of one data set, of which only the manifest is asked."""

    def __init__(self, primary_only: bool):
        self.primary_only = primary_only

    def datasets(self, split: str) -> set[str]:
        return {"a"}


def test_copies_of_cells_may_have_been_seen():
    assert seen(["a", "b"], Benchmark(True)) == "yes"
    assert seen(["b"], Benchmark(True)) == "no"
    assert seen(["b"], Benchmark(True), primary_only=False) == "unknown"
    assert seen(["b"], Benchmark(False)) == "unknown"
    assert seen([], Benchmark(False)) == "no"


def test_of_one_data_set_the_cells_decide(data, tmp_path):
    cells, obs = real_cells(data, "celltypist_sample")
    parts = {}
    for name, start, stop in (("corpus", 0, 300), ("others", 300, 559), ("some", 299, 400)):
        part = {"all": (cells.slice(start, stop), obs.slice(start, stop - start))}
        parts[name] = Shards(write_shards(tmp_path / name, part, n_genes=32_786, cells_per_shard=100))
    corpus, trained_on = parts["corpus"], ["celltypist_sample"]
    assert seen(trained_on, parts["others"]) == "yes"
    assert seen(trained_on, parts["others"], corpus=corpus) == "no"
    assert seen(trained_on, parts["some"], corpus=corpus) == "yes"
    assert seen(None, parts["others"], corpus=corpus) == "unknown"


def test_an_embedding_is_written_whole(tmp_path):
    x = np.arange(6, dtype=np.float64).reshape(3, 2)
    write_embedding(tmp_path / "a" / "seed0.npy", x, {"kind": "model"})
    read = np.load(tmp_path / "a" / "seed0.npy", allow_pickle=False)
    assert read.dtype == np.float32
    assert (read == x).all()
    meta = json.loads((tmp_path / "a" / "seed0.json").read_text())
    assert (meta["kind"], meta["cells"], meta["width"]) == ("model", 3, 2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["seed0.json", "seed0.npy"]


@pytest.mark.parametrize(("trained_on", "seen"), [([], "no"), (["other"], "no"), (["other", "baron_h1"], "yes")])
def test_what_is_known_of_an_embedding_is_written_beside_it(whole, tmp_path, trained_on, seen):
    x_CE = np.zeros((len(ROWS), 2), np.float32)
    about = {"model": "mine", "kind": "model", "seed": 3, "checkpoint": "c0de"}
    embed_and_write(tmp_path / "seed3.npy", lambda: x_CE, whole, trained_on=trained_on, **about)
    meta = read_meta(tmp_path / "seed3.npy")
    assert meta.pop("seconds") >= 0
    assert meta.items() >= (about | {"seen": seen, "cells": len(ROWS), "width": 2}).items()
