"""Geneformer's released layout: the folder of a Hugging Face `BertForMaskedLM`, and two dictionaries of genes.

* ``config.json``, and ``model.safetensors`` or ``pytorch_model.bin``;
* ``token_dictionary*.pkl`` (Ensembl id to token id) and ``gene_median_dictionary*.pkl`` (Ensembl id to the nonzero
  median of its CP10k), also as JSON (``.json``, ``.json.gz``). Published suffixes: none or ``_gc30M`` (V1), ``_gc95M``
  and ``_gc104M`` (V2).

The dictionaries are part of the model: they say which version it is. V1's token ids begin with <pad> <mask>, V2's with
<pad> <mask> <cls> <eos>; the genes follow. Layout: https://huggingface.co/ctheodoris/Geneformer.
"""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.base import GeneStatistics
from cellmill.models.geneformer import INIT_STD, NORM_EPS, Geneformer
from cellmill.released.files import (
    Released,
    build,
    check_depth,
    fill,
    ignored,
    read_dictionary,
    read_json,
    read_safetensors,
    read_torch,
    state_dict_of,
    strip,
)

SPECIALS = {"V1": ["<pad>", "<mask>"], "V2": ["<pad>", "<mask>", "<cls>", "<eos>"]}
WEIGHTS = {"V2": "model.safetensors", "V1": "pytorch_model.bin"}
SUFFIX = {"V1": "_gc30M", "V2": "_gc104M"}
PUBLISHED_ROWS = {25_426: "V1", 20_275: "V2"}
PUBLISHED_LENGTHS = {2048: "V1", 4096: "V2"}
SIZES = {
    "n_layers": "num_hidden_layers",
    "width": "hidden_size",
    "n_heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "max_length": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}
ATTENTION_DROPOUT = "attention_probs_dropout_prob"
DROPOUTS = ("hidden_dropout_prob", ATTENTION_DROPOUT)
FIXED = {
    "hidden_act": "relu",
    "layer_norm_eps": NORM_EPS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "position_embedding_type": "absolute",
}
"""Settings of every Geneformer. What a config does not say is Hugging Face's default, which is this but for the
activation's, gelu; so that is to be said."""
EMBEDDINGS, HEAD, DECODER = "bert.embeddings", "cls.predictions", "cls.predictions.decoder"
POSITION_IDS = f"{EMBEDDINGS}.position_ids"
QKV = "{}.attention.self.(query+key+value).{}"
"""Our name of three released tensors, one above the other."""


def read(path: Path, *, genes: Path | None) -> Released:
    """Read a released Geneformer, V1 or V2.

    Parameters
    ----------
    path
        The folder, or the file of weights in it.
    genes
        The token dictionary, or the folder of it; by default it lies in the model's folder. The median dictionary lies
        beside it, and is named as it is but for ``gene_median`` in the place of ``token``.

    Raises
    ------
    CellmillError
        As `cellmill.released.read_released`; also if weights and dictionaries are of different versions.
    """
    weights = _weights(path)
    config = _config(weights.with_name("config.json"))
    dictionary = _token_dictionary(genes or weights.parent)
    version, feature_ids = _genes(dictionary)
    medians_V, remarks = _medians(dictionary, feature_ids)
    tensors = state_dict_of(
        read_safetensors(weights) if weights.suffix == ".safetensors" else read_torch(weights), weights
    )
    tensors = strip(tensors, "module.")
    _check_rows(tensors, config, weights, version, len(feature_ids), dictionary)

    sizes = Geneformer.Sizes(version=version, **{ours: config[theirs] for ours, theirs in SIZES.items()})
    if config[ATTENTION_DROPOUT] not in (None, sizes.dropout):
        sizes = replace(sizes, attention_dropout=config[ATTENTION_DROPOUT])
    unknown_V = torch.full_like(medians_V, torch.nan)
    statistics = GeneStatistics(
        nonzero_cells=medians_V.isfinite().long(),
        median_nonzero_cp10k=medians_V,
        mean_log1p_cp10k=unknown_V,
        std_log1p_cp10k=unknown_V,
    )
    check_depth(sizes.n_layers, tensors, weights)
    tensors = _tied(_join_qkv(tensors, sizes.n_layers, weights), weights)
    names = _names(sizes.n_layers)
    model = build(lambda: Geneformer(sizes, len(feature_ids), statistics), lambda _: names, tensors, weights).eval()
    fill(model, tensors | {"medians": medians_V.nan_to_num()}, names | {"medians": "medians"}, weights)
    model.medians.copy_(medians_V)  # with the genes that have none
    tensors.pop(POSITION_IDS, None)
    return Released(model, feature_ids, remarks + ignored(tensors, names, weights))


def write(model: Geneformer, meta: dict, out: Path) -> None:
    """Write a Geneformer as its release: V1 with ``pytorch_model.bin``, V2 with ``model.safetensors``.

    Parameters
    ----------
    model, meta
        A checkpoint's model and its JSON; ``meta["feature_ids"]`` are the genes.
    out
        The folder. Its median dictionary leaves out genes without a median, so that Geneformer's own tokenizer, too,
        never makes tokens of them.

    Raises
    ------
    CellmillError
        If a file cannot be written.
    """
    sizes, version, feature_ids = model.sizes, model.sizes.version, meta["feature_ids"]
    tokens = {token: number for number, token in enumerate([*SPECIALS[version], *feature_ids])}
    medians = {
        gene: median for gene, median in zip(feature_ids, model.medians.tolist(), strict=True) if median == median
    }
    config = {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": len(tokens),
        **{theirs: getattr(sizes, ours) for ours, theirs in SIZES.items()},
        ATTENTION_DROPOUT: sizes.dropout_of_attention,
        "initializer_range": INIT_STD,
        **FIXED,
    }
    tensors = _released_tensors(model)
    with atomic(out / WEIGHTS[version]) as file:
        if version == "V2":
            save_file(tensors, file, metadata={"format": "pt"})
        else:  # as its time's transformers wrote it: what is tied stands there again
            tensors[POSITION_IDS] = torch.arange(sizes.max_length)[None]
            tensors[f"{DECODER}.weight"] = tensors[f"{EMBEDDINGS}.word_embeddings.weight"]
            tensors[f"{DECODER}.bias"] = tensors[f"{HEAD}.bias"]
            torch.save(tensors, file)
    for name, content in (("token_dictionary", tokens), ("gene_median_dictionary", medians)):
        with atomic(out / f"{name}{SUFFIX[version]}.pkl") as file:
            file.write_bytes(pickle.dumps(content))
    with atomic(out / "config.json") as file:
        file.write_text(json.dumps(config, indent=2))


def _weights(path: Path) -> Path:
    if path.is_file():
        return path
    for name in WEIGHTS.values():
        if (path / name).is_file():
            return path / name
    raise CellmillError(
        f"{path} holds no {' and no '.join(WEIGHTS.values())}; give the folder of a released Geneformer"
    )


def _config(path: Path) -> dict:
    """The settings of `SIZES` and `ATTENTION_DROPOUT`, checked, and ``vocab_size`` where the file has it."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CellmillError(f"{path} holds no settings; give the published file")
    config = {"hidden_act": None} | config
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise CellmillError(
                f"{path}: {name} is {config[name]!r}, a Geneformer's is {value!r}; give the folder of a Geneformer"
            )
    config = {"hidden_dropout_prob": 0.02, ATTENTION_DROPOUT: None} | config
    for name in (*SIZES.values(), ATTENTION_DROPOUT):
        value = config.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        share = isinstance(value, int | float) and 0 <= value < 1
        as_hidden = name == ATTENTION_DROPOUT and value is None
        if not (share or as_hidden if name in DROPOUTS else whole):
            raise CellmillError(f"{path}: {name} is {value!r}; give the config.json of the same release as the weights")
    return config


def _token_dictionary(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(
        file for file in path.glob("*token_dictionary*") if file.name.endswith((".pkl", ".json", ".json.gz"))
    )
    if len(found) != 1:
        names = (
            f"several token dictionaries ({', '.join(file.name for file in found)})" if found else "no token dictionary"
        )
        raise CellmillError(f"{path} holds {names}; give the path of the one that belongs to the weights as 'genes'")
    return found[0]


def _genes(path: Path) -> tuple[str, list[str]]:
    """Version and genes of a token dictionary."""
    tokens = read_dictionary(path)
    if not all(isinstance(token, str) and type(number) is int for token, number in tokens.items()):
        raise CellmillError(f"{path} does not map genes to whole numbers; give the published token dictionary")
    ordered = sorted(tokens, key=tokens.get)
    n_specials = sum(token.startswith("<") for token in ordered)
    version = "V2" if n_specials > len(SPECIALS["V1"]) else "V1"
    fits = ordered[:n_specials] == SPECIALS[version] and sorted(tokens.values()) == list(range(len(tokens)))
    if not fits or len(ordered) == n_specials:
        raise CellmillError(
            f"{path} is no token dictionary of Geneformer: its ids are to be 0, 1, 2, ..., first those of "
            f"{' '.join(SPECIALS['V1'])} (V1) or {' '.join(SPECIALS['V2'])} (V2), "
            "then the genes; give the published file"
        )
    return version, ordered[n_specials:]


def _medians(dictionary: Path, feature_ids: list[str]) -> tuple[Tensor, list[str]]:
    """float32 [V], the medians beside a token dictionary, NaN for a gene without one; and a remark on those."""
    if "token_dictionary" not in dictionary.name:
        raise CellmillError(
            f"{dictionary} is not named *token_dictionary*, so its medians cannot be found; rename both"
        )
    path = dictionary.with_name(dictionary.name.replace("token_dictionary", "gene_median_dictionary"))
    medians = read_dictionary(path)
    values = [medians.get(gene, math.nan) for gene in feature_ids]
    if not all(isinstance(value, int | float) and (value != value or 0 < value < math.inf) for value in values):
        raise CellmillError(f"{path} holds medians that are no positive numbers; give the published file")
    medians_V = torch.tensor(values, dtype=torch.float32)
    n_without = int(medians_V.isnan().sum())
    if n_without == len(values):
        raise CellmillError(f"{path} holds no median of a gene of {dictionary.name}; take both from one release")
    remark = f"{path.name}: {n_without} of {len(values)} genes have no median and are never tokens"
    return medians_V, [remark] if n_without else []


def _check_rows(tensors: dict, config: dict, where: Path, version: str, n_genes: int, dictionary: Path) -> None:
    """`CellmillError` unless weights, config and dictionary have the same number of tokens."""
    n_tokens = n_genes + len(SPECIALS[version])
    table = tensors.get(f"{EMBEDDINGS}.word_embeddings.weight")
    rows = n_tokens if table is None or not table.ndim else len(table)  # missing or a number: `build` says so
    if rows != n_tokens:
        of_weights = PUBLISHED_ROWS.get(rows) or PUBLISHED_LENGTHS.get(config["max_position_embeddings"])
        if rows - n_genes in (2, 4):
            of_weights = {2: "V1", 4: "V2"}[rows - n_genes]
        if of_weights and of_weights != version:
            raise CellmillError(
                f"{where} holds {of_weights} weights ({rows:,} tokens) and {dictionary} is a {version} dictionary "
                f"({n_tokens:,} tokens); give the {of_weights} dictionaries"
            )
        raise CellmillError(
            f"{where} has {rows:,} tokens and {dictionary} names {n_tokens:,}; give the dictionaries of its own release"
        )
    if config.get("vocab_size", rows) != rows:
        raise CellmillError(
            f"{where} has {rows:,} tokens and its config.json says {config['vocab_size']}; take both from one release"
        )


def _join_qkv(tensors: dict[str, Tensor], n_layers: int, where: Path) -> dict[str, Tensor]:
    """Query, key and value as one tensor each layer."""
    tensors = dict(tensors)
    for layer in range(n_layers):
        for kind in ("weight", "bias"):
            parts = _qkv(layer, kind)
            if not all(part in tensors for part in parts):
                continue  # `fill` names what is missing
            if len({tensors[part].shape for part in parts}) > 1:
                raise CellmillError(f"{where}: {', '.join(parts)} have different shapes; take weights of one release")
            tensors[QKV.format(_layer(layer), kind)] = torch.cat([tensors.pop(part) for part in parts])
    return tensors


def _tied(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Without the decoder, which repeats the token embedding and the head's bias."""
    tensors = dict(tensors)
    if f"{DECODER}.bias" in tensors:
        tensors.setdefault(f"{HEAD}.bias", tensors[f"{DECODER}.bias"])
    for again, once in (
        (f"{DECODER}.weight", f"{EMBEDDINGS}.word_embeddings.weight"),
        (f"{DECODER}.bias", f"{HEAD}.bias"),
    ):
        tensor = tensors.pop(again, None)
        if tensor is not None and once in tensors and not torch.equal(tensor, tensors[once]):
            raise CellmillError(f"{where}: {again} is not {once}, as it is in a Geneformer; give the published file")
    return tensors


def _released_tensors(model: Geneformer) -> dict[str, Tensor]:
    """The model's tensors under their released names, tied ones once."""
    own = model_tensors(model)
    tensors = {}
    for name, released in _names(model.sizes.n_layers).items():
        tensor = own[name].cpu()
        if ".attention.qkv." not in name:
            tensors[released] = tensor.contiguous()
            continue
        layer, kind = name.split(".")[1], name.split(".")[-1]
        for part, third in zip(_qkv(layer, kind), tensor.chunk(3), strict=True):
            tensors[part] = third.clone()
    return tensors


def _names(n_layers: int) -> dict[str, str]:
    """The released name of each of our tensors but the medians."""
    names = {f"{table}.weight": f"{EMBEDDINGS}.{table}.weight" for table in _TABLES} | {"head_bias": f"{HEAD}.bias"}
    modules = {
        "embedding_norm": f"{EMBEDDINGS}.LayerNorm",
        "head_transform": f"{HEAD}.transform.dense",
        "head_norm": f"{HEAD}.transform.LayerNorm",
    }
    for layer in range(n_layers):
        ours, theirs = f"layers.{layer}", _layer(layer)
        modules |= {f"{ours}.{name}": f"{theirs}.{released}" for name, released in _PARTS.items()}
        names |= {f"{ours}.attention.qkv.{kind}": QKV.format(theirs, kind) for kind in ("weight", "bias")}
    return names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_PARTS = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def _layer(number: int | str) -> str:
    return f"bert.encoder.layer.{number}"


def _qkv(layer: int | str, kind: str) -> list[str]:
    return [f"{_layer(layer)}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
