"""Checkpoints: a model comes back as it was, and whatever does not belong together is refused."""

import json
import shutil

import pytest
import torch
from cellmill.checkpoints import META as DESCRIPTION
from cellmill.checkpoints import WEIGHTS, build_model, load_checkpoint, model_tensors, save_checkpoint
from cellmill.errors import CellmillError
from cellmill.recipes import ModelRecipe
from cellmill.shards.statistics import compute_statistics
from small_runs import META, N_GENES, RECIPES, make_corpus


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


@pytest.fixture(scope="module")
def saved(statistics, tmp_path_factory):
    """The folder of a checkpoint of each architecture, and its model."""
    made = {}
    for name, recipe in RECIPES.items():
        model = build_model(recipe, N_GENES, statistics, seed=3)
        folder = tmp_path_factory.mktemp(name)
        meta = META | {"recipe": {"architecture": recipe.architecture, "preset": "demo", "sizes": recipe.sizes}}
        save_checkpoint(folder, model, meta)
        made[name] = folder, model
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_comes_back(saved, corpus, name):
    folder, model = saved[name]
    read, meta = load_checkpoint(folder)
    assert not read.training
    assert meta["feature_ids"] == META["feature_ids"]
    assert meta["sizes"]["width"] == 16
    assert meta["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    ours, theirs = model.state_dict(), read.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].nan_to_num(-1), theirs[key].nan_to_num(-1)) for key in ours)
    cells = next(corpus.batches("validation", 5))
    with torch.no_grad():
        expected = model.eval().embed_cells(model.embed_inputs(cells))
        assert torch.equal(read.embed_cells(read.embed_inputs(cells)), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_the_untrained_twin_depends_on_the_seed_alone(statistics, name):
    before = torch.get_rng_state()
    twins = []
    for seed in (1, 1, 2):
        torch.rand(3)
        twins.append(model_tensors(build_model(RECIPES[name], N_GENES, statistics, seed)))
    a, b, c = twins
    torch.set_rng_state(before)
    build_model(RECIPES[name], N_GENES, statistics, 1)
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a]
    assert all(same)
    assert not all(torch.equal(a[key].nan_to_num(), c[key].nan_to_num()) for key in a)


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    folder, model = saved["geneformer"]
    meta = json.loads((folder / DESCRIPTION).read_text())
    save_checkpoint(tmp_path, model, meta)
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def _edit(**changes):
    def edit(folder):
        meta = json.loads((folder / DESCRIPTION).read_text())
        (folder / DESCRIPTION).write_text(json.dumps(meta | changes))

    return edit


def _truncate(name, keep):
    def truncate(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return truncate


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "does not exist"),
        (lambda folder: (folder / DESCRIPTION).unlink(), "does not exist"),
        (_truncate(WEIGHTS, -7), "truncated"),
        (_truncate(WEIGHTS, 0), "truncated"),
        (_truncate(DESCRIPTION, -7), "damaged"),
        (_edit(weights_sha256="0" * 64), "truncated or not the file"),
        (_edit(feature_ids=META["feature_ids"][::-1]), "gene ids are not those"),
        (_edit(feature_ids=META["feature_ids"][:-1]), "gene ids are not those"),
        (_edit(recipe={"architecture": "nonesuch"}), "unknown"),
        (_edit(recipe={"architecture": "scgpt"}), "cannot be read as a scgpt"),
        (_edit(recipe={}), "damaged"),
    ],
)
def test_what_does_not_belong_together_is_refused(saved, tmp_path, damage, message):
    folder = shutil.copytree(saved["geneformer"][0], tmp_path / "copy")
    damage(folder)
    with pytest.raises(CellmillError, match=message):
        load_checkpoint(folder)


def test_other_sizes_do_not_fit(saved, tmp_path):
    folder = shutil.copytree(saved["geneformer"][0], tmp_path / "copy")
    sizes = json.loads((folder / DESCRIPTION).read_text())["sizes"]
    _edit(sizes=sizes | {"hidden": 32})(folder)
    with pytest.raises(CellmillError, match="does not fit the architecture"):
        load_checkpoint(folder)


def test_a_vocabulary_of_another_length_is_refused(saved, tmp_path):
    with pytest.raises(CellmillError, match="2999 genes and the model 3000"):
        save_checkpoint(tmp_path, saved["scgpt"][1], {"feature_ids": META["feature_ids"][:-1]})
    assert not list(tmp_path.iterdir())


def test_shards_of_another_vocabulary_are_refused(saved, corpus):
    _, meta = load_checkpoint(saved["scgpt"][0])
    corpus.check_vocabulary(meta["vocabulary_hash"])
    with pytest.raises(CellmillError, match="vocabulary"):
        corpus.check_vocabulary("1" * 64)


def test_unknown_presets_and_sizes_are_refused(statistics):
    for recipe in (ModelRecipe(architecture="scgpt", preset="huge"), ModelRecipe(architecture="scgpt", sizes={"a": 1})):
        with pytest.raises(CellmillError, match="has no"):
            build_model(recipe, N_GENES, statistics, 0)


def test_a_full_disk_leaves_the_checkpoint_before(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved["geneformer"][0], tmp_path / "copy")
    before = (folder / WEIGHTS).read_bytes()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cellmill.checkpoints.write_tensors", full)
    with pytest.raises(CellmillError, match="No space left"):
        save_checkpoint(folder, saved["geneformer"][1], META | {"recipe": {}})
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
