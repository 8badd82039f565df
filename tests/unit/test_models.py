"""The registry of architectures, their sizes, and what holds for each of them."""

import json
import subprocess
import sys

import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.models import architectures, load_architecture, resolve_sizes
from cellmill.models.base import CellModel, LossTerm, total_loss


def test_architectures():
    names = architectures()
    assert {"geneformer", "scgpt"} <= set(names)
    assert not {"base", "attention"} & set(names)


def test_unknown_architecture():
    with pytest.raises(CellmillError, match="'scgtp' is unknown; take one of .*geneformer.*scgpt"):
        load_architecture("scgtp")


def test_own_architecture_by_dotted_path(tmp_path, monkeypatch):
    package = tmp_path / "my_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("from cellmill.models.base import CellModel\nclass MODEL(CellModel): pass\n")
    (package / "empty.py").write_text("")
    (package / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert issubclass(load_architecture("my_models.mine"), CellModel)
    with pytest.raises(CellmillError, match="'my_models.empty' sets no MODEL"):
        load_architecture("my_models.empty")
    with pytest.raises(CellmillError, match="'my_models.absent' cannot be imported"):
        load_architecture("my_models.absent")
    with pytest.raises(CellmillError, match="a_module_that_is_not_there"):
        load_architecture("my_models.broken")


@pytest.mark.parametrize("name", architectures())
def test_sizes(name):
    model_class = load_architecture(name)
    assert resolve_sizes(model_class, "demo", {}) == model_class.presets["demo"]
    assert resolve_sizes(model_class, "demo", {"n_layers": 5}).n_layers == 5
    with pytest.raises(CellmillError, match="no preset 'huge'; take one of .*demo"):
        resolve_sizes(model_class, "huge", {})
    for overrides, message in {
        ("layers", 3): "no size 'layers'; its sizes are .*n_layers",
        ("n_layers", "3"): "'n_layers' is '3', but must be a whole number",
        ("n_layers", 2.5): "must be a whole number",
        ("n_layers", True): "must be a whole number",
        ("n_layers", 0): "must be at least 1",
        ("width", 0): "must be at least 1",
    }.items():
        with pytest.raises(CellmillError, match=message):
            resolve_sizes(model_class, "demo", dict([overrides]))


@pytest.mark.parametrize("name", [name for name in architectures() if name != "bag"])
def test_widths_that_no_head_divides_are_refused(name):
    with pytest.raises(CellmillError, match="width 65 is no multiple of n_(cross_)?heads"):
        resolve_sizes(load_architecture(name), "demo", {"width": 65})


def test_sizes_that_are_shares():
    model_class = load_architecture("geneformer")
    assert resolve_sizes(model_class, "demo", {"dropout": 0}).dropout == 0
    for value, message in (("a", "must be a number"), (1.0, "must be less than 1")):
        with pytest.raises(CellmillError, match=message):
            resolve_sizes(model_class, "demo", {"dropout": value})


def test_sizes_that_may_be_none():
    model_class = load_architecture("scgpt")
    for value, expected in ((None, 0.2), (0, 0), (0.1, 0.1)):
        sizes = resolve_sizes(model_class, "base", {"dropout": 0.2, "attention_dropout": value})
        assert sizes.dropout_of_attention == expected
    for value, message in ((2.0, "must be less than 1"), ("x", "must be a number"), (True, "must be a number")):
        with pytest.raises(CellmillError, match=message):
            resolve_sizes(model_class, "base", {"attention_dropout": value})


def test_sizes_of_other_kinds():
    with pytest.raises(CellmillError, match="'version' is 'V3', but must be one of V1, V2"):
        resolve_sizes(load_architecture("geneformer"), "demo", {"version": "V3"})
    with pytest.raises(CellmillError, match="'released_gen_stream' is 1, but must be true or false"):
        resolve_sizes(load_architecture("scgpt"), "demo", {"released_gen_stream": 1})


@pytest.mark.parametrize("name", architectures())
def test_every_preset_builds_without_memory(name):
    model_class = load_architecture(name)
    for sizes in model_class.presets.values():
        with torch.device("meta"):
            model = model_class(sizes, 100)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert set(model.poolings) <= set(model_class.poolings)


def test_listing():
    out = subprocess.run(
        [sys.executable, "-m", "cellmill.models", "--json"], capture_output=True, text=True, check=True
    ).stdout
    rows = {(row["architecture"], row["preset"]): row for row in json.loads(out)}
    assert rows["geneformer", "v1-10m"]["total"] == 10_288_722
    assert rows["scgpt", "whole-human"]["total"] == 51_856_898
    assert rows["scgpt", "whole-human"]["without_embeddings"] < 21e6


def test_total_loss_is_a_sum_of_means():
    terms = {
        "a": LossTerm(torch.tensor(6.0), torch.tensor(3)),
        "b": LossTerm(torch.tensor(5.0), torch.tensor(2)),
        "none": LossTerm(torch.tensor(0.0), torch.tensor(0)),
    }
    assert total_loss(terms) == 4.5
