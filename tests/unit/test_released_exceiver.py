"""Exceiver's published layout: the real weights against torch's own modules, exports, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import GeneStatistics
from cellmill.models.exceiver import Exceiver
from cellmill.released.exceiver import GENES, WEIGHTS, read, write
from cellmill.released.files import read_torch
from cellmill.shards.batch import CellBatch
from model_cells import make_batch, real_statistics
from shard_cells import real_cells
from torch import nn

CROSS_HEADS = 4
"""Of the published cross-attentions, whatever nhead."""
SIZES = {"width": 8, "n_latents": 3, "n_layers": 2, "n_heads": 2, "hidden": 12}
N_GENES = 10


@pytest.fixture(scope="module")
def published(data):
    return data / "checkpoints" / "exceiver_tabula_sapiens.ckpt"


@pytest.fixture(scope="module")
def pancreas(data):
    """Real cells in a vocabulary of the published size, of the first 19,067 genes, and the first cell of six types.

    The rows of the weights are not mapped to genes, so which gene is which row is arbitrary here.
    """
    cells, obs = real_cells(data, "baron_h1")
    cells, obs = cells.slice(0, 300), obs.slice(0, 300)
    kept_N = cells.genes < 19_067
    offsets = np.concatenate([[0], np.cumsum(kept_N)])[cells.offsets]
    cells = CellBatch(cells.joinids, offsets, cells.genes[kept_N], cells.counts[kept_N], cells.totals)
    _, first = np.unique(obs["cell_type"].to_pylist(), return_index=True)
    return cells, first[:6], real_statistics(cells, 19_067)


def small_model(**sizes) -> Exceiver:
    torch.manual_seed(0)
    model = Exceiver(Exceiver.Sizes(**SIZES | sizes), N_GENES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.gene_embedding.weight[-1] = 0
    model.mean.copy_(torch.rand(N_GENES))
    model.std.copy_(torch.rand(N_GENES))
    model.n_hidden.fill_(2)
    return model.eval()


def meta() -> dict:
    return {"feature_ids": [f"GENE{i}" for i in range(N_GENES)]}


class Plain(nn.Module):
    """The published network of torch's own modules, with the published names."""

    def __init__(self, width: int, n_latents: int, n_layers: int, n_heads: int, hidden: int, n_genes: int):
        super().__init__()
        self.query_emb = nn.Parameter(torch.empty(n_latents, width))
        self.gene_emb = nn.Embedding(n_genes + 1, width, padding_idx=n_genes)
        self.encoder_cross_attn = self.cross(width, CROSS_HEADS)
        self.decoder_cross_attn = self.cross(width, CROSS_HEADS)
        layer = nn.TransformerEncoderLayer(width, n_heads, hidden, dropout=0.0, activation="gelu", batch_first=True)
        self.process_self_attn = nn.Module()
        self.process_self_attn.encoder_layer = layer
        self.process_self_attn.transformer = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1), nn.GELU(), nn.Linear(1, 1))

    @staticmethod
    def cross(width: int, n_heads: int) -> nn.Module:
        block = nn.Module()
        block.layernorm_kv, block.layernorm_q = nn.LayerNorm(width), nn.LayerNorm(width)
        block.cross_attn = nn.MultiheadAttention(width, n_heads, batch_first=True)
        norms = nn.LayerNorm(width), nn.LayerNorm(width)
        block.mlp = nn.Sequential(norms[0], nn.Linear(width, width), nn.GELU(), norms[1], nn.Linear(width, width))
        return block

    @staticmethod
    def attend(block: nn.Module, queries, keys, mask=None):
        queried, _ = block.cross_attn(
            block.layernorm_q(queries), block.layernorm_kv(keys), block.layernorm_kv(keys), key_padding_mask=mask
        )
        x = queries + queried
        return x + block.mlp(x)

    def latents(self, genes, values, undetected):
        """`undetected` is float, 1 or 0, as the released code gives it to torch."""
        keys = values[..., None] * self.gene_emb(genes)
        queries = self.query_emb.expand(len(genes), -1, -1)
        return self.process_self_attn.transformer(self.attend(self.encoder_cross_attn, queries, keys, undetected))

    def predict(self, latents, asked):
        return self.mlp(self.attend(self.decoder_cross_attn, self.gene_emb(asked), latents)).squeeze(2)


