"""A trained model on disk: ``checkpoint.safetensors`` (weights) and ``checkpoint.json`` (all else), never a pickle.

The JSON is written last and holds the weights' SHA-256, so a pair that does not belong together is noticed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cellmill import __version__
from cellmill.errors import CellmillError
from cellmill.files import atomic, sha256
from cellmill.models import load_architecture, resolve_sizes
from cellmill.models.base import CellModel, GeneStatistics, parameter_counts
from cellmill.recipes import ModelRecipe

WEIGHTS = "checkpoint.safetensors"
META = "checkpoint.json"


def build_model(recipe: ModelRecipe, n_genes: int, statistics: GeneStatistics | None, seed: int) -> CellModel:
    """The architecture with freshly drawn weights, on the CPU.

    The weights depend on the recipe, `n_genes` and `seed` alone: built again with the same seed, this is the untrained
    twin of a trained model. The CPU's random state is left as it was.

    Raises
    ------
    CellmillError
        If the architecture, its preset or one of its sizes is unknown or impossible.
    """
    architecture = load_architecture(recipe.architecture)
    sizes = resolve_sizes(architecture, recipe.preset, recipe.sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture(sizes, n_genes, statistics)


def vocabulary_hash(feature_ids: list[str]) -> str:
    """SHA-256 of the ordered gene ids, as `cellmill.vocabulary.Vocabulary.hash` and the shards' manifest."""
    return hashlib.sha256("\n".join(feature_ids).encode()).hexdigest()


def model_tensors(model: CellModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    repeated = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    repeated -= {name for name, _ in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in repeated}


def fill_model(model: CellModel, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy `tensors` into the model; names and shapes must be the model's own."""
    own = model_tensors(model)
    unlike = sorted(own.keys() ^ tensors.keys())
    unlike += sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
    if unlike:
        raise CellmillError(
            f"{where} does not fit the architecture ({len(unlike)} tensors differ, the first is '{unlike[0]}'); "
            "it was written by another version of the model, so train it again"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors of any device as safetensors; the same tensors give the same bytes."""
    path.write_bytes(save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))


def save_checkpoint(folder: Path, model: CellModel, meta: dict) -> None:
    """Write a model's weights and description into `folder`.

    Parameters
    ----------
    folder
        Gets ``checkpoint.safetensors`` and ``checkpoint.json``; either is whole or absent, whatever happens.
    model
        The model.
    meta
        JSON-like provenance. ``meta["recipe"]`` (a `ModelRecipe` as a dict) and ``meta["feature_ids"]`` (the
        vocabulary's ordered gene ids) are required; sizes, parameter counts, hashes and cellmill's version are added.

    Raises
    ------
    CellmillError
        If the vocabulary is not as long as the model's, or a file cannot be written.
    """
    if len(meta["feature_ids"]) != model.n_genes:
        raise CellmillError(
            f"{folder}: the vocabulary has {len(meta['feature_ids'])} genes and the model {model.n_genes}; "
            "give the vocabulary that the shards were made with"
        )
    weights = Path(folder) / WEIGHTS
    with atomic(weights) as path:
        write_tensors(model_tensors(model), path)
    content = {
        "format": 1,
        "cellmill_version": __version__,
        **meta,
        "sizes": dataclasses.asdict(model.sizes),
        "n_genes": model.n_genes,
        "categories": model.categories,
        "parameters": parameter_counts(model),
        "vocabulary_hash": vocabulary_hash(meta["feature_ids"]),
        "weights_sha256": sha256(weights),
    }
    with atomic(Path(folder) / META) as path:
        path.write_text(json.dumps(content, indent=1))


def load_checkpoint(folder: Path) -> tuple[CellModel, dict]:
    """Read a model back, in evaluation mode on the CPU, with its description.

    Raises
    ------
    CellmillError
        If a file is missing, truncated, or does not fit the other or the architecture.
    """
    weights, description = Path(folder) / WEIGHTS, Path(folder) / META
    for path in (weights, description):
        if not path.is_file():
            raise CellmillError(f"{path} does not exist; train the model first, or name the folder of a checkpoint")
    try:
        meta = json.loads(description.read_text())
        recipe, sizes, n_genes = meta["recipe"], meta["sizes"], meta["n_genes"]
        feature_ids, expected, digest = meta["feature_ids"], meta["vocabulary_hash"], meta["weights_sha256"]
        architecture = recipe["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise CellmillError(f"{description} is damaged ({error}); delete the folder and train again") from error
    if len(feature_ids) != n_genes or vocabulary_hash(feature_ids) != expected:
        raise CellmillError(f"{description}: the gene ids are not those of its vocabulary hash; train the model again")
    if sha256(weights) != digest:
        raise CellmillError(f"{weights} is truncated or not the file that {META} describes; train the model again")
    kind = load_architecture(architecture)
    try:
        model = kind(kind.Sizes(**sizes), n_genes, categories=meta.get("categories"))
        tensors = load_file(weights)
    except (TypeError, SafetensorError) as error:
        raise CellmillError(f"{folder} cannot be read as a {architecture} ({error}); train the model again") from error
    fill_model(model, tensors, str(weights))
    return model.eval(), meta
