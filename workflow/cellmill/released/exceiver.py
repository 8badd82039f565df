"""Exceiver's published layout: one Lightning checkpoint, without the list of its genes.

keiserlab/exceiver: ``state_dict`` and ``hyper_parameters``. The published weights were trained on a list of genes (in
the order of a Python set) and a standardiser, and neither was released. So `read` takes a text file beside them: the
ordered genes, one a line, or a table of tabs with the header ``gene mean std``, the mean and standard deviation of
log1p(CP10k) of each.
`write` gives both: ``exceiver.ckpt`` and ``genes.tsv``.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.exceiver import Exceiver, Sizes
from cellmill.released.files import Released, build, check_depth, fill, ignored, read_torch, state_dict_of

WEIGHTS, GENES = "exceiver.ckpt", "genes.tsv"
HEADER = ["gene", "mean", "std"]
LIGHTNING = "1.6.5"
PROTOTYPE = "process_self_attn.encoder_layer"
SETTINGS = {
    "seq_len": "number of genes",
    "seq_dim": "width of genes",
    "query_dim": "width of latents",
    "query_len": "number of latents",
    "num_layers": "number of layers",
    "nhead": "number of heads",
    "dim_feedforward": "width of the feed-forward network",
}
OURS = {"n_cross_heads": 4, "min_cells": 1, "n_mask": 0}
"""Settings that the authors' code has no names for, and what they are in its checkpoints; n_mask 0: not known."""
MAX_CELLS = 2**31
STATISTICS = ("mean", "std", "n_hidden")
"""Buffers of ours that the layout has no place for."""


def read(path: Path, *, genes: Path | None = None) -> Released:
    """The model of a Lightning checkpoint, in the mask mode of the released code.

    Parameters
    ----------
    path
        The ``.ckpt`` file.
    genes
        See the module. Without it genes are named by their rows. Where no mean and standard deviation are given they
        are 0 and 1: set those of your cells by `Exceiver.set_statistics`.

    Raises
    ------
    CellmillError
        If a file is missing, damaged or malicious, or the weights, the settings and the genes do not fit each other.
    """
    content = read_torch(path)
    settings = content.get("hyper_parameters") if isinstance(content, dict) else None
    missing = [name for name in SETTINGS if not isinstance(settings, dict) or not _is_size(settings.get(name))]
    if missing:
        raise CellmillError(
            f"{path} does not say its {SETTINGS[missing[0]]} (hyper_parameters.{missing[0]}); give the published "
            "Lightning checkpoint"
        )
    _complete(settings, path)
    if settings["seq_dim"] != settings["query_dim"]:
        raise CellmillError(
            f"{path} has genes of width {settings['seq_dim']} and latents of width {settings['query_dim']}; "
            "only equal widths, as published, can be read"
        )
    tensors = state_dict_of(content.get("state_dict"), path)
    check_depth(settings["num_layers"], tensors, path)
    sizes, n_genes = _sizes(settings, tensors), settings["seq_len"]
    remarks = _drop_class_query(tensors, n_genes, path)
    model = build(lambda: Exceiver(sizes, n_genes), tensor_names, tensors, path).eval()
    model.mean.zero_()
    model.std.fill_(1)
    names = tensor_names(model)
    own = {f"ours.{name}": model_tensors(model)[name] for name in STATISTICS}
    fill(model, tensors | own, names | {name: f"ours.{name}" for name in STATISTICS}, path)
    remarks += ignored(tensors, names, path)
    if genes is None:
        n_digits = len(str(model.n_genes))
        gene_names = [f"exceiver_row_{row:0{n_digits}d}" for row in range(model.n_genes)]
        remarks.append(
            f"{path.name}: the rows are not mapped to genes, since the published weights hold no list of them and its "
            "order is unknown; give the ordered list"
        )
    else:
        gene_names, standardiser = read_genes(genes, model.n_genes)
        if standardiser is not None:
            model.mean.copy_(standardiser[0])
            model.std.copy_(standardiser[1])
            model.n_hidden.fill_(settings["n_mask"])
            return Released(model, gene_names, remarks)
    remarks.append(
        f"{path.name}: log1p(CP10k) is not standardised (mean 0, standard deviation 1), since the weights hold no "
        "standardiser; give the genes' mean and std, best of the cells that are to be embedded"
    )
    return Released(model, gene_names, remarks)


def write(model: Exceiver, meta: dict, out: Path) -> None:
    """Write ``exceiver.ckpt`` and ``genes.tsv`` into `out`.

    A prototype layer that the model has not is zeros. The authors' code attends in the released mask mode, whatever
    the model was trained with; `read` finds the model's own in the settings.
    """
    own = model_tensors(model)
    tensors = {released: own[name].cpu() for name, released in tensor_names(model).items()}
    if model.prototype is None:
        first = "process_self_attn.transformer.layers.0"
        rest = [name for name in tensors if name.startswith(f"{first}.")]
        tensors |= {name.replace(first, PROTOTYPE): torch.zeros_like(tensors[name]) for name in rest}
    sizes = model.sizes
    settings = {
        "seq_len": model.n_genes,
        "seq_dim": sizes.width,
        "query_dim": sizes.width,
        "query_len": sizes.n_latents,
        "num_layers": sizes.n_layers,
        "nhead": sizes.n_heads,
        "dim_feedforward": sizes.hidden,
        "dropout": 0.0,
        "n_cross_heads": sizes.n_cross_heads,
        "min_cells": sizes.min_cells,
        "mask_mode": sizes.mask_mode,
        "n_mask": int(model.n_hidden),
    }
    out.mkdir(parents=True, exist_ok=True)
    with atomic(out / WEIGHTS) as file:
        content = {"pytorch-lightning_version": LIGHTNING, "state_dict": tensors, "hyper_parameters": settings}
        torch.save(content, file)
    rows = zip(meta["feature_ids"], model.mean.tolist(), model.std.tolist(), strict=True)
    with atomic(out / GENES) as file:
        lines = ["\t".join(HEADER), *(f"{gene}\t{mean!r}\t{std!r}" for gene, mean, std in rows)]
        file.write_text("\n".join(lines) + "\n")