def plain(path) -> Plain:
    content = read_torch(path)
    settings = content["hyper_parameters"]
    names = ("query_dim", "query_len", "num_layers", "nhead", "dim_feedforward", "seq_len")
    module = Plain(*(settings[name] for name in names))
    module.load_state_dict(content["state_dict"])  # strict: the names and shapes of all tensors
    return module.eval()


def full_view(model: Exceiver, cells: CellBatch, hidden_BH: np.ndarray | None = None):
    """Genes, values and undetected ones of all V genes of each cell, computed densely from the formula."""
    counts = np.zeros((len(cells), model.n_genes))
    counts[cells.cell_of, cells.genes] = cells.counts
    mean, std = model.mean.numpy(), model.std.numpy()
    z = (np.log1p(counts / cells.totals[:, None] * 1e4) - mean) / np.where(std == 0, 1, std)
    values = np.minimum(z, 10) + 1
    genes = np.tile(np.arange(model.n_genes), (len(cells), 1))
    if hidden_BH is not None:
        np.put_along_axis(values, hidden_BH, 1.0, axis=1)
        np.put_along_axis(genes, hidden_BH, model.n_genes, axis=1)
    return torch.from_numpy(genes), torch.from_numpy(values).float(), torch.from_numpy((counts == 0).astype(np.float32))


def test_the_real_weights_equal_torchs_own_modules(published, pancreas):
    model, _, remarks = read(published)
    assert len(read_torch(published)["state_dict"]) == 148
    assert any("not mapped to genes" in remark for remark in remarks)
    cells, statistics = pancreas[0].take(np.arange(3)), pancreas[2]
    model.set_statistics(statistics)
    model.mean.nan_to_num_(nan=0.0)
    model.std.nan_to_num_(nan=1.0)
    model.n_hidden.fill_(50)
    reference = plain(published)
    with torch.inference_mode():
        expected = reference.latents(*full_view(model, cells)).flatten(1)
        torch.testing.assert_close(model.embed_cells(model.embed_inputs(cells)), expected, atol=1e-5, rtol=1e-5)
        inputs = model.pretrain_inputs(cells, seed=0, step=None)
        asked = inputs["asked"].view(len(inputs["layout_asked"]), -1)
        latents = reference.latents(*full_view(model, cells, asked.numpy()))
        error = (reference.predict(latents, asked).flatten() - inputs["targets"]).square().sum()
        term = model(inputs)["mse"]
    assert term.count == 3 * 50
    torch.testing.assert_close(term.sum, error, atol=1e-4, rtol=1e-5)


def test_the_real_weights_embed_real_cells(published, pancreas):
    model, genes, remarks = read(published)
    assert genes[:2] == ["exceiver_row_00000", "exceiver_row_00001"]
    assert len(genes) == 19_067
    assert any("not standardised" in remark for remark in remarks)
    cells, of_types, statistics = pancreas
    model.set_statistics(statistics)
    with torch.inference_mode():
        embedded = model.embed_cells(model.embed_inputs(cells.take(of_types)))
        again = model.embed_cells(model.embed_inputs(cells.take(of_types[2:3])))
    assert embedded.shape == (6, 512)
    assert embedded.isfinite().all()
    torch.testing.assert_close(again[0], embedded[2], atol=1e-5, rtol=1e-5)
    assert torch.pdist(embedded).min() > 0.01


