"""scFoundation's released layout: read as published, written back tensor by tensor, and refused where it is foreign."""

import gzip
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cellmill.checkpoints import load_checkpoint
from cellmill.errors import CellmillError
from cellmill.files import sha256
from cellmill.models.scfoundation import Scfoundation
from cellmill.released import import_released, read_released, write_released
from cellmill.shards.batch import CellBatch
from model_cells import make_batch

N_GENES = 30
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
WIDTH, HIDDEN, BINS, DECODER_WIDTH, DECODER_HIDDEN, HEAD, FEATURES = 16, 64, 11, 12, 48, 6, 10


def published_tensors(n_layers: int = 2, decoder_layers: int = 3, n_genes: int = N_GENES) -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of the published file."""
    shapes = {
        "token_emb.mlp.weight": (BINS, 1),
        "token_emb.mlp.bias": (BINS,),
        "token_emb.mlp2.weight": (BINS, BINS),
        "token_emb.mlp2.bias": (BINS,),
        "token_emb.emb.weight": (BINS, WIDTH),
        "token_emb.emb_mask.weight": (1, WIDTH),
        "token_emb.emb_pad.weight": (1, WIDTH),
        "pos_emb.weight": (n_genes + 3, WIDTH),
        "decoder_embed.weight": (DECODER_WIDTH, WIDTH),
        "decoder_embed.bias": (DECODER_WIDTH,),
        "to_final.weight": (1, DECODER_WIDTH),
        "to_final.bias": (1,),
    }
    norms = {"encoder.norm": WIDTH, "decoder.norm": DECODER_WIDTH, "norm": DECODER_WIDTH}
    for i in range(n_layers):
        layer = f"encoder.transformer_encoder.{i}"
        shapes |= {
            f"{layer}.self_attn.in_proj_{kind}": (3 * WIDTH, WIDTH)[:n] for kind, n in (("weight", 2), ("bias", 1))
        }
        linears = {"self_attn.out_proj": (WIDTH, WIDTH), "linear1": (HIDDEN, WIDTH), "linear2": (WIDTH, HIDDEN)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms |= {f"{layer}.norm1": WIDTH, f"{layer}.norm2": WIDTH}
    for i in range(decoder_layers):
        layer = f"decoder.performer.net.layers.{i}"
        linears = {f"0.fn.to_{x}": (DECODER_WIDTH, DECODER_WIDTH) for x in ("q", "k", "v", "out")}
        linears |= {"1.fn.fn.w1": (DECODER_HIDDEN, DECODER_WIDTH), "1.fn.fn.w2": (DECODER_WIDTH, DECODER_HIDDEN)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes[f"{layer}.0.fn.fast_attention.projection_matrix"] = (FEATURES, HEAD)
        norms |= {f"{layer}.0.norm": DECODER_WIDTH, f"{layer}.1.norm": DECODER_WIDTH}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    tensors = {name: torch.randn(shape) / max(1, shape[-1]) ** 0.5 for name, shape in shapes.items()}
    return tensors | {"decoder.performer.calls_since_last_redraw": torch.tensor(417)}


def published_config(**changes) -> dict:
    encoder = {"hidden_dim": WIDTH, "depth": 2, "heads": 2, "dim_head": 8, "module_type": "transformer"}
    decoder = {"hidden_dim": DECODER_WIDTH, "depth": 3, "heads": 2, "dim_head": HEAD, "module_type": "performer"}
    settings = {"encoder": encoder, "decoder": decoder, "n_class": 104, "bin_num": BINS, "bin_alpha": 1.0}
    settings |= {"pad_token_id": 103, "mask_token_id": 102, "seq_len": N_GENES + 2, "model": "mae_autobin"}
    dataset = {"rnaseq": {"value_mask_prob": 0.3}}
    return {"model": "mae_autobin", "model_config": {"mae_autobin": settings | changes}, "dataset_config": dataset}


def save(folder: Path, genes: list[str] | None = SYMBOLS, **parts) -> Path:
    """A file with the given networks (by default all three), beside it the list of genes."""
    folder.mkdir(parents=True, exist_ok=True)
    if genes:
        rows = "".join(f"{name}\t{i}\n" for i, name in enumerate(genes))
        (folder / f"OS_scRNA_gene_index.{len(genes)}.tsv").write_text(f"gene_name\tindex\n{rows}")
    if not parts:
        parts = {name: network(published_tensors()) for name in ("gene", "cell", "rde")}
    torch.save(parts, folder / "models.ckpt")
    return folder / "models.ckpt"


def network(tensors: dict[str, torch.Tensor], config: dict | None = None) -> dict:
    return {
        "config": config or published_config(),
        "state_dict": {f"network.model.{name}": tensor for name, tensor in tensors.items()},
    }


@pytest.fixture
def cells() -> CellBatch:
    return make_batch([{0: 3, 4: 1, 7: 12}, {2: 5, 29: 8}], totals=[2000, 40])


def test_reads_each_of_the_three_networks(tmp_path):
    torch.manual_seed(0)
    networks = {name: published_tensors() for name in ("gene", "cell", "rde")}
    path = save(tmp_path, **{name: network(tensors) for name, tensors in networks.items()})
    for asked, name in ((path, "cell"), (tmp_path, "cell"), (f"{path}#gene", "gene"), (f"{path}#rde", "rde")):
        released = read_released("scfoundation", asked)
        model, tensors = released.model, networks[name]
        assert released.genes == SYMBOLS
        assert released.remarks == []
        assert not model.training
        assert model.sizes.max_length == N_GENES + 2
        assert torch.equal(model.gene_embedding.weight, tensors["pos_emb.weight"])
        assert torch.equal(model.value_embedding.mask.weight, tensors["token_emb.emb_mask.weight"])
        for i in range(3):
            layer = f"decoder.performer.net.layers.{i}.0.fn"
            assert torch.equal(model.decoder[i].projection, tensors[f"{layer}.fast_attention.projection_matrix"])
            rows = model.decoder[i].attention.qkv.weight.chunk(3)
            for x, mine in zip("qkv", rows, strict=True):
                assert torch.equal(mine, tensors[f"{layer}.to_{x}.weight"])
        linear = tensors["encoder.transformer_encoder.1.linear2.weight"]
        assert torch.equal(model.encoder[1].linear2.weight, linear)


def test_written_again_the_tensors_are_those_of_the_file(tmp_path):
    torch.manual_seed(0)
    tensors = published_tensors()
    released = read_released("scfoundation", save(tmp_path / "in", cell=network(tensors)))
    write_released("scfoundation", released.model, {"feature_ids": released.genes}, tmp_path / "out")
    content = torch.load(tmp_path / "out" / "models.ckpt", weights_only=True)
    assert content.keys() == {"cell", "gene", "rde"}
    for part in content.values():
        written = {name.split("model.")[1]: tensor for name, tensor in part["state_dict"].items()}
        assert written.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(written[name], tensor), name
        settings = part["config"]["model_config"]["mae_autobin"]
        published = published_config()["model_config"]["mae_autobin"]
        assert {name: settings[name] for name in published} == published
    lists = (tmp_path / "in", tmp_path / "out")
    assert len({(folder / f"OS_scRNA_gene_index.{N_GENES}.tsv").read_text() for folder in lists}) == 1


EXPORTABLE = replace(Scfoundation.presets["demo"], hidden=128, decoder_hidden=64, n_features=0, max_length=N_GENES + 2)
"""Sizes that the released code can be told."""


def test_a_model_of_ours_comes_back(tmp_path, cells):
    torch.manual_seed(0)
    sizes = replace(EXPORTABLE, max_length=40, dropout=0.0, redraw_every=7, bin_alpha=0.5, embedding_depth=4.0)
    sizes = replace(sizes, attention_dropout=0.3)
    model = Scfoundation(sizes, N_GENES).train()
    model(model.pretrain_inputs(cells, seed=0, step=9), step=9)
    model.eval()
    write_released("scfoundation", model, {"feature_ids": SYMBOLS}, tmp_path)
    again = read_released("scfoundation", tmp_path).model
    assert replace(again.sizes, n_features=0) == replace(sizes, n_features=0)
    assert again.sizes.n_features == sizes.features
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        for asked in ("embed_cells", "gene_states"):
            ours, theirs = (getattr(m, asked)(m.embed_inputs(cells)) for m in (model, again))
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"hidden": 96}, "hidden is 96, not 128"),
        ({"decoder_hidden": 32}, "decoder_hidden is 32, not 64"),
        ({"n_features": 16}, "n_features is 16, not 44"),
    ],
)
def test_sizes_that_the_released_code_cannot_be_told_are_not_written(tmp_path, size, said):
    model = Scfoundation(replace(EXPORTABLE, **size), N_GENES)
    with pytest.raises(CellmillError, match=f"own code cannot run this model as it was trained: {said}; train"):
        write_released("scfoundation", model, {"feature_ids": SYMBOLS}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_released_script_finds_its_settings(tmp_path):
    """What it keeps of the config: the settings of the named model, with those of the data put in."""
    write_released("scfoundation", Scfoundation(EXPORTABLE, N_GENES), {"feature_ids": SYMBOLS}, tmp_path)
    config = torch.load(tmp_path / "models.ckpt", weights_only=True)["rde"]["config"]
    kept = config["model_config"][config["model"]] | config["dataset_config"]["rnaseq"]
    assert kept["model"] == "mae_autobin"
    sizes = {"bin_num": 16, "bin_alpha": 1.0, "seq_len": N_GENES + 2, "pad_token_id": 103, "mask_token_id": 102}
    assert {name: kept[name] for name in sizes} == sizes


def test_settings_may_stand_with_the_data(tmp_path):
    """In either place; where both have one, that of the data counts, as in the released code."""
    torch.manual_seed(0)
    tensors = published_tensors()
    moved = published_config()
    for name in ("bin_num", "bin_alpha"):
        moved["dataset_config"]["rnaseq"][name] = moved["model_config"]["mae_autobin"].pop(name)
    moved["dataset_config"]["rnaseq"]["bin_alpha"] = 0.25
    both = published_config(bin_num=3, bin_alpha=0.75)
    both["dataset_config"]["rnaseq"] |= {"bin_num": BINS, "bin_alpha": 0.25}
    for number, config in enumerate((moved, both)):
        read = read_released("scfoundation", save(tmp_path / str(number), cell=network(tensors, config)))
        assert read.model.sizes.n_bins == BINS
        assert read.model.value_embedding.alpha == 0.25
    no_data = published_config(bin_alpha=0.75)
    del no_data["dataset_config"]
    read = read_released("scfoundation", save(tmp_path / "none", cell=network(tensors, no_data)))
    assert read.model.value_embedding.alpha == 0.75


def test_import_of_a_network_by_name(tmp_path):
    torch.manual_seed(0)
    networks = {name: published_tensors() for name in ("gene", "cell", "rde")}
    path = save(tmp_path / "in", **{name: network(tensors) for name, tensors in networks.items()})
    listed = tmp_path / "genes.tsv"
    (tmp_path / "in" / f"OS_scRNA_gene_index.{N_GENES}.tsv").rename(listed)
    assert import_released("theirs", "scfoundation", Path(f"{path}#rde"), listed, tmp_path / "out") == []
    model, meta = load_checkpoint(tmp_path / "out")
    assert torch.equal(model.gene_embedding.weight, networks["rde"]["pos_emb.weight"])
    assert meta["released"]["files"] == {file.name: sha256(file) for file in (path, listed)}
    import_released("theirs", "scfoundation", Path(f"{tmp_path / 'in'}#gene"), listed, tmp_path / "again")
    model, meta = load_checkpoint(tmp_path / "again")
    assert torch.equal(model.gene_embedding.weight, networks["gene"]["pos_emb.weight"])
    assert meta["released"]["files"].keys() == {"models.ckpt", "genes.tsv"}


def test_released_random_features_stay_in_training(tmp_path, cells):
    model = read_released("scfoundation", save(tmp_path)).model
    assert model.sizes.redraw_every == 0
    before = [layer.projection.clone() for layer in model.decoder]
    model.train()
    for step in (0, 1000):
        model(model.pretrain_inputs(cells, seed=0, step=step), step=step)
    assert all(torch.equal(layer.projection, old) for layer, old in zip(model.decoder, before, strict=True))


def test_the_encoder_is_torchs(tmp_path, cells):
    """The encoder equals torch's own layers, filled with the file's tensors under the file's own names."""
    torch.manual_seed(0)
    tensors = published_tensors()
    model = read_released("scfoundation", save(tmp_path, cell=network(tensors))).model
    inputs = model.embed_inputs(cells)
    with torch.no_grad():
        layout = inputs["layout"]
        x_BED = layout.to_matrix(model.value_embedding(inputs["values"]) + tensors["pos_emb.weight"][inputs["tokens"]])
        valid = torch.arange(x_BED.shape[1]) < layout.lengths_B[:, None]
        for i in range(2):
            layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True).eval()
            prefix = f"encoder.transformer_encoder.{i}."
            named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layer.load_state_dict(named)
            x_BED = layer(x_BED, src_key_padding_mask=~valid)
        weight, bias = tensors["encoder.norm.weight"], tensors["encoder.norm.bias"]
        expected = torch.nn.functional.layer_norm(x_BED, (WIDTH,), weight, bias)
        torch.testing.assert_close(model.encode(inputs), expected[valid], atol=1e-5, rtol=1e-5)


