"""scFoundation's released layout: ``models.ckpt`` and the list of its genes, in and out.

The file (biomap-research/scFoundation) holds three networks of one shape under `SUB_MODELS`: ``gene`` (gene context
embeddings), ``cell`` (cell embeddings) and ``rde`` (read-depth enhancement), each with its config and a state_dict.
Write the one you want after the file's name, as in ``models.ckpt#rde``; by default it is ``cell``. The genes are
symbols, in ``OS_scRNA_gene_index.19264.tsv`` (columns gene_name, index), which is given, or lies beside the weights or
in the folder above.
"""

import math
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models import resolve_sizes
from cellmill.models.scfoundation import Scfoundation
from cellmill.released.files import Released, build, check_depth, fill, ignored, read_bytes, read_torch, state_dict_of
from cellmill.views import scfoundation as views

WEIGHTS = "models.ckpt"
SUB_MODELS = ("cell", "gene", "rde")
"""The first is the default."""
GENES = "OS_scRNA_gene_index.*.tsv*"
ARCHITECTURE = "mae_autobin"
SENTINELS = {"n_class": 104, "pad_token_id": 103, "mask_token_id": 102, "cell_token_id": 101}
"""Values that stand for padding and the mask in the released code's input; ours marks both by position."""
OWN = "cellmill"
"""Where an exported config holds the sizes that the layout has no place for; the released code does not read it."""
OWN_SIZES = ("max_length", "dropout", "attention_dropout", "redraw_every", "released_depth_tokens", "embedding_depth")
ONE_LAYER = {
    "encoder.{}.attention.qkv.weight": "encoder.transformer_encoder.{}.self_attn.in_proj_weight",
    "encoder.{}.attention.qkv.bias": "encoder.transformer_encoder.{}.self_attn.in_proj_bias",
    "encoder.{}.attention.out": "encoder.transformer_encoder.{}.self_attn.out_proj",
    "encoder.{}.linear1": "encoder.transformer_encoder.{}.linear1",
    "encoder.{}.linear2": "encoder.transformer_encoder.{}.linear2",
    "encoder.{}.norm1": "encoder.transformer_encoder.{}.norm1",
    "encoder.{}.norm2": "encoder.transformer_encoder.{}.norm2",
    "decoder.{}.attention.qkv": "decoder.performer.net.layers.{}.0.fn.to_qkv",
    "decoder.{}.attention.out": "decoder.performer.net.layers.{}.0.fn.to_out",
    "decoder.{}.projection": "decoder.performer.net.layers.{}.0.fn.fast_attention.projection_matrix",
    "decoder.{}.norm1": "decoder.performer.net.layers.{}.0.norm",
    "decoder.{}.norm2": "decoder.performer.net.layers.{}.1.norm",
    "decoder.{}.linear1": "decoder.performer.net.layers.{}.1.fn.fn.w1",
    "decoder.{}.linear2": "decoder.performer.net.layers.{}.1.fn.fn.w2",
}
"""Our names to the released ones; ``to_qkv`` stands for ``to_q``, ``to_k`` and ``to_v``, one below the other."""
REST = {
    "value_embedding.linear1": "token_emb.mlp",
    "value_embedding.linear2": "token_emb.mlp2",
    "value_embedding.bins": "token_emb.emb",
    "value_embedding.mask": "token_emb.emb_mask",
    "value_embedding.pad": "token_emb.emb_pad",
    "gene_embedding": "pos_emb",
    "encoder_norm": "encoder.norm",
    "to_decoder": "decoder_embed",
    "decoder_norm": "decoder.norm",
    "final_norm": "norm",
    "head": "to_final",
    "steps_since_redraw": "decoder.performer.calls_since_last_redraw",
}


def read(path: Path, *, genes: Path | None = None) -> Released:
    """Read one of the networks of a released ``models.ckpt``.

    Its random features are part of it: they are never drawn again (``redraw_every`` 0), also if it is trained on.

    Parameters
    ----------
    path
        The file, or its folder; ``#gene``, ``#cell`` or ``#rde`` behind it picks the network.
    genes
        The list of genes; by default the one beside the weights.

    Raises
    ------
    CellmillError
        If a file is missing, damaged, of another layout or could run code, or does not fit the other.
    """
    file, part = _file_and_part(Path(path))
    content, remarks = _sub_model(read_torch(file), part, file)
    tensors = state_dict_of(content.get("state_dict"), file)
    tensors = _join({name.partition("model.")[2] or name: tensor for name, tensor in tensors.items()}, file)
    overrides, settings = _sizes(content.get("config"), tensors, file)
    feature_names = _read_genes(_find_genes(file) if genes is None else genes)
    n_rows = tensors["pos_emb.weight"].shape[0]
    if n_rows != len(feature_names) + 3:
        raise CellmillError(
            f"{file} embeds {n_rows - 3} genes and the list of genes has {len(feature_names)}; give the list of the "
            "same release (genes)"
        )
    own = {"max_length": len(feature_names) + 2, "redraw_every": 0}
    own |= {name: settings[name] for name in OWN_SIZES if name in settings}
    sizes = resolve_sizes(Scfoundation, "published", overrides | own)
    check_depth(sizes.n_layers + sizes.decoder_layers, tensors, file)
    model = build(lambda: Scfoundation(sizes, len(feature_names)), _names, tensors, file)
    names = _names(model)
    fill(model, tensors, names, file)
    unused = sorted(name for name in tensors.keys() - set(names.values()) if name.startswith(("encoder.", "decoder.")))
    if unused:
        raise CellmillError(
            f"{file} has {len(unused)} tensors of encoder and decoder that its config has no place for (the first "
            f"is {unused[0]}); take weights and config of one release"
        )
    return Released(model.eval(), feature_names, remarks + ignored(tensors, names, file))


