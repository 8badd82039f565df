"""Released scGPT weights: a folder of ``best_model.pt`` (a state_dict), ``args.json`` and ``vocab.json`` (gene to row).

The specials may stand anywhere in the vocabulary, and are appended where it has none, as the authors' code does. Here
the genes come first, by ascending row, then <pad>, <cls> and <eoc>; the model remembers the released rows of these
three (`Scgpt.special_ids`), so that the file is written back as it was. Several spellings of attention's input
projection exist (flash-attn's, torch's, and a wrapper's); the published one, ``Wqkv``, is written.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.scgpt import PAD_VALUE, Scgpt
from cellmill.released.files import Released, build, fill, ignored, read_dictionary, read_torch, state_dict_of, strip

WEIGHTS, SETTINGS, VOCABULARY = "best_model.pt", "args.json", "vocab.json"
SPECIALS = ("<pad>", "<cls>", "<eoc>")
EMBEDDING = "encoder.embedding.weight"
LAYERS = "transformer_encoder.layers."
CLASSIFIER_LAYERS = 3
NEEDED = {"embsize": "width", "nheads": "n_heads", "d_hid": "hidden", "nlayers": "n_layers"}
OPTIONAL = {
    "dropout": "dropout",
    "n_bins": "n_bins",
    "max_seq_len": "max_length",
    # not the authors' settings: what a checkpoint of ours holds beside them
    "released_gen_stream": "released_gen_stream",
    "cell_prompt_after": "cell_prompt_after",
    "attention_dropout": "attention_dropout",
}
ASSUMED = {"max_length": 1200, "released_gen_stream": True}
"""What the authors trained with, where the settings do not say."""
FIXED = {"input_emb_style": "continuous", "pad_value": PAD_VALUE, "n_layers_cls": CLASSIFIER_LAYERS}
"""Settings of which only one value can be read."""
BLOCKS = {
    "gene_embedding": "encoder.embedding",
    "gene_norm": "encoder.enc_norm",
    "value_encoder": "value_encoder",
    "flag_embedding": "flag_encoder",
    "decoder": "decoder.fc",
    "mvc_query": "mvc_decoder.gene2query",
    "mvc_weight": "mvc_decoder.W",
    "cls_decoder.6": "cls_decoder.out_layer",
    "cls_decoder": "cls_decoder._decoder",
}
"""Our names and the released ones, of modules outside the layers."""
LAYER_BLOCKS = {"attention.qkv.": "self_attn.Wqkv.", "attention.out.": "self_attn.out_proj."}


def read(path: Path, *, genes: Path | None = None) -> Released:
    """Read a released folder.

    Parameters
    ----------
    path
        The folder, or the weights in it.
    genes
        The vocabulary, if it is not the folder's ``vocab.json``.

    Raises
    ------
    CellmillError
        If a file is missing, damaged or malicious, the settings are of a variant that pretraining does not have, or
        weights, settings and vocabulary do not belong together.
    """
    folder, weights = (path.parent, path) if path.is_file() else (path, path / WEIGHTS)
    settings = read_dictionary(folder / SETTINGS)
    vocabulary = genes or folder / VOCABULARY
    names, rows, special_ids, remarks = _vocabulary(vocabulary)
    tensors = _one_spelling(state_dict_of(read_torch(weights), weights), weights)
    sizes = _sizes(settings, tensors, folder)
    embedding = tensors.get(EMBEDDING)
    n_rows = 0 if embedding is None or not embedding.ndim else len(embedding)
    if n_rows != len(rows):
        raise CellmillError(
            f"{weights} embeds {n_rows} tokens and {vocabulary} names {len(rows)}; take both from one release"
        )
    tensors[EMBEDDING] = tensors[EMBEDDING][rows]
    tensors["special_ids"] = special_ids
    model = build(lambda: Scgpt(sizes, len(names)), _used, tensors, weights).eval()
    used = _used(model)
    fill(model, tensors, used, weights)
    return Released(model, names, remarks + ignored(tensors, used, weights))


def write(model: Scgpt, meta: dict, out: Path) -> None:
    """Write a model as a released folder; ``meta["feature_ids"]`` become the names of its vocabulary."""
    genes, sizes = meta["feature_ids"], model.sizes
    if len(genes) != model.n_genes or len({*genes, *SPECIALS}) != len(genes) + len(SPECIALS):
        raise CellmillError(
            f"{out}: the checkpoint's {len(genes)} genes are not {model.n_genes} different names; train the model again"
        )
    special_ids = model.special_ids.cpu()
    rows = torch.cat([_gene_rows(len(genes), special_ids), special_ids])
    tensors = {
        _released_name(name): tensor.float().cpu().contiguous().clone()
        for name, tensor in model_tensors(model).items()
        if name != "special_ids"
    }
    tensors[EMBEDDING][rows] = tensors[EMBEDDING].clone()
    settings = {released: getattr(sizes, own) for released, own in (NEEDED | OPTIONAL).items()}
    settings |= FIXED | {"pad_token": SPECIALS[0], "mask_value": -1, "pad_value": int(PAD_VALUE)}
    vocabulary = dict(sorted(zip([*genes, *SPECIALS], rows.tolist(), strict=True), key=lambda entry: entry[1]))
    for name, content in ((SETTINGS, settings), (VOCABULARY, vocabulary)):
        with atomic(out / name) as path:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    with atomic(out / WEIGHTS) as path:
        torch.save(tensors, path)


def _vocabulary(path: Path) -> tuple[list[str], Tensor, Tensor, list[str]]:
    """Genes by ascending row; the rows of genes, then of the specials; those of the specials; remarks."""
    row_of, remarks = read_dictionary(path), []
    missing = [token for token in SPECIALS if token not in row_of]
    if missing:
        remarks.append(f"{path.name}: {', '.join(missing)} appended to its {len(row_of)} genes")
        row_of |= {token: len(row_of) + i for i, token in enumerate(missing)}
    if sorted(map(str, row_of.values())) != sorted(map(str, range(len(row_of)))):
        raise CellmillError(
            f"{path} does not number its {len(row_of)} tokens 0, 1, 2, ... once each; take the release's own"
        )
    special_ids = torch.tensor([row_of[token] for token in SPECIALS])
    names = sorted(row_of.keys() - set(SPECIALS), key=row_of.get)
    return names, torch.cat([_gene_rows(len(names), special_ids), special_ids]), special_ids, remarks


def _gene_rows(n_genes: int, special_ids: Tensor) -> Tensor:
    """int64 [V], the rows that are no special's, ascending."""
    is_gene = torch.ones(n_genes + len(SPECIALS), dtype=torch.bool)
    is_gene[special_ids] = False
    return is_gene.nonzero().flatten()