def test_the_real_weights_come_back(published, tmp_path):
    model, genes, _ = read(published)
    write(model, {"feature_ids": genes}, tmp_path)
    original, written = (read_torch(path)["state_dict"] for path in (published, tmp_path / WEIGHTS))
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_an_export_equals_torchs_own_modules(tmp_path, n_heads):
    """Without the settings that the authors' code has no names for, as it writes its checkpoints."""
    write(small_model(n_heads=n_heads, mask_mode="released", prototype_layer=True), meta(), tmp_path)
    content = torch.load(tmp_path / WEIGHTS, weights_only=True)
    for name in ("n_cross_heads", "min_cells", "mask_mode", "n_mask"):
        content["hyper_parameters"].pop(name)
    torch.save(content, tmp_path / WEIGHTS)
    model, _, _ = read(tmp_path / WEIGHTS, genes=tmp_path / GENES)
    model.n_hidden.fill_(2)
    reference, cells = plain(tmp_path / WEIGHTS), make_batch([{0: 3, 4: 1, 7: 2, 8: 9}, {1: 1, 2: 5, 3: 2, 6: 1, 9: 4}])
    with torch.inference_mode():
        expected = reference.latents(*full_view(model, cells)).flatten(1)
        torch.testing.assert_close(model.embed_cells(model.embed_inputs(cells)), expected, atol=1e-5, rtol=1e-5)
        inputs = model.pretrain_inputs(cells, seed=0, step=None)
        asked = inputs["asked"].view(len(inputs["layout_asked"]), -1)
        latents = reference.latents(*full_view(model, cells, asked.numpy()))
        error = (reference.predict(latents, asked).flatten() - inputs["targets"]).square().sum()
        torch.testing.assert_close(model(inputs)["mse"].sum, error, atol=1e-4, rtol=1e-5)


def test_an_export_with_genes_of_few_cells_comes_back(tmp_path):
    model = small_model(min_cells=5)
    statistics = GeneStatistics(
        nonzero_cells=torch.tensor([9, 4, 5, 30, 0, 6, 7, 8, 3, 5]),
        median_nonzero_cp10k=torch.ones(N_GENES),
        mean_log1p_cp10k=torch.rand(N_GENES).index_fill(0, torch.tensor([4]), torch.nan),
        std_log1p_cp10k=torch.rand(N_GENES).index_fill(0, torch.tensor([4]), torch.nan),
        median_genes=torch.tensor(14.0),
    )
    model.set_statistics(statistics)
    write(model, meta(), tmp_path)
    again, _, remarks = read(tmp_path / WEIGHTS, genes=tmp_path / GENES)
    assert remarks == []
    assert again.sizes == replace(model.sizes, mask_mode="paper", prototype_layer=True)
    assert again.std.isnan().nonzero()[:, 0].tolist() == [1, 4, 8]
    assert again.mean.isnan().nonzero()[:, 0].tolist() == [4]
    for name in ("mean", "std", "n_hidden"):
        torch.testing.assert_close(getattr(again, name), getattr(model, name), rtol=0, atol=0, equal_nan=True)
    cells = make_batch([{0: 3, 1: 1, 7: 2, 8: 9}])
    assert again.embed_inputs(cells)["genes"].tolist() == [0, 7]
    assert torch.equal(model.embed_cells(model.embed_inputs(cells)), again.embed_cells(again.embed_inputs(cells)))
    again.set_statistics(replace(statistics, nonzero_cells=torch.full((N_GENES,), 4)))  # the size came back, too
    with pytest.raises(CellmillError, match="min_cells 5"):
        again.embed_inputs(cells)


@pytest.mark.parametrize("n_cross_heads", [1, 8])
def test_other_cross_heads_come_back(tmp_path, n_cross_heads):
    write(small_model(n_cross_heads=n_cross_heads), meta(), tmp_path)
    assert read(tmp_path / WEIGHTS).model.sizes.n_cross_heads == n_cross_heads


