"""scGPT equals the `scgpt` wheel's own TransformerModel with the weights that we export: states, losses, a gradient.

The wheel's package imports torchtext and other things that no longer install; its `model/model.py` needs none of them,
so it is loaded beneath stand-ins of its packages. The wheel holds no generative attention (its `generate` lets all
tokens see all, its `TransformerGenerator` is the perturbation model): here its own layers get the paper's rule as mask.
"""

import importlib
import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cellmill.models.base import total_loss
from cellmill.models.packing import uniform
from cellmill.models.scgpt import PAD_VALUE, Scgpt
from cellmill.released import read_released, write_released
from model_cells import make_batch
from shard_cells import real_cells

N_GENES = 32_786
SMALL = {"n_layers": 3, "width": 48, "n_heads": 4, "hidden": 40, "max_length": 151}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def wheel():
    """The wheel's `scgpt.model.model`."""
    found = importlib.util.find_spec("scgpt")
    if found is None:
        pytest.skip("scgpt is not installed; `pip install --no-deps -r envs/parity.txt` puts it beside envs/lock.txt")
    package = Path(found.submodule_search_locations[0])
    stand_ins = {"scgpt": package, "scgpt.model": package / "model"}
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in stand_ins.items():
            module = types.ModuleType(name)
            module.__path__ = [str(folder)]
            patch.setitem(sys.modules, name, module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # flash_attn is not installed
            yield importlib.import_module("scgpt.model.model")
        for name in [name for name in sys.modules if name.startswith("scgpt.")]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def cells(data):
    """Real cells, and two short ones that the wheel pads beside them."""
    real = real_cells(data, "celltypist_sample")[0].take([0, 5, 9])
    return type(real).concatenate([make_batch([{7: 2, 11: 1, 500: 1, 3000: 4}, {9: 1}]), real])


def theirs_of(wheel, folder: Path):
    """The wheel's model with released files, built from args.json as its `embed_data` builds it, and its vocabulary."""
    args, vocab = (json.loads((folder / name).read_text()) for name in ("args.json", "vocab.json"))
    theirs = wheel.TransformerModel(
        ntoken=len(vocab),
        d_model=args["embsize"],
        nhead=args["nheads"],
        d_hid=args["d_hid"],
        nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"],
        n_cls=1,
        vocab=vocab,
        dropout=args["dropout"],
        pad_token=args["pad_token"],
        pad_value=args["pad_value"],
        do_mvc=True,
        input_emb_style=args["input_emb_style"],
    )
    tensors = torch.load(folder / "best_model.pt", weights_only=True)
    theirs.load_state_dict({name.replace("Wqkv.", "in_proj_"): tensor for name, tensor in tensors.items()})
    return theirs.eval(), vocab


@pytest.fixture(scope="module")
def both(wheel, tmp_path_factory):
    """Our model with random weights, and the wheel's with our export."""
    torch.manual_seed(0)
    ours = Scgpt(Scgpt.Sizes(**SMALL, flag_embedding=False, dropout=0.0), N_GENES).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("export")
    write_released("scgpt", ours, {"feature_ids": [f"GENE{gene}" for gene in range(N_GENES)]}, folder)
    theirs, vocab = theirs_of(wheel, folder)
    assert [vocab[token] for token in ("GENE7", "<pad>", "<cls>")] == [7, ours.pad, ours.cls]
    return ours, theirs


def matrices(ours, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and values as the wheel takes them: [B, L], padded."""
    layout = inputs["layout"]
    return layout.to_matrix(inputs["tokens"].long(), ours.pad), layout.to_matrix(inputs["values"].float(), PAD_VALUE)


def test_all_outputs_of_the_wheel(both, cells):
    ours, theirs = both
    inputs = ours.embed_inputs(cells)
    tokens, values = matrices(ours, inputs)
    used = tokens != ours.pad
    assert 100 < (~used).sum() < used.numel() / 2
    assert used.sum() == len(inputs["tokens"])
    with torch.inference_mode():
        out = theirs(tokens, values, src_key_padding_mask=~used, MVC=True, CLS=True)
        states = theirs._encode(tokens, values, ~used)
        h, genes = ours.states(inputs), ours._genes(inputs["tokens"])
        cls = h[inputs["layout"].starts]
        torch.testing.assert_close(h, states[used], **CLOSE)
        torch.testing.assert_close(ours._decode(h), out["mlm_output"][used], **CLOSE)
        torch.testing.assert_close(cls, out["cell_emb"], **CLOSE)
        torch.testing.assert_close(
            ours._decode_from_cell(cls, genes, inputs["layout"]), out["mvc_output"][used], **CLOSE
        )
        torch.testing.assert_close(ours.cls_decoder(cls), out["cls_output"], **CLOSE)
        normed = out["cell_emb"] / out["cell_emb"].norm(dim=1, keepdim=True)
        torch.testing.assert_close(ours.embed_cells(inputs), normed, **CLOSE)
    assert out["mlm_output"].std() > 1e-3
    assert (normed[0] - normed[2]).abs().max() > 1e-2


def test_the_wheels_generate_is_no_generative_attention(both, cells):
    """Its cell state goes in place of <cls>, as ours; but its genes, without values, all see each other."""
    ours, theirs = both
    tokens = ours.embed_inputs(cells.take([2]))["tokens"][:40].long()
    torch.manual_seed(1)
    state = torch.randn(1, SMALL["width"])
    with torch.inference_mode():
        (out,) = theirs.generate(state, tokens[None])
        h, _ = ours.encode(torch.cat([state, ours._genes(tokens)[1:]]), uniform(1, 40))
        torch.testing.assert_close(ours._decode(h), out, **CLOSE)
        asked = {"tokens": tokens[:1], "values": torch.tensor([PAD_VALUE]), "layout": uniform(1, 1)}
        alone = ours.predict(asked | {"asked": tokens[1:], "layout_asked": uniform(1, 39)}, state).gep_G
    assert (alone - out[1:]).abs().max() > 1e-3


def generative_loss(theirs, inputs, pad: int) -> torch.Tensor:
    """The paper's objective by the wheel's layers: perceived tokens and hidden genes in one sequence, under a mask."""
    layout = inputs["layout_asked"]
    asked, targets = layout.to_matrix(inputs["asked"].long(), pad), layout.to_matrix(inputs["targets"])
    perceived = inputs["layout"].to_matrix(inputs["tokens"].long(), pad)
    values = inputs["layout"].to_matrix(inputs["values"].float(), PAD_VALUE)
    tokens = torch.cat([perceived, asked], dim=1)
    n, length = perceived.shape[1], tokens.shape[1]
    open_keys = torch.zeros(len(tokens), length, dtype=torch.bool)
    open_keys[:, :n] = perceived != pad
    closed = ~(open_keys[:, None, :] | torch.eye(length, dtype=torch.bool))
    closed = closed.repeat_interleave(SMALL["n_heads"], dim=0)
    genes = theirs.encoder(tokens)
    x = genes + F.pad(theirs.value_encoder(values), (0, 0, 0, asked.shape[1]))
    hidden = asked != pad
    loss, cell = 0, None
    for _ in range(2):
        if cell is not None:  # the second pass: the cell's own state as prompt
            x = torch.cat([cell.detach()[:, None], x[:, 1:]], dim=1)
        states = theirs.transformer_encoder(x, mask=closed)
        predicted = [theirs.decoder(states)["pred"][:, n:]]
        if cell is None:
            cell = states[:, 0]
            predicted.append(theirs.mvc_decoder(cell, genes)["pred"][:, n:])
        loss = loss + sum(F.mse_loss(p[hidden], targets[hidden]) for p in predicted)
    return loss


def test_loss_and_gradient_under_the_papers_mask(both, cells):
    ours, theirs = both
    inputs = ours.pretrain_inputs(cells, seed=0, step=None)
    ours.zero_grad()
    theirs.train().zero_grad()  # dropout is 0; torch's fused evaluation has no gradient
    loss, expected = total_loss(ours(inputs)), generative_loss(theirs, inputs, ours.pad)
    torch.testing.assert_close(loss, expected, **CLOSE)
    (loss / expected.detach()).backward()
    (expected / expected.detach()).backward()
    pairs = {
        "encoder.embedding.weight": ours.gene_embedding.weight,
        "value_encoder.linear1.weight": ours.value_encoder.linear1.weight,
        "transformer_encoder.layers.0.self_attn.in_proj_weight": ours.layers[0].attention.qkv.weight,
        "transformer_encoder.layers.2.self_attn.out_proj.weight": ours.layers[2].attention.out.weight,
        "transformer_encoder.layers.1.linear1.weight": ours.layers[1].linear1.weight,
        "decoder.fc.0.weight": ours.decoder[0].weight,
        "mvc_decoder.W.weight": ours.mvc_weight.weight,
        "mvc_decoder.gene2query.bias": ours.mvc_query.bias,
    }
    parameters = dict(theirs.named_parameters())
    for name, parameter in pairs.items():
        assert parameters[name].grad.abs().max() > 1e-6, name
        torch.testing.assert_close(
            parameter.grad, parameters[name].grad, **CLOSE, msg=lambda said, at=name: f"{at}: {said}"
        )
    theirs.eval()


def test_a_file_of_the_wheel_is_read(wheel, cells, tmp_path):
    """Saved by the wheel's own module, specials in front, torch's spelling: read here, the same cell embedding."""
    vocab = {"<pad>": 0, "<cls>": 1, "<eoc>": 2} | {f"GENE{gene}": 3 + gene for gene in range(N_GENES)}
    torch.manual_seed(0)
    shape = {"d_model": 32, "nhead": 4, "d_hid": 64, "nlayers": 2, "nlayers_cls": 3, "n_cls": 1}
    theirs = wheel.TransformerModel(len(vocab), **shape, vocab=vocab, pad_value=-2, do_mvc=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "best_model.pt")
    args = {"embsize": 32, "nheads": 4, "d_hid": 64, "nlayers": 2, "n_layers_cls": 3, "pad_value": -2}
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    ours, genes, remarks = read_released("scgpt", tmp_path)
    assert genes[7] == "GENE7"
    assert remarks == []
    inputs = ours.embed_inputs(cells)
    to_theirs = torch.cat([torch.arange(N_GENES) + 3, torch.arange(3)])
    with torch.inference_mode():
        tokens, values = matrices(ours, inputs)
        tokens = to_theirs[tokens]
        out = theirs(tokens, values, src_key_padding_mask=tokens == 0)
        torch.testing.assert_close(ours.embed_cells(inputs), F.normalize(out["cell_emb"], dim=1), **CLOSE)
