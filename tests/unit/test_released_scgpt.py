"""scGPT's released layout, in and out: small random checkpoints with the published keys, and the real vocabularies."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cellmill.checkpoints import load_checkpoint
from cellmill.errors import CellmillError
from cellmill.models.base import total_loss
from cellmill.models.scgpt import Scgpt
from cellmill.released import import_released, read_released, write_released
from model_cells import make_batch

GENES = ["ZZZ3", "A1BG", "TP53", "MALAT1", "ACTB"]
WIDTH, HIDDEN, LAYERS = 8, 12, 2
ARGS = {"embsize": WIDTH, "nheads": 2, "d_hid": HIDDEN, "nlayers": LAYERS, "n_layers_cls": 3, "dropout": 0.2}
ARGS |= {"pad_token": "<pad>", "pad_value": -2, "mask_value": -1, "n_bins": 51, "max_seq_len": 1200}
ARGS |= {"input_emb_style": "continuous", "task": "pretrain"}
VOCAB = {gene: row for row, gene in enumerate(GENES)} | {"<pad>": 5, "<cls>": 6, "<eoc>": 7}
SCATTERED = {"<cls>": 0, "ACTB": 1, "ZZZ3": 2, "<pad>": 3, "TP53": 4, "MALAT1": 5, "<eoc>": 6, "A1BG": 7}


def published(n_tokens: int = 8, flag: bool = False, n_classes: int = 1) -> dict[str, torch.Tensor]:
    """A random state_dict with the published keys and shapes, written out."""
    shapes = {"encoder.embedding.weight": (n_tokens, WIDTH), "mvc_decoder.W.weight": (WIDTH, WIDTH)}
    linears = {"value_encoder.linear1": (WIDTH, 1), "value_encoder.linear2": (WIDTH, WIDTH)}
    linears |= {f"decoder.fc.{i}": (WIDTH, WIDTH) for i in (0, 2)} | {"decoder.fc.4": (1, WIDTH)}
    linears |= {f"cls_decoder._decoder.{i}": (WIDTH, WIDTH) for i in (0, 3)}
    linears |= {"cls_decoder.out_layer": (n_classes, WIDTH), "mvc_decoder.gene2query": (WIDTH, WIDTH)}
    norms = ["encoder.enc_norm", "value_encoder.norm", "cls_decoder._decoder.2", "cls_decoder._decoder.5"]
    for layer in range(LAYERS):
        at = f"transformer_encoder.layers.{layer}"
        linears |= {f"{at}.self_attn.Wqkv": (3 * WIDTH, WIDTH), f"{at}.self_attn.out_proj": (WIDTH, WIDTH)}
        linears |= {f"{at}.linear1": (HIDDEN, WIDTH), f"{at}.linear2": (WIDTH, HIDDEN)}
        norms += [f"{at}.norm1", f"{at}.norm2"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    if flag:
        shapes["flag_encoder.weight"] = (2, WIDTH)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, tensors=None, args=ARGS, vocab=VOCAB) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(published() if tensors is None else tensors, folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


def back(released, out: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """What is written of a model that was read: tensors, settings, vocabulary."""
    write_released("scgpt", released.model, {"feature_ids": released.genes}, out)
    texts = (json.loads((out / name).read_text()) for name in ("args.json", "vocab.json"))
    return torch.load(out / "best_model.pt", weights_only=True), *texts


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("vocab", [VOCAB, SCATTERED], ids=["specials-last", "scattered"])
@pytest.mark.parametrize("flag", [False, True], ids=["no-flag", "flag"])
def test_read_and_written_back_it_is_the_same_file(vocab, flag, tmp_path):
    tensors = published(flag=flag)
    released = read_released("scgpt", save(tmp_path / "in", tensors, vocab=vocab))
    assert released.remarks == []
    assert released.model.sizes.flag_embedding is flag
    written, args, vocabulary = back(released, tmp_path / "out")
    assert same(written, tensors)
    assert vocabulary == vocab
    assert {key: args[key] for key in ARGS if key != "task"} == {key: ARGS[key] for key in ARGS if key != "task"}


def test_genes_come_first_by_row(tmp_path):
    tensors = published()
    model, genes, _ = read_released("scgpt", save(tmp_path, tensors, vocab=SCATTERED))
    assert genes == ["ACTB", "ZZZ3", "TP53", "MALAT1", "A1BG"]
    for gene, token in (("TP53", 2), ("<pad>", model.pad), ("<cls>", model.cls)):
        row = tensors["encoder.embedding.weight"][SCATTERED[gene]]
        assert torch.equal(model.gene_embedding.weight[token], row), gene
    assert not model.training
    assert model.sizes.released_gen_stream
    assert model.sizes.max_length == 1200


def test_through_a_checkpoint_of_ours(tmp_path):
    tensors = published()
    folder = save(tmp_path / "in", tensors, vocab=SCATTERED)
    import_released("theirs", "scgpt", folder, None, tmp_path / "checkpoint")
    model, meta = load_checkpoint(tmp_path / "checkpoint")
    write_released("scgpt", model, meta, tmp_path / "out")
    assert same(torch.load(tmp_path / "out" / "best_model.pt", weights_only=True), tensors)
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()) == SCATTERED


def test_a_model_of_ours_out_and_in(tmp_path):
    torch.manual_seed(0)
    sizes = Scgpt.Sizes(n_layers=2, width=8, n_heads=2, hidden=12, max_length=77, dropout=0.1, cell_prompt_after=5)
    sizes = replace(sizes, attention_dropout=0.0)
    model = Scgpt(sizes, 5).eval()
    write_released("scgpt", model, {"feature_ids": GENES}, tmp_path)
    again, genes, remarks = read_released("scgpt", tmp_path)
    assert genes == GENES
    assert remarks == []
    assert again.sizes == sizes
    assert same(again.state_dict(), model.state_dict())
    inputs = model.pretrain_inputs(make_batch([{0: 3, 1: 1, 2: 8, 4: 2}]), seed=0, step=None)
    assert total_loss(again(inputs)) == total_loss(model(inputs))


def respelled(tensors: dict, spelling: str) -> dict:
    attention = ".self_attn.Wqkv."
    to = {
        "module": lambda name: f"module.{name}",
        "torch": lambda name: name.replace("Wqkv.", "in_proj_"),
        "wrapper": lambda name: name.replace(".self_attn.", ".self_attn._impl."),
        "all": lambda name: "module." + name.replace(attention, ".self_attn._impl.in_proj_"),
    }[spelling]
    return {to(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("spelling", ["module", "torch", "wrapper", "all"])
def test_spellings(spelling, tmp_path):
    tensors = published()
    released = read_released("scgpt", save(tmp_path / "in", respelled(tensors, spelling)))
    assert same(back(released, tmp_path / "out")[0], tensors)


def test_tolerated_with_a_remark(tmp_path):
    extra = {"bn.weight": torch.ones(WIDTH), "bn.running_mean": torch.zeros(WIDTH), "dsbn.x": torch.zeros(1)}
    bare = {gene: row for gene, row in VOCAB.items() if not gene.startswith("<")}
    model, genes, remarks = read_released("scgpt", save(tmp_path, published() | extra, vocab=bare))
    assert genes == GENES
    assert len(remarks) == 2
    assert "<pad>, <cls>, <eoc> appended" in remarks[0]
    assert "3 tensors are not used (bn.running_mean, bn.weight, dsbn.x)" in remarks[1]
    assert model.special_ids.tolist() == [5, 6, 7]


def test_a_classifier_of_more_classes(tmp_path):
    tensors = published(n_classes=4)
    released = read_released("scgpt", save(tmp_path / "in", tensors))
    assert released.model.sizes.n_classes == 4
    assert same(back(released, tmp_path / "out")[0], tensors)


def without(name: str) -> dict:
    return {key: tensor for key, tensor in published().items() if key != name}


REFUSED = {
    "missing tensor": ({"tensors": without("mvc_decoder.W.weight")}, r"lacks 1 of the .*mvc_decoder.W.weight"),
    "no embedding": ({"tensors": without("encoder.embedding.weight")}, "embeds 0 tokens"),
    "other vocabulary": ({"vocab": VOCAB | {"GAPDH": 8}}, "embeds 8 tokens and .* names 9; take both from one release"),
    "rows twice": ({"vocab": VOCAB | {"A1BG": 0}}, "does not number its 8 tokens"),
    "rows that are no numbers": ({"vocab": VOCAB | {"A1BG": "x"}}, "does not number its 8 tokens"),
    "other width": ({"args": ARGS | {"embsize": 16}}, "tensors have other shapes"),
    "other depth": ({"args": ARGS | {"nlayers": 1}}, "says 1 layers and best_model.pt holds 2"),
    "heads": ({"args": ARGS | {"nheads": 3}}, "no multiple of n_heads"),
    "no settings": ({"args": {"embsize": 8}}, "does not say nheads, d_hid, nlayers; give the args.json"),
    "a setting that is no number": ({"args": ARGS | {"d_hid": "12"}}, "does not say d_hid"),
    "another value encoder": ({"args": ARGS | {"input_emb_style": "category"}}, "variant .*input_emb_style 'category'"),
    "not finite": ({"tensors": published() | {"decoder.fc.4.bias": torch.tensor([torch.nan])}}, "not finite"),
    "two spellings": (
        {"tensors": published() | respelled(published(), "torch")},
        "twice, in two spellings",
    ),
    "no state_dict": ({"tensors": {"model": {"a": 1}}}, "holds no state_dict"),
}


@pytest.mark.parametrize(("changed", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(changed, said, tmp_path):
    with pytest.raises(CellmillError, match=said) as refusal:
        read_released("scgpt", save(tmp_path, **changed))
    assert "\n" not in str(refusal.value)


class Code:
    """A pickle of it runs a command when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_code_in_the_weights_is_refused_and_not_run(tmp_path):
    save(tmp_path, published() | {"evil": Code(tmp_path / "ran")})
    with pytest.raises(CellmillError, match="is refused: .*exec"):
        read_released("scgpt", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_files(tmp_path):
    folder = save(tmp_path / "a")
    weights = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CellmillError, match="cannot be read as a torch file"):
        read_released("scgpt", folder)
    for name in ("best_model.pt", "args.json", "vocab.json"):
        folder = save(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(CellmillError, match=f"{name} does not exist"):
            read_released("scgpt", folder)
    folder = save(tmp_path / "b")
    (folder / "args.json").write_text("{")
    with pytest.raises(CellmillError, match="args.json is no JSON"):
        read_released("scgpt", folder)


def test_genes_that_cannot_be_a_vocabulary(tmp_path):
    model = Scgpt(Scgpt.Sizes(n_layers=1, width=8, n_heads=2, hidden=8, max_length=9), 3)
    for genes in (["a", "b"], ["a", "b", "b"], ["a", "b", "<cls>"]):
        with pytest.raises(CellmillError, match="are not 3 different names"):
            write_released("scgpt", model, {"feature_ids": genes}, tmp_path)


@pytest.mark.parametrize(
    ("file", "n_genes"), [("scgpt_default_census_vocab", 60_694), ("scgpt_default_gene_vocab", 48_292)]
)
def test_published_vocabularies(data, file, n_genes, tmp_path):
    """The shipped vocabularies hold no specials; the authors' code appends them."""
    source = data / "vocab" / f"{file}.json.gz"
    vocab = json.loads(gzip.decompress(source.read_bytes()))
    assert len(vocab) == n_genes
    folder = save(tmp_path / "in", published(n_genes + 3))
    shutil.copy(source, tmp_path / "vocab.json.gz")
    released = read_released("scgpt", folder, tmp_path / "vocab.json.gz")
    assert len(released.genes) == n_genes
    assert all(vocab[gene] == row for row, gene in enumerate(released.genes))
    assert (released.model.pad, released.model.cls) == (n_genes, n_genes + 1)
    assert back(released, tmp_path / "out")[2] == vocab | {"<pad>": n_genes, "<cls>": n_genes + 1, "<eoc>": n_genes + 2}