def _one_spelling(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Tensors by their published names."""
    spelled = {}
    for name, tensor in strip(tensors, "module.").items():
        name = name.replace("._impl.", ".")
        name = name.replace("self_attn.in_proj_weight", "self_attn.Wqkv.weight")
        name = name.replace("self_attn.in_proj_bias", "self_attn.Wqkv.bias")
        if name in spelled:
            raise CellmillError(f"{where} holds {name} twice, in two spellings; take the published file")
        spelled[name] = tensor
    return spelled


def _sizes(settings: dict, tensors: dict[str, Tensor], folder: Path) -> Scgpt.Sizes:
    """The sizes by the settings, and by the tensors where those do not say."""
    where = folder / SETTINGS
    unlike = [f"{key} {settings[key]!r}" for key, value in FIXED.items() if settings.get(key, value) != value]
    if unlike:
        only = ", ".join(f"{key} {value!r}" for key, value in FIXED.items())
        raise CellmillError(
            f"{where} is of a variant that cannot be read ({', '.join(unlike)}); take weights of pretraining ({only})"
        )
    wrong = [key for key in NEEDED if type(settings.get(key)) is not int or settings[key] < 1]
    if wrong:
        raise CellmillError(f"{where} does not say {', '.join(wrong)}; give the args.json of the release")
    n_layers = len({name[len(LAYERS) :].partition(".")[0] for name in tensors if name.startswith(LAYERS)})
    if n_layers != settings["nlayers"]:
        raise CellmillError(
            f"{where} says {settings['nlayers']} layers and {WEIGHTS} holds {n_layers}; take both from one release"
        )
    head = tensors.get(_released_name("cls_decoder.6.bias"))
    found = {own: settings[released] for released, own in (NEEDED | OPTIONAL).items() if released in settings}
    return Scgpt.Sizes(
        **ASSUMED | found,
        flag_embedding=_released_name("flag_embedding.weight") in tensors,
        n_classes=len(head) if head is not None and head.ndim else 1,
    )


def _used(model: Scgpt) -> dict[str, str]:
    """The released name of each of the model's tensors."""
    return {name: _released_name(name) for name in model_tensors(model)}


def _released_name(name: str) -> str:
    """The published name of a tensor of ours."""
    if name.startswith("layers."):
        name = LAYERS + name.removeprefix("layers.")
        for own, released in LAYER_BLOCKS.items():
            name = name.replace(own, released)
        return name
    block = next((block for block in BLOCKS if name.startswith(f"{block}.")), None)
    return name if block is None else BLOCKS[block] + name.removeprefix(block)