def slow_performer(x_PC: torch.Tensor, tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """A decoder layer's attention as the published code computes it for one cell, with explicit weights [P, P]."""
    q, k, v = (
        (x_PC @ tensors[f"{layer}.to_{x}.weight"].T + tensors[f"{layer}.to_{x}.bias"]).unflatten(1, (2, HEAD)).mT
        for x in "qkv"
    )
    projection = tensors[f"{layer}.fast_attention.projection_matrix"]
    products = [torch.einsum("pkh,fk->hpf", x * HEAD**-0.25, projection) for x in (q, k)]
    halves = [x.square().sum(1).T.unsqueeze(2) / 2 * HEAD**-0.5 for x in (q, k)]
    lowered = [products[0].amax(2, keepdim=True), products[1].max()]
    q, k = (
        FEATURES**-0.5 * (torch.exp(product - half - most) + 1e-4)
        for product, half, most in zip(products, halves, lowered, strict=True)
    )
    weights_HPP = q @ k.mT
    attended = (weights_HPP / weights_HPP.sum(2, keepdim=True)) @ v.permute(2, 0, 1)
    out = attended.transpose(0, 1).flatten(1) @ tensors[f"{layer}.to_out.weight"].T
    return out + tensors[f"{layer}.to_out.bias"]


def test_the_decoder_is_the_published_one(tmp_path, cells):
    """Float64, one cell, every position, under the file's own names: value and gene embeddings to the prediction."""
    torch.manual_seed(0)
    published = published_tensors()
    model = read_released("scfoundation", save(tmp_path, cell=network(published))).model.double()
    tensors = {name: tensor.double() for name, tensor in published.items()}
    cell = cells.take([0])
    inputs = model.impute_inputs(cell, np.array([[1, 2, 28]]))

    def norm(x, name):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)

    with torch.no_grad():
        model.value_embedding.float()
        zero = model.value_embedding(torch.zeros(1)).double()
        x_PD = zero.repeat(N_GENES + 2, 1)
        x_PD[inputs["tokens"]] = model.encode(inputs).double()
        x_PD[[1, 2, 28]] = tensors["token_emb.emb_mask.weight"]
        x_PC = (x_PD + tensors["pos_emb.weight"][:-1]) @ tensors["decoder_embed.weight"].T
        x_PC = x_PC + tensors["decoder_embed.bias"]
        for i in range(3):
            layer = f"decoder.performer.net.layers.{i}"
            x_PC = x_PC + slow_performer(norm(x_PC, f"{layer}.0.norm"), tensors, f"{layer}.0.fn")
            y_PC = norm(x_PC, f"{layer}.1.norm")
            y_PC = y_PC @ tensors[f"{layer}.1.fn.fn.w1.weight"].T + tensors[f"{layer}.1.fn.fn.w1.bias"]
            y_PC = torch.nn.functional.gelu(y_PC) @ tensors[f"{layer}.1.fn.fn.w2.weight"].T
            x_PC = x_PC + y_PC + tensors[f"{layer}.1.fn.fn.w2.bias"]
        x_PC = norm(norm(x_PC, "decoder.norm"), "norm")
        expected = (x_PC @ tensors["to_final.weight"].T + tensors["to_final.bias"])[[1, 2, 28], 0]
        model.float()
        torch.testing.assert_close(model.impute(inputs).values_BQ[0], expected.float(), atol=2e-5, rtol=1e-5)


