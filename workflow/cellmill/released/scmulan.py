"""scMulan's released checkpoint: ``ckpt_scMulan.pt`` (settings and weights) and ``meta_info.pt`` (genes and words).

``meta_info`` may also be JSON (``meta_info.json``, ``.json.gz``). The settings are those of ``model_args``; the words
of a column are told by the sets of meta_info, in which the organs, cell types (fine and coarse), ages, states, regions,
technologies and sexes stand. Genes are symbols.
"""

from pathlib import Path

import torch

from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.scmulan import N_TASKS, Scmulan
from cellmill.released.files import (
    Released,
    build,
    check_depth,
    fill,
    ignored,
    read_json,
    read_torch,
    state_dict_of,
    strip,
)
from cellmill.views.scmulan import N_BINS

WEIGHTS, META = "ckpt_scMulan.pt", "meta_info.pt"
META_NAMES = (META, "meta_info.json", "meta_info.json.gz")
FIRST, PCT = "<E>", "<PCT>"
SPARES = [f"<SPToken{i}>" for i in range(1, N_TASKS)]
SETS = {
    "tissue_general": ("organ",),
    "cell_type": ("cell_type", "MCT"),
    "development_stage": ("age_bin",),
    "disease": ("sample_status",),
    "tissue": ("region",),
    "assay": ("seq_tech",),
    "sex": ("donor_gender",),
}
"""For each obs column, in the order of the tokens, the sets of meta_info that hold its words."""
UNUSED_SETS = ("study_id", "donor_age")
"""What meta_info also lists, and no token stands for."""
ARGUMENTS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


def read(path: Path, *, genes: Path | None = None) -> Released:
    """Read the released model.

    Parameters
    ----------
    path
        ``ckpt_scMulan.pt``, or its folder.
    genes
        ``meta_info`` as torch file or JSON; by default the one beside the weights.

    Raises
    ------
    CellmillError
        If a file is missing, damaged, foreign or malicious, or does not fit the other.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    where = genes or next((p for name in META_NAMES if (p := weights.with_name(name)).exists()), None)
    if where is None:
        raise CellmillError(f"{weights.parent} holds no {' or '.join(META_NAMES)}; lay the published one beside it")
    names, categories = _vocabulary(read_json(where) if ".json" in where.name else read_torch(where), where)
    arguments, tensors = _content(read_torch(weights), weights)
    check_depth(arguments["n_layer"], tensors, weights)
    sizes = _sizes(arguments, len(names), weights)
    n_tokens = 1 + len(names) + sum(map(len, categories.values())) + N_TASKS
    if arguments["vocab_size"] != n_tokens:
        raise CellmillError(
            f"{weights} has {arguments['vocab_size']} tokens and {where} {n_tokens}; take both of one release"
        )
    model = build(lambda: Scmulan(sizes, len(names), categories=categories), _names, tensors, weights)
    released = _names(model)
    genes_of_ours = {"token_V": model.token_V}  # no tensor of the release: every gene is a word, in order
    fill(model, tensors | genes_of_ours, released | {"token_V": "token_V"}, weights)
    return Released(model.eval(), names, ignored(tensors, released, weights))


def write(model: Scmulan, meta: dict, out: Path) -> None:
    """Write a model as ``ckpt_scMulan.pt`` and ``meta_info.pt`` into `out`.

    The genes are those of ``meta["feature_ids"]`` that are words of the model. All cell types stand in the set of fine
    ones; a value that an earlier column has, too, is written with its column in front, as tokens are unique.
    """
    from cellmill.checkpoints import model_tensors

    sizes, own = model.sizes, model_tensors(model)
    content = {
        "model_args": {
            "block_size": sizes.max_length,
            "vocab_size": model.n_tokens,
            "n_layer": sizes.n_layers,
            "n_head": sizes.n_heads,
            "n_embd": sizes.width,
            "dropout": sizes.dropout,
            "bias": False,
            "expression_level": N_BINS,
            "ele": 1,
            "train_mode": "pretrain",
        },
        "model": {released: own[name].cpu().clone() for name, released in _names(model).items()},
    }
    gene_T = model.gene_T()[1 : 1 + model.n_gene_words].tolist()
    genes = [meta["feature_ids"][gene] if gene >= 0 else f"<no gene {i}>" for i, gene in enumerate(gene_T, 1)]
    tokens, words = [FIRST, *genes], {}
    for column in SETS:
        for value in model.categories.get(column, []):
            word = f"{column}: {value}" if value in tokens else value
            words.setdefault(column, []).append(word)
            tokens.append(word)
    description = {
        **{name: set() for names in SETS.values() for name in names},
        **{name: set() for name in UNUSED_SETS},
        **{SETS[column][0]: set(values) for column, values in words.items()},
        "gene_set": genes,
        "token_set": [*tokens, PCT, *SPARES],
        "data_block_size": sizes.max_length,
    }
    for name, data in ((WEIGHTS, content), (META, description)):
        with atomic(out / name) as temporary:
            torch.save(data, temporary)


def _vocabulary(meta, where: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The genes, and the words of each column, of meta_info."""
    wanted = ("gene_set", "token_set", *(name for names in SETS.values() for name in names))
    missing = [name for name in wanted if not isinstance(meta, dict) or name not in meta]
    if missing:
        raise CellmillError(
            f"{where} is no meta_info of scMulan: it lacks {', '.join(missing)}; give the published one"
        )
    no_lists = [name for name in wanted if not isinstance(meta[name], list | tuple | set)]
    if no_lists:
        raise CellmillError(f"{where}: {no_lists[0]} is no list of words; give the published meta_info")
    genes, tokens = meta["gene_set"], meta["token_set"]
    for name, words in (("gene_set", genes), ("token_set", tokens)):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise CellmillError(f"{where}: {name} is no list of words; give the published meta_info")
        if len(set(words)) < len(words):
            raise CellmillError(f"{where}: {name} holds a word twice; give the published meta_info")
    if tokens[: 1 + len(genes)] != [FIRST, *genes] or tokens[-N_TASKS : -N_TASKS + 1] != [PCT] or not genes:
        raise CellmillError(
            f"{where}: its tokens are not {FIRST}, the genes, the words, {PCT} and {N_TASKS - 1} spare ones; "
            "it is of another version of scMulan, give the published one"
        )
    categories, columns = {column: [] for column in SETS}, iter(SETS)
    column = next(columns)
    for word in tokens[1 + len(genes) : -N_TASKS]:
        while not any(word in meta[name] for name in SETS[column]):
            column = next(columns, None)
            if column is None:
                raise CellmillError(
                    f"{where}: the word '{word}' stands in none of the lists {', '.join(wanted[2:])} where its place "
                    "among the tokens says; give the published meta_info"
                )
        categories[column].append(word.removeprefix(f"{column}: "))
    return genes, categories


