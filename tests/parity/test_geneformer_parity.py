"""Geneformer equals Hugging Face's BertForMaskedLM with the same weights: all logits, all layers, in float32."""

import pytest
import torch
from cellmill.models.base import total_loss
from cellmill.models.geneformer import PAD, Geneformer
from cellmill.released import read_released, write_released
from cellmill.views.ragged import select
from model_cells import real_statistics
from shard_cells import real_cells

SMALL = {"n_layers": 3, "width": 48, "n_heads": 4, "hidden": 80, "max_length": 128}
N_GENES = 3000
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def cells(data):
    """Real cells of very different lengths."""
    cells = real_cells(data, "celltypist_sample")[0].take([0, 5, 9, 20])
    few = (cells.cell_of == 1) & (cells.genes < 200)
    return select(cells, few | (cells.cell_of != 1))


def built(sizes, n_genes: int, cells) -> Geneformer:
    """Random weights, biases and norms too; of the published spread, so that float32 has its usual errors."""
    torch.manual_seed(0)
    model = Geneformer(sizes, n_genes, real_statistics(cells, n_genes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
    return model


def in_vocabulary(cells, n_genes: int):
    return select(cells, cells.genes < n_genes)


def written(model, n_genes: int, folder) -> None:
    write_released("geneformer", model, {"feature_ids": [f"ENSG{gene:011d}" for gene in range(n_genes)]}, folder)


def padded(inputs) -> dict[str, torch.Tensor]:
    """What theirs is given: the tokens [B, L], and where there are any."""
    tokens_BL = inputs["layout"].to_matrix(inputs["tokens"])
    return {"input_ids": tokens_BL, "attention_mask": (tokens_BL != PAD).long()}


def same_everywhere(ours: Geneformer, theirs, inputs) -> None:
    """At every token."""
    tokens_N, layout = inputs["tokens"], inputs["layout"]
    with torch.inference_mode():
        out = theirs(**padded(inputs), output_hidden_states=True)
        assert len(out.hidden_states) == ours.sizes.n_layers + 1
        for layer, state_BLD in enumerate(out.hidden_states):
            torch.testing.assert_close(ours.encode(tokens_N, layout, layer), layout.from_matrix(state_BLD), **CLOSE)
        logits_NT = ours.name(ours.encode(tokens_N, layout, ours.sizes.n_layers))
        torch.testing.assert_close(logits_NT, layout.from_matrix(out.logits), **CLOSE)


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_our_export_is_theirs(version, transformers, cells, tmp_path):
    cells = in_vocabulary(cells, N_GENES)
    ours = built(Geneformer.Sizes(version=version, **SMALL), N_GENES, cells)
    written(ours, N_GENES, tmp_path)
    theirs, loading = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert set(loading["unexpected_keys"]) <= {"bert.embeddings.position_ids"}
    inputs = ours.embed_inputs(cells)
    assert inputs["layout"].lengths.min() < inputs["layout"].longest == 128
    same_everywhere(ours, theirs.eval(), inputs)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_their_weights_are_ours(version, safe, transformers, cells, tmp_path):
    cells = in_vocabulary(cells, N_GENES)
    written(built(Geneformer.Sizes(version=version, **SMALL), N_GENES, cells), N_GENES, tmp_path)
    torch.manual_seed(1)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(tmp_path)).eval()
    for file in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        file.unlink()
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    ours = read_released("geneformer", tmp_path).model
    same_everywhere(ours, theirs, ours.embed_inputs(cells))


def test_loss_is_theirs(transformers, cells, tmp_path):
    """The masked positions alone give what labels of -100 elsewhere give."""
    cells = in_vocabulary(cells, N_GENES)
    ours = built(Geneformer.Sizes(version="V2", **SMALL), N_GENES, cells)
    written(ours, N_GENES, tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    inputs = ours.pretrain_inputs(cells, seed=0, step=1)
    labels = torch.full_like(inputs["tokens"], -100)
    labels[inputs["positions"]] = inputs["targets"]
    with torch.inference_mode():
        expected = theirs(**padded(inputs), labels=inputs["layout"].to_matrix(labels, -100)).loss
        torch.testing.assert_close(total_loss(ours(inputs)), expected, **CLOSE)


def test_the_published_v1_10m(transformers, cells, tmp_path):
    """At the published size, on whole cells of up to 2,048 genes."""
    n_genes = Geneformer.published_genes["v1-10m"]
    cells = in_vocabulary(cells.take([0, 1]), n_genes)
    ours = built(Geneformer.presets["v1-10m"], n_genes, cells)
    written(ours, n_genes, tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 10_288_722
    same_everywhere(ours, theirs, ours.embed_inputs(cells))
