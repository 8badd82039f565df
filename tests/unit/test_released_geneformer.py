"""Geneformer's released layout: what is written is read back, real dictionaries fit, what does not fit is refused."""

import json
import os
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.models.geneformer import Geneformer
from cellmill.released import read_released, write_released
from cellmill.released.files import read_dictionary
from cellmill.views.ragged import select
from model_cells import statistics_of_medians
from safetensors.torch import load_file, save_file
from shard_cells import real_cells

GENES = [f"ENSG{gene:011d}" for gene in (7, 3, 5, 11, 2)]
MEDIANS = [1.5, 0.25, float("nan"), 3.0, 600.0]
SIZES = {"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 24, "max_length": 12, "dropout": 0.02}
SPECIALS = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"]}


def model_of(version: str, medians=MEDIANS, **sizes) -> Geneformer:
    torch.manual_seed(0)
    model = Geneformer(Geneformer.Sizes(version=version, **SIZES | sizes), len(medians), statistics_of_medians(medians))
    for parameter in model.parameters():  # biases and norms, too, tell right from wrong
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=["V1", "V2"])
def released(request, tmp_path):
    """A model and its folder."""
    model = model_of(request.param)
    write_released("geneformer", model, {"feature_ids": GENES}, tmp_path / "gf")
    return model, tmp_path / "gf"


def files_of(folder) -> dict[str, torch.Tensor]:
    """The tensors of a released folder."""
    safe = folder / "model.safetensors"
    return load_file(safe) if safe.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)


def rewrite(folder, tensors) -> None:
    """Put other tensors into a released folder."""
    if (folder / "model.safetensors").exists():
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")


def dictionary_of(folder, name="token_dictionary"):
    return next(folder.glob(f"{name}*.pkl"))


def same_tensors(a: Geneformer, b: Geneformer) -> None:
    ours, theirs = model_tensors(a), model_tensors(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)


def test_what_is_written_is_read_back(released, tmp_path):
    model, folder = released
    again = read_released("geneformer", folder)
    same_tensors(again.model, model)
    assert again.genes == GENES
    assert again.model.sizes == model.sizes
    assert not again.model.training
    assert len(again.remarks) == 1
    assert "1 of 5 genes have no median" in again.remarks[0]
    write_released("geneformer", again.model, {"feature_ids": again.genes}, tmp_path / "again")
    first, second = files_of(folder), files_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(file.name for file in folder.iterdir()) == sorted(f.name for f in (tmp_path / "again").iterdir())


def test_files_are_the_published_ones(released):
    model, folder = released
    version = model.sizes.version
    suffix, weights = {"V1": ("_gc30M", "pytorch_model.bin"), "V2": ("_gc104M", "model.safetensors")}[version]
    names = {"config.json", weights, f"token_dictionary{suffix}.pkl", f"gene_median_dictionary{suffix}.pkl"}
    assert {file.name for file in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 5 + len(SPECIALS[version])
    assert (config["hidden_size"], config["hidden_act"], config["num_attention_heads"]) == (16, "relu", 2)
    tokens = pickle.loads(dictionary_of(folder).read_bytes())
    assert list(tokens.items()) == [(token, i) for i, token in enumerate(SPECIALS[version] + GENES)]
    medians = pickle.loads(dictionary_of(folder, "gene_median_dictionary").read_bytes())
    assert medians == {GENES[0]: 1.5, GENES[1]: 0.25, GENES[3]: 3.0, GENES[4]: 600.0}
    tensors = files_of(folder)
    key = "bert.encoder.layer.1.attention.self.key.weight"
    assert torch.equal(tensors[key], model.layers[1].attention.qkv.weight[16:32])
    assert ("cls.predictions.decoder.weight" in tensors) == (version == "V1")


def test_genes_are_ordered_by_id_and_medians_follow(released, tmp_path):
    """The dictionary's own order says nothing, and numbers may be numpy's, as published."""
    model, folder = released
    path = dictionary_of(folder)
    tokens = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(OrderedDict(sorted((k, np.int64(v)) for k, v in tokens.items()))))
    same_tensors(read_released("geneformer", folder).model, model)


def test_dictionaries_elsewhere_and_as_json(released, tmp_path):
    model, folder = released
    other = tmp_path / "dictionaries"
    other.mkdir()
    for name in ("token_dictionary", "gene_median_dictionary"):
        path = dictionary_of(folder, name)
        (other / f"our_{name}_x.json").write_text(json.dumps(pickle.loads(path.read_bytes())))
        path.unlink()
    with pytest.raises(CellmillError, match="holds no token dictionary; give the path"):
        read_released("geneformer", folder)
    for genes in (other, other / "our_token_dictionary_x.json"):
        same_tensors(read_released("geneformer", folder, genes).model, model)
    weights = next(file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))
    same_tensors(read_released("geneformer", weights, other).model, model)
    (other / "token_dictionary.pkl").write_bytes(b"")
    with pytest.raises(CellmillError, match="holds several token dictionaries .*; give the path"):
        read_released("geneformer", folder, other)