@pytest.mark.parametrize("prototype", [False, True])
@pytest.mark.parametrize("mask_mode", ["paper", "released"])
def test_an_export_comes_back(tmp_path, mask_mode, prototype):
    model = small_model(mask_mode=mask_mode, prototype_layer=prototype)
    write(model, meta(), tmp_path)
    plain(tmp_path / WEIGHTS)  # the names and shapes are the published ones
    again, genes, remarks = read(tmp_path / WEIGHTS, genes=tmp_path / GENES)
    assert genes == meta()["feature_ids"]
    assert remarks == []
    assert again.sizes.mask_mode == mask_mode
    ours, theirs = model_tensors(model), model_tensors(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(name.startswith("prototype.") for name in theirs.keys() - ours.keys())
    cells = make_batch([{0: 3, 4: 1, 7: 2}])
    assert torch.equal(model.embed_cells(model.embed_inputs(cells)), again.embed_cells(again.embed_inputs(cells)))


def test_a_classifier_is_read_without_its_head(tmp_path):
    write(small_model(), meta(), tmp_path)
    content = torch.load(tmp_path / WEIGHTS, weights_only=True)
    tensors = content["state_dict"]
    genes = tensors["gene_emb.weight"]
    tensors["gene_emb.weight"] = torch.cat([genes, torch.randn(1, genes.shape[1])])
    tensors["mlp_classify.0.weight"] = torch.ones(8)
    torch.save(content, tmp_path / "classifier.ckpt")
    model, _, remarks = read(tmp_path / "classifier.ckpt", genes=tmp_path / GENES)
    assert torch.equal(model.gene_embedding.weight, genes)
    assert "the classifier's query" in remarks[0]
    assert "1 tensors are not used (mlp_classify.0.weight)" in remarks[1]


def test_a_list_of_genes_has_no_standardiser(tmp_path):
    write(small_model(), meta(), tmp_path)
    (tmp_path / "list.txt").write_text("\n".join(meta()["feature_ids"]) + "\n")
    model, genes, remarks = read(tmp_path / WEIGHTS, genes=tmp_path / "list.txt")
    assert genes == meta()["feature_ids"]
    assert len(remarks) == 1
    assert "mean 0, standard deviation 1" in remarks[0]
    assert torch.equal(model.mean, torch.zeros(N_GENES))
    assert torch.equal(model.std, torch.ones(N_GENES))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda content: content.pop("hyper_parameters"), "does not say its number of genes"),
        (lambda content: content["hyper_parameters"].pop("nhead"), "does not say its number of heads"),
        (lambda content: content["hyper_parameters"].update(query_dim=4), "only equal widths"),
        (lambda content: content["hyper_parameters"].update(query_len=5), "other shapes.*query_emb is \\[3, 8\\]"),
        (lambda content: content["hyper_parameters"].update(seq_len=11), "other shapes.*gene_emb"),
        (lambda content: content["hyper_parameters"].update(nhead=3), "width 8 is no multiple of n_heads 3"),
        (lambda content: content["hyper_parameters"].update(num_layers=3), "lacks 12 of the"),
        (lambda content: content["hyper_parameters"].update(n_mask="2"), "n_mask is no whole number"),
        (lambda content: content["hyper_parameters"].update(n_mask=2.5), "n_mask is no whole number"),
        (lambda content: content["hyper_parameters"].update(n_mask=-1), "n_mask is no whole number"),
        (lambda content: content["hyper_parameters"].update(n_mask=11), "n_mask is no whole number that fits"),
        (lambda content: content["hyper_parameters"].update(n_cross_heads=0), "n_cross_heads is no whole number"),
        (lambda content: content["hyper_parameters"].update(n_cross_heads=3), "no multiple of n_cross_heads 3"),
        (lambda content: content["hyper_parameters"].update(min_cells=2**70), "min_cells is no whole number"),
        (lambda content: content["state_dict"].pop("query_emb"), "lacks 1 of the.*query_emb"),
        (lambda content: content["state_dict"]["query_emb"].fill_(torch.nan), "not finite"),
        (lambda content: content.pop("state_dict"), "holds no state_dict"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, damage, sentence):
    write(small_model(), meta(), tmp_path)
    content = torch.load(tmp_path / WEIGHTS, weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.ckpt")
    with pytest.raises(CellmillError, match=sentence):
        read(tmp_path / "damaged.ckpt")


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(CellmillError, match="is refused: it holds more than tensors"):
        read(tmp_path / "evil.ckpt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "list.txt does not exist"),
        ("A\nB\n", "holds 2 genes, 2 of them different, and the model has 10"),
        ("A\n" * 10, "holds 10 genes, 1 of them different"),
        ("A\t1\n" * 10, "a line of 2 columns"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\tx\t1\n" for i in range(10)), "no number"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\t1\t-1\n" for i in range(10)), "no usable mean and std of G0"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\tnan\tnan\n" for i in range(10)), "no usable mean and std"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\t1\tnan\n" for i in range(10)), "no usable mean and std"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\tnan\t1\n" for i in range(10)), "no usable mean and std of G0"),
        ("gene\tmean\tstd\n" + "".join(f"G{i}\t1\tinf\n" for i in range(10)), "no usable mean and std of G0"),
    ],
)
def test_foreign_genes_are_refused(tmp_path, text, sentence):
    write(small_model(), meta(), tmp_path)
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(CellmillError, match=sentence):
        read(tmp_path / WEIGHTS, genes=tmp_path / "list.txt")