def tensor_names(model: Exceiver) -> dict[str, str]:
    """The released name of each parameter of ours."""
    names = {"gene_embedding.weight": "gene_emb.weight", "latents": "query_emb"}
    names |= {f"head.{i}.{kind}": f"mlp.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
    for ours, released in (("encoder", "encoder_cross_attn"), ("decoder", "decoder_cross_attn")):
        modules = {"keys_norm": "layernorm_kv", "queries_norm": "layernorm_q", "attention": "cross_attn"}
        names |= _module_names(ours, released, modules | {f"mlp.{i}": f"mlp.{i}" for i in (0, 1, 3, 4)})
    modules = {
        "attention": "self_attn",
        "attention_norm": "norm1",
        "intermediate": "linear1",
        "output": "linear2",
        "output_norm": "norm2",
    }
    for i in range(model.sizes.n_layers):
        names |= _module_names(f"layers.{i}", f"process_self_attn.transformer.layers.{i}", modules)
    if model.prototype is not None:
        names |= _module_names("prototype", PROTOTYPE, modules)
    return names


def _module_names(ours: str, released: str, modules: dict[str, str]) -> dict[str, str]:
    names = {}
    for own, theirs in modules.items():
        for kind in ("weight", "bias"):
            if own == "attention":  # torch's MultiheadAttention
                names[f"{ours}.{own}.qkv.{kind}"] = f"{released}.{theirs}.in_proj_{kind}"
                names[f"{ours}.{own}.out.{kind}"] = f"{released}.{theirs}.out_proj.{kind}"
            else:
                names[f"{ours}.{own}.{kind}"] = f"{released}.{theirs}.{kind}"
    return names


def _sizes(settings: dict, tensors: dict[str, Tensor]) -> Sizes:
    return Sizes(
        width=settings["query_dim"],
        n_latents=settings["query_len"],
        n_layers=settings["num_layers"],
        n_heads=settings["nhead"],
        hidden=settings["dim_feedforward"],
        n_cross_heads=settings["n_cross_heads"],
        min_cells=settings["min_cells"],
        mask_mode="paper" if settings.get("mask_mode") == "paper" else "released",
        prototype_layer=any(name.startswith(f"{PROTOTYPE}.") for name in tensors),
    )


def _complete(settings: dict, path: Path) -> None:
    """Put in, and check, the settings that our exports hold and the authors' code has no names for."""
    largest = {"n_cross_heads": settings["query_dim"], "min_cells": MAX_CELLS, "n_mask": settings["seq_len"]}
    for name, default in OURS.items():
        value = settings.setdefault(name, default)
        if type(value) is not int or not min(default, 1) <= value <= largest[name]:
            raise CellmillError(
                f"{path}: hyper_parameters.{name} is no whole number that fits the model; export the model again"
            )


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _drop_class_query(tensors: dict[str, Tensor], n_genes: int, path: Path) -> list[str]:
    """Leave out the row behind the genes and the hidden one that asks a classifier for its class, where there is one.

    In place; returns what to remark.
    """
    table = tensors.get("gene_emb.weight")
    if "mlp_classify.0.weight" not in tensors or table is None or table.shape[:1] != (n_genes + 2,):
        return []
    tensors["gene_emb.weight"] = table[:-1]
    return [f"{path.name}: the classifier's query, the last row of gene_emb.weight, is not used"]


def read_genes(path: Path, n_genes: int) -> tuple[list[str], Tensor | None]:
    """Ordered genes, and float32 [2, V], their means and standard deviations, where the file gives them."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise CellmillError(f"{path} does not exist; give the ordered list of the model's genes") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CellmillError(f"{path} is no text file ({error}); give one gene a line") from error
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    is_table = rows[:1] == [HEADER]
    rows = rows[1:] if is_table else rows
    width = len(HEADER) if is_table else 1
    uneven = [row for row in rows if len(row) != width]
    if uneven:
        raise CellmillError(
            f"{path} has a line of {len(uneven[0])} columns ('{uneven[0][0]}'); give one gene a line, or a table of "
            "tabs with the header gene, mean, std"
        )
    genes = [row[0].strip() for row in rows]
    if len(genes) != n_genes or len(set(genes)) != n_genes:
        raise CellmillError(
            f"{path} holds {len(genes)} genes, {len(set(genes))} of them different, and the model has {n_genes}; "
            "give the list that the weights were trained with"
        )
    if not is_table:
        return genes, None
    try:
        standardiser = torch.tensor([[float(cell) for cell in row[1:]] for row in rows]).T
    except ValueError as error:
        raise CellmillError(f"{path} holds a mean or std that is no number ({error}); mend that line") from error
    wrong = [
        gene
        for gene, mean, std in zip(genes, *standardiser.tolist(), strict=True)
        if (math.isnan(mean) and not math.isnan(std)) or math.isinf(mean) or math.isinf(std) or std < 0
    ]
    if wrong or standardiser[1].isnan().all():
        raise CellmillError(
            f"{path} holds no usable mean and std{f' of {wrong[0]}' if wrong else ''}; give finite ones, std at least "
            "0, nan for the std of a gene that is not to be read, or nan for both where no cell expresses it"
        )
    return genes, standardiser