def write(model: Scfoundation, meta: dict, out: Path) -> None:
    """Write a model as ``models.ckpt`` and its genes as ``OS_scRNA_gene_index.V.tsv`` into the folder `out`.

    The released code asks for one of three networks by name; the model stands under all three, stored once.

    Parameters
    ----------
    model
        Of random-feature attention: the layout has no other.
    meta
        The content of ``checkpoint.json``.
    out
        The folder.

    Raises
    ------
    CellmillError
        If the model has a size that the released code cannot be told, or a file cannot be written.
    """
    _check_exportable(model)
    own = model_tensors(model)
    tensors = {released: own[name].cpu() for name, released in _names(model).items()}
    content = {
        "config": _config(model),
        "state_dict": {f"model.{name}": tensor for name, tensor in _split(tensors).items()},
    }
    genes = [f"{name}\t{index}\n" for index, name in enumerate(meta["feature_ids"])]
    with atomic(out / WEIGHTS) as path:
        torch.save(dict.fromkeys(SUB_MODELS, content), path)
    with atomic(out / GENES.replace("*", str(model.n_genes), 1).rstrip("*")) as path:
        path.write_text("".join(["gene_name\tindex\n", *genes]))


def _check_exportable(model: Scfoundation) -> None:
    """`CellmillError` unless the released code, which fixes some sizes, would compute the same."""
    sizes = model.sizes
    if sizes.decoder_attention != "performer":
        raise CellmillError(
            "scFoundation's layout has no dense decoder; train with decoder_attention: performer to export the model"
        )
    head = sizes.decoder_width // sizes.decoder_heads
    fixed = {
        "hidden": (sizes.hidden, 4 * sizes.width),
        "decoder_hidden": (sizes.decoder_hidden, 4 * sizes.decoder_width),
        "n_features": (sizes.features, int(head * math.log(head))),
    }
    unlike = [f"{name} is {own}, not {theirs}" for name, (own, theirs) in fixed.items() if own != theirs]
    if unlike:
        raise CellmillError(
            f"scFoundation's own code cannot run this model as it was trained: {', '.join(unlike)}; train with these "
            "sizes to export it"
        )


def _file_and_part(path: Path) -> tuple[Path, str | None]:
    """The file, and the network that is asked for behind a #."""
    name, mark, part = path.name.rpartition("#")
    part = part if mark and not path.exists() else None
    file = path.with_name(name) if part is not None else path
    return file / WEIGHTS if file.is_dir() else file, part


def _sub_model(content, part: str | None, file: Path) -> tuple[dict, list[str]]:
    if not isinstance(content, dict):
        raise CellmillError(f"{file} holds no dictionary of networks; give the published models.ckpt")
    if "state_dict" in content and part is None:
        return content, [f"{file.name}: it holds one network, not {', '.join(SUB_MODELS)}"]
    part = part or SUB_MODELS[0]
    if not isinstance(content.get(part), dict):
        found = [name for name in content if name in SUB_MODELS] or ["none"]
        raise CellmillError(
            f"{file} holds no network '{part}' (found: {', '.join(found)}); write one of "
            f"{', '.join(SUB_MODELS)} behind the file's name, as in {WEIGHTS}#rde"
        )
    return content[part], []