def test_what_is_not_needed_is_tolerated(released):
    model, folder = released
    tensors = files_of(folder)
    extra = {"bert.pooler.dense.weight": torch.ones(16, 16), "classifier.bias": torch.ones(3)}
    tied = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "bert.embeddings.position_ids": torch.arange(12)[None],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    rewrite(folder, tensors | extra | tied)
    again = read_released("geneformer", folder)
    same_tensors(again.model, model)
    assert re.search("2 tensors are not used .bert.pooler.dense.weight, classifier.bias", again.remarks[-1])
    rewrite(folder, {name: tensor for name, tensor in (tensors | tied).items() if name != "cls.predictions.bias"})
    same_tensors(read_released("geneformer", folder).model, model)
    rewrite(folder, {f"module.{name}": tensor.half() for name, tensor in tensors.items()})
    torch.testing.assert_close(read_released("geneformer", folder).model.head_bias, model.head_bias, atol=1e-3, rtol=0)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DECODER = "cls.predictions.decoder.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
BAD_TENSORS = {
    "missing": (lambda t: {k: v for k, v in t.items() if k != QUERY}, "lacks 1 of .*self.*query.*weight"),
    "headless": (lambda t: {k: v for k, v in t.items() if not k.startswith("cls")}, "lacks .*cls.predictions"),
    "no words": (lambda t: {k: v for k, v in t.items() if k not in (WORDS, DECODER)}, "lacks 1 of .*word_embeddings"),
    "query's shape": (lambda t: t | {QUERY: torch.ones(16, 8)}, "query.weight.*have different shapes"),
    "shape": (
        lambda t: t | {"cls.predictions.transform.dense.bias": torch.ones(9)},
        "dense.bias is .9., expected .16.",
    ),
    "not finite": (lambda t: t | {"cls.predictions.bias": t["cls.predictions.bias"] * np.nan}, "not finite|is not cls"),
    "untied": (lambda t: t | {DECODER: t[WORDS] + 1}, "decoder.weight is not bert.embeddings.word_embeddings.weight"),
    "nothing": (lambda t: {"a": torch.ones(1)}, "lacks .* of the"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(released, case):
    change, message = BAD_TENSORS[case]
    _, folder = released
    rewrite(folder, change(files_of(folder)))
    with pytest.raises(CellmillError, match=message):
        read_released("geneformer", folder)


BAD_CONFIGS = [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', a Geneformer's is 'relu'"),
    ({"num_hidden_layers": 3}, "lacks .*bert.encoder.layer.2"),
    ({"num_hidden_layers": None}, "num_hidden_layers is None; give the config.json"),
    ({"num_attention_heads": 3}, "width 16 is no multiple of n_heads 3"),
    ({"hidden_size": 8, "num_attention_heads": 2}, "tensors have other shapes"),
    ({"max_position_embeddings": 13}, "position_embeddings.weight is .12, 16., expected .13, 16."),
    ({"vocab_size": 99}, "tokens and its config.json says 99"),
    ({"attention_probs_dropout_prob": 1.5}, "attention_probs_dropout_prob is 1.5; give the config.json"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[next(iter(change)) for change, _ in BAD_CONFIGS])
def test_settings_that_do_not_fit(released, change, message):
    _, folder = released
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CellmillError, match=message):
        read_released("geneformer", folder)


@pytest.mark.parametrize(("value", "expected"), [(0.02, None), (None, None), (0, 0), (0.3, 0.3)])
def test_the_dropout_of_attention_weights(value, expected, tmp_path):
    write_released("geneformer", model_of("V2", attention_dropout=value), {"feature_ids": GENES}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["attention_probs_dropout_prob"]
    assert written == (SIZES["dropout"] if value is None else value)
    assert read_released("geneformer", tmp_path).model.sizes.attention_dropout == expected


def test_the_activation_is_to_be_said(released):
    """Of the settings that all Geneformers share it alone is not Hugging Face's default."""
    model, folder = released
    config = json.loads((folder / "config.json").read_text())
    for name in ("layer_norm_eps", "pad_token_id", "type_vocab_size", "position_embedding_type"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    same_tensors(model, read_released("geneformer", folder).model)
    config.pop("hidden_act")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CellmillError, match="hidden_act is None, a Geneformer's is 'relu'"):
        read_released("geneformer", folder)


def dictionary(*tokens, start=0) -> dict:
    return {token: number for number, token in enumerate(tokens, start)}


BAD_TOKENS = [
    (dictionary(*GENES, "<pad>", "<mask>"), "first those of <pad> <mask> .V1. or .*, then the genes"),
    (dictionary("<mask>", "<pad>", *GENES), "no token dictionary of Geneformer"),
    (dictionary("<pad>", "<mask>", "<cls>", *GENES), "no token dictionary of Geneformer"),
    (dictionary("<pad>", "<mask>", *GENES, start=1), "no token dictionary of Geneformer"),
    (dictionary("<pad>", "<mask>"), "no token dictionary of Geneformer"),
    ({"<pad>": 0, "<mask>": 1, GENES[0]: 1.5}, "does not map genes to whole numbers"),
    (dictionary("<pad>", "<mask>", *GENES, "ENSG1", "ENSG2", "ENSG3"), "has . tokens and .* names 10; give"),
    ([1, 2], "holds a list, not a dictionary"),
]


@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_dictionaries_that_do_not_fit(released, tokens, message):
    _, folder = released
    dictionary_of(folder).write_bytes(pickle.dumps(tokens))
    with pytest.raises(CellmillError, match=message):
        read_released("geneformer", folder)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/cellmill-geneformer-was-run",)


@pytest.mark.parametrize("name", ["token_dictionary", "gene_median_dictionary"])
def test_pickles_with_code_are_refused(released, name):
    _, folder = released
    dictionary_of(folder, name).write_bytes(pickle.dumps({"<pad>": Evil()}))
    with pytest.raises(CellmillError, match="refused: it asks for .*mkdir, which could run code"):
        read_released("geneformer", folder)
    assert not os.path.exists("/tmp/cellmill-geneformer-was-run")


def test_weights_with_code_are_refused(tmp_path):
    write_released("geneformer", model_of("V1"), {"feature_ids": GENES}, tmp_path)
    torch.save({"bert": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CellmillError, match="is refused: it holds more than tensors"):
        read_released("geneformer", tmp_path)
    assert not os.path.exists("/tmp/cellmill-geneformer-was-run")


def test_files_that_are_missing_or_damaged(released, tmp_path):
    _, folder = released
    with pytest.raises(CellmillError, match="holds no model.safetensors and no pytorch_model.bin"):
        read_released("geneformer", tmp_path)
    medians = dictionary_of(folder, "gene_median_dictionary")
    medians.write_bytes(pickle.dumps({"ENSG1": 1.0}))
    with pytest.raises(CellmillError, match="no median of a gene of token_dictionary"):
        read_released("geneformer", folder)
    medians.write_bytes(pickle.dumps(dict.fromkeys(GENES, -1.0)))
    with pytest.raises(CellmillError, match="medians that are no positive numbers"):
        read_released("geneformer", folder)
    medians.unlink()
    with pytest.raises(CellmillError, match="gene_median_dictionary.* does not exist"):
        read_released("geneformer", folder)
    weights = next(file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    medians.write_bytes(pickle.dumps(dict.fromkeys(GENES, 1.0)))
    with pytest.raises(CellmillError, match="truncated, corrupt or of another format"):
        read_released("geneformer", folder)
    (folder / "config.json").unlink()
    with pytest.raises(CellmillError, match="config.json does not exist"):
        read_released("geneformer", folder)


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_weights_and_dictionaries_of_different_versions(version, tmp_path):
    write_released("geneformer", model_of(version), {"feature_ids": GENES}, tmp_path)
    other = "V2" if version == "V1" else "V1"
    dictionary_of(tmp_path).write_bytes(pickle.dumps(dictionary(*SPECIALS[other], *GENES)))
    expected = f"holds {version} weights .*tokens. and .* is a {other} dictionary .*; give the {version} dictionaries"
    with pytest.raises(CellmillError, match=expected):
        read_released("geneformer", tmp_path)


def test_the_published_dictionaries(data, tmp_path):
    """With random weights in the layout of V1-10M: real dictionaries, real cells; and V2's dictionaries are refused."""
    genes = data / "vocab" / "geneformer_token_dictionary_gc30M.json.gz"
    feature_ids = list(read_dictionary(genes))[2:]
    medians = read_dictionary(data / "vocab" / "geneformer_gene_median_dictionary_gc30M.json.gz")
    torch.manual_seed(0)
    statistics = statistics_of_medians([medians[gene] for gene in feature_ids])
    model = Geneformer(Geneformer.presets["v1-10m"], 25_424, statistics).eval()
    write_released("geneformer", model, {"feature_ids": feature_ids}, tmp_path)
    for file in tmp_path.glob("*dictionary*"):
        file.unlink()
    again = read_released("geneformer", tmp_path, genes)
    same_tensors(again.model, model)
    assert again.genes == feature_ids
    assert not again.remarks
    cells = real_cells(data, "celltypist_sample")[0].take([0, 1])
    cells = select(cells, cells.genes < 25_424)
    with torch.inference_mode():
        assert again.model.embed_cells(again.model.embed_inputs(cells)).isfinite().all()
    v2 = data / "vocab" / "geneformer_token_dictionary_gc95M.json.gz"
    with pytest.raises(
        CellmillError, match="holds V1 weights .25,426 tokens. and .* is a V2 dictionary .20,275 tokens"
    ):
        read_released("geneformer", tmp_path, v2)