def _content(content, weights: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The settings and the tensors of the weights' file."""
    if not isinstance(content, dict) or not isinstance(content.get("model_args"), dict) or "model" not in content:
        raise CellmillError(f"{weights} holds no model_args and model; give the published {WEIGHTS}")
    arguments = content["model_args"]
    missing = [name for name in ARGUMENTS if type(arguments.get(name)) is not int]
    if missing:
        raise CellmillError(f"{weights}: model_args lacks {', '.join(missing)}; give the published {WEIGHTS}")
    if arguments.get("bias", False) or arguments.get("expression_level", N_BINS) != N_BINS:
        raise CellmillError(
            f"{weights} is of another scMulan: its model_args say bias={arguments.get('bias')} and "
            f"expression_level={arguments.get('expression_level')}, but the published one has no biases and "
            f"{N_BINS} levels; give the published {WEIGHTS}"
        )
    tensors = strip(state_dict_of(content["model"], weights), "_orig_mod.", "module.")
    # settings that do not name `bias` mean biases to the released code; its causal mask, `attn.bias`, is no such vector
    biases = [name for name, tensor in tensors.items() if name.endswith(".bias") and tensor.ndim == 1]
    if biases:
        raise CellmillError(
            f"{weights} is of another scMulan: it holds {len(biases)} biases (the first is {biases[0]}), and the "
            f"published one has none; give the published {WEIGHTS}"
        )
    return arguments, tensors


def _sizes(arguments: dict, n_genes: int, weights: Path) -> Scmulan.Sizes:
    """The sizes of the settings."""
    numbers = {"n_layers": "n_layer", "width": "n_embd", "n_heads": "n_head", "max_length": "block_size"}
    sizes = {size: arguments[name] for size, name in numbers.items()}
    dropout = arguments.get("dropout", 0.0)
    possible = isinstance(dropout, int | float) and 0 <= dropout < 1
    if not possible or min(sizes.values()) < 1 or sizes["width"] % sizes["n_heads"]:
        shown = ", ".join(f"{name} {value!r:.40}" for name, value in (sizes | {"dropout": dropout}).items())
        raise CellmillError(f"{weights}: model_args are impossible ({shown}); give the published {WEIGHTS}")
    return Scmulan.Sizes(**sizes, n_model_genes=n_genes, dropout=float(dropout), unprompted=0.0)


def _names(model: Scmulan) -> dict[str, str]:
    """The released name of each of the model's parameters."""
    names = {
        "word_embedding.weight": "transformer.wte.weight",
        "value_embedding.weight": "transformer.wee.weight",
        "norm.weight": "transformer.ln_f.weight",
        "entity_head.weight": "lm_head.weight",
        "value_head.weight": "epx_head.weight",
    }
    parts = {
        "norm1": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "norm2": "ln_2",
        "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj",
    }
    for i in range(len(model.layers)):
        for ours, theirs in parts.items():
            names[f"layers.{i}.{ours}.weight"] = f"transformer.h.{i}.{theirs}.weight"
    return names