def _sizes(config, tensors: dict[str, Tensor], file: Path) -> tuple[dict, dict]:
    """Our sizes from the released config, and from shapes where it is silent; then those that only we write."""
    try:
        kind = config["model"]
        # as the released code: settings of the data stand beside the model's, and win
        settings = config["model_config"][kind] | config.get("dataset_config", {}).get("rnaseq", {})
        encoder, decoder = settings["encoder"], settings["decoder"]
        modules = (kind, encoder["module_type"], decoder["module_type"])
        sizes = {
            **{"n_layers": encoder["depth"], "width": encoder["hidden_dim"], "n_heads": encoder["heads"]},
            **{"decoder_layers": decoder["depth"], "decoder_width": decoder["hidden_dim"]},
            **{"decoder_heads": decoder["heads"], "n_bins": settings["bin_num"]},
            "bin_alpha": float(settings["bin_alpha"]),
        }
        own = dict(settings.get(OWN, {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CellmillError(
            f"{file}: its config is not that of an {ARCHITECTURE} ({type(error).__name__}: {error}); "
            "give the published models.ckpt"
        ) from error
    if modules != (ARCHITECTURE, "transformer", "performer"):
        raise CellmillError(
            f"{file} is a {' of '.join(map(str, modules))}, and only {ARCHITECTURE} of transformer and performer is "
            "scFoundation; give the published models.ckpt"
        )
    shapes = {
        "hidden": "encoder.transformer_encoder.0.linear1.weight",
        "decoder_hidden": "decoder.performer.net.layers.0.1.fn.fn.w1.weight",
        "n_features": "decoder.performer.net.layers.0.0.fn.fast_attention.projection_matrix",
    }
    for name in (*shapes.values(), "pos_emb.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise CellmillError(f"{file} lacks the tensor {name}, or it is no table; take the published models.ckpt")
    return sizes | {name: tensors[tensor].shape[0] for name, tensor in shapes.items()}, own


def _config(model: Scfoundation) -> dict:
    """The config as published, so far as the released code reads it."""
    sizes = model.sizes
    parts = {
        "encoder": ("transformer", sizes.width, sizes.n_layers, sizes.n_heads),
        "decoder": ("performer", sizes.decoder_width, sizes.decoder_layers, sizes.decoder_heads),
    }
    settings = {
        name: {"module_type": kind, "hidden_dim": width, "depth": depth, "heads": heads, "dim_head": width // heads}
        for name, (kind, width, depth, heads) in parts.items()
    }
    settings |= {"bin_num": sizes.n_bins, "bin_alpha": sizes.bin_alpha, "seq_len": model.n_positions, **SENTINELS}
    settings["model"] = ARCHITECTURE  # the released code keeps these settings alone, and asks them for the model
    settings[OWN] = {name: getattr(sizes, name) for name in OWN_SIZES}
    return {
        "model": ARCHITECTURE,
        "model_config": {ARCHITECTURE: settings},
        "dataset_config": {"rnaseq": {"value_mask_prob": views.NONZERO_RATE}},
    }


def _names(model: Scfoundation) -> dict[str, str]:
    """For each tensor of the model the released name, ``to_qkv`` joined."""
    layers = {"encoder": model.sizes.n_layers, "decoder": model.sizes.decoder_layers}
    modules = dict(REST)
    for own, released in ONE_LAYER.items():
        for number in range(layers[own.partition(".")[0]]):
            modules[own.format(number)] = released.format(number)
    names = {}
    for name in model_tensors(model):
        module, _, kind = name.rpartition(".")
        names[name] = modules[name] if name in modules else f"{modules[module]}.{kind}"
    return names


def _join(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Queries, keys and values of a decoder layer as one tensor."""
    joined = dict(tensors)
    for name in tensors:
        if ".to_q." in name:
            parts = [joined.pop(name.replace(".to_q.", f".to_{x}."), None) for x in "qkv"]
            if any(part is None for part in parts):
                raise CellmillError(f"{file} has {name} without its keys or values; it is incomplete, copy it again")
            if len({part.shape for part in parts}) > 1 or not parts[0].ndim:
                raise CellmillError(f"{file}: {name}, its keys and values have different shapes; copy it again")
            joined[name.replace(".to_q.", ".to_qkv.")] = torch.cat(parts)
    return joined


def _split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `_join` joined, as released."""
    split = {}
    for name, tensor in tensors.items():
        if ".to_qkv." in name:
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".to_qkv.", f".to_{x}.")] = part.clone()
        else:
            split[name] = tensor
    return split


def _find_genes(file: Path) -> Path:
    for folder in (file.parent, file.absolute().parent.parent):
        found = sorted(folder.glob(GENES))
        if len(found) == 1:
            return found[0]
        if found:
            raise CellmillError(f"{folder} holds {len(found)} lists of genes ({GENES}); name the one to use (genes)")
    raise CellmillError(f"no list of genes ({GENES}) lies beside {file}; name it (genes)")


def _read_genes(path: Path) -> list[str]:
    """Symbols in the order of their ids."""
    try:
        text = read_bytes(Path(path)).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CellmillError(f"the list of genes {path} cannot be read ({error}); give the published TSV") from error
    header, *rows = re.split(r"\r?\n", text.strip())
    rows = [row.split("\t") for row in rows]
    names = [row[0] for row in rows]
    in_order = [row[1:] for row in rows] == [[str(index)] for index in range(len(rows))]
    if header.split("\t") != ["gene_name", "index"] or not in_order or len(set(names)) != len(names):
        raise CellmillError(
            f"{path} is no list of genes: it must have the columns gene_name and index, the index counting 0, 1, 2, "
            "..., and no name twice; give the published TSV"
        )
    return names