def test_genes_given_or_beside_or_above(tmp_path, data):
    path = save(tmp_path / "models")
    (tmp_path / "models" / f"OS_scRNA_gene_index.{N_GENES}.tsv").rename(tmp_path / f"OS_scRNA_gene_index.{N_GENES}.tsv")
    assert read_released("scfoundation", path).genes == SYMBOLS
    real = data / "vocab" / "scfoundation_gene_index_19264.tsv.gz"
    with pytest.raises(
        CellmillError, match=r"models.ckpt embeds 30 genes and the list of genes has 19264; give the list"
    ):
        read_released("scfoundation", path, genes=real)
    lines = gzip.decompress(real.read_bytes()).decode().splitlines()[: N_GENES + 1]
    few = tmp_path / "few.tsv.gz"
    few.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_released("scfoundation", path, genes=few).genes[:3] == ["A1BG", "A1CF", "A2M"]
    for content, found in {
        "gene\tindex\nA\t0\n": "no list of genes",
        "gene_name\tindex\nA\t0\nB\t2\n": "no list of genes",
        "gene_name\tindex\nA\t0\nA\t1\n": "no list of genes",
    }.items():
        few.write_text(content)
        with pytest.raises(CellmillError, match=found):
            read_released("scfoundation", path, genes=few)
    (tmp_path / f"OS_scRNA_gene_index.{N_GENES}.tsv").unlink()
    with pytest.raises(CellmillError, match="no list of genes .* lies beside"):
        read_released("scfoundation", path)


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def refuses(folder: Path, message: str, path: str | Path | None = None, **parts) -> None:
    saved = save(folder, **parts)
    with pytest.raises(CellmillError, match=message) as caught:
        read_released("scfoundation", path or saved)
    assert str(caught.value).count("\n") == 0


def test_refusals(tmp_path):
    torch.manual_seed(0)
    good = published_tensors()

    def changed(**tensors):
        return network({name: tensor for name, tensor in (good | tensors).items() if tensor is not None})

    refuses(tmp_path, "posix.system, which could run code", cell=network(good) | {"more": Evil()})
    refuses(tmp_path, "holds no network 'cell' .found: rde.", rde=network(good))
    refuses(tmp_path, "holds no network 'ce'", f"{tmp_path / 'models.ckpt'}#ce", cell=network(good))
    refuses(tmp_path, "lacks 1 of the", cell=changed(**{"to_final.bias": None}))
    refuses(
        tmp_path, "without its keys or values", cell=changed(**{"decoder.performer.net.layers.1.0.fn.to_k.bias": None})
    )
    first = "decoder.performer.net.layers.0.0.fn"
    different = {f"{first}.to_q.weight": torch.zeros(DECODER_WIDTH - 1, DECODER_WIDTH)}
    refuses(tmp_path, "its keys and values have different shapes", cell=changed(**different))
    different[f"{first}.to_k.weight"] = torch.zeros(DECODER_WIDTH + 1, DECODER_WIDTH)  # together as long as expected
    refuses(tmp_path, "its keys and values have different shapes", cell=changed(**different))
    numbers = {f"{first}.to_{x}.bias": torch.tensor(1.0) for x in "qkv"}
    refuses(tmp_path, "its keys and values have different shapes", cell=changed(**numbers))
    for name in ("pos_emb.weight", f"{first}.fast_attention.projection_matrix"):
        refuses(tmp_path, f"lacks the tensor {name}, or it is no table", cell=changed(**{name: torch.tensor(1.0)}))
    refuses(tmp_path, "lacks the tensor pos_emb.weight", cell=changed(**{"pos_emb.weight": None}))
    refuses(tmp_path, "token_emb.emb.weight is", cell=changed(**{"token_emb.emb.weight": torch.zeros(BINS + 1, WIDTH)}))
    refuses(
        tmp_path, "not finite .norm.weight", cell=changed(**{"norm.weight": torch.full((DECODER_WIDTH,), torch.nan)})
    )
    refuses(tmp_path, "embeds 31 genes and the list of genes has 30", cell=network(published_tensors(n_genes=31)))
    refuses(tmp_path, "lacks .* tensors", cell=network(published_tensors(n_layers=1)))
    refuses(tmp_path, "config has no place for", cell=network(published_tensors(n_layers=3)))
    refuses(tmp_path, "holds no state_dict", cell={"config": published_config(), "state_dict": {"a": 1}})
    refuses(tmp_path, "config is not that of an mae_autobin", cell={"state_dict": {"a": torch.zeros(1)}})
    other = published_config() | {"model": "mae_autobin2"}
    refuses(tmp_path, "config is not that of an mae_autobin", cell=network(good, other))
    swapped = published_config(encoder=published_config()["model_config"]["mae_autobin"]["decoder"])
    refuses(tmp_path, "only mae_autobin of transformer and performer", cell=network(good, swapped))
    heads = published_config()
    heads["model_config"]["mae_autobin"]["encoder"]["heads"] = 5
    refuses(tmp_path, "width 16 is no multiple of n_heads 5", cell=network(good, heads))
    for part, name, size, message in (
        ("encoder", "hidden_dim", 10**7, "does not fit its own description"),
        ("encoder", "depth", 10**5, "lacks tensors of the 100,003 layers"),
        ("decoder", "hidden_dim", 10**7, "does not fit its own description"),
        ("decoder", "depth", 10**9, "lacks tensors of the 1,000,000,002 layers"),
        ("encoder", "hidden_dim", 10**9, "its settings make no model"),
        ("decoder", "hidden_dim", 10**30, "its settings make no model"),
        ("encoder", "hidden_dim", "16", "must be a whole number"),
    ):
        claimed = published_config()
        claimed["model_config"]["mae_autobin"][part][name] = size
        started = time.monotonic()
        refuses(tmp_path, message, cell=network(good, claimed))
        assert time.monotonic() - started < 5
    refuses(tmp_path, "does not fit its own desc", cell=network(good, published_config(bin_num=10**9)))
    path = save(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CellmillError, match="truncated, corrupt or of another format"):
        read_released("scfoundation", path)
    with pytest.raises(CellmillError, match="does not exist"):
        read_released("scfoundation", tmp_path / "absent.ckpt")


def test_tolerates_with_a_remark(tmp_path):
    torch.manual_seed(0)
    tensors = published_tensors() | {"cell_type.weight": torch.zeros(3, WIDTH)}
    released = read_released("scfoundation", save(tmp_path, cell=network(tensors)))
    assert released.remarks == ["models.ckpt: 1 tensors are not used (cell_type.weight)"]
    torch.save(network(published_tensors()), tmp_path / "models.ckpt")
    assert "holds one network" in read_released("scfoundation", tmp_path).remarks[0]


def test_a_dense_decoder_has_no_released_layout(tmp_path):
    model = Scfoundation(replace(Scfoundation.presets["demo"], decoder_attention="dense"), N_GENES)
    with pytest.raises(CellmillError, match="no dense decoder"):
        write_released("scfoundation", model, {"feature_ids": SYMBOLS}, tmp_path)
    assert list(tmp_path.iterdir()) == []
