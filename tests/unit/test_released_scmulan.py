"""scMulan's released layout: what is written is read back, the real vocabulary fits, what does not fit is refused."""

import gzip
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cellmill.checkpoints import model_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import parameter_counts
from cellmill.models.scmulan import Scmulan
from cellmill.released import read_released, write_released
from cellmill.released.scmulan import META, SETS, WEIGHTS
from model_cells import make_batch, statistics_of_medians

GENES = [f"GENE{i}" for i in range(9)]
CATEGORIES = {
    "tissue_general": ["lung", "blood"],
    "cell_type": ["T cell", "B cell"],
    "tissue": ["alveoli", "blood"],  # blood is a word of two columns
    "sex": ["M", "F"],
}
SIZES = Scmulan.Sizes(n_layers=2, width=12, n_heads=3, max_length=40, unprompted=0.0, n_model_genes=9)
REAL = "vocab/scmulan_meta_info.json.gz"


def model_of(n_genes=9, categories=CATEGORIES, sizes=SIZES, statistics=None) -> Scmulan:
    torch.manual_seed(0)
    model = Scmulan(sizes, n_genes, statistics, categories)
    for parameter in model.parameters():  # norms, too, tell right from wrong
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def released(tmp_path):
    """A model and its folder."""
    model = model_of()
    write_released("scmulan", model, {"feature_ids": GENES}, tmp_path / "scmulan")
    return model, tmp_path / "scmulan"


def change(path, **changes) -> None:
    """Put other values into a torch file's dictionary; None takes one away."""
    with torch.serialization.safe_globals([set]):
        content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def content_of(folder) -> dict:
    return torch.load(folder / WEIGHTS, weights_only=True)


def assert_same(model: Scmulan, other: Scmulan) -> None:
    ours, theirs = model_tensors(model), model_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_what_is_written_is_read_back(released):
    model, folder = released
    again = read_released("scmulan", folder)
    assert_same(model, again.model)
    assert again.model.sizes == model.sizes
    assert again.model.categories == {**{column: [] for column in SETS}, **CATEGORIES}
    assert again.genes == GENES
    assert again.remarks == []
    cells = make_batch([{0: 3, 4: 5}, {8: 1}])
    with torch.inference_mode():
        for pooling in model.poolings:
            a, b = (m.embed_cells(m.embed_inputs(cells), pooling) for m in (model, again.model))
            assert torch.equal(a, b)


def published_forward(tensors: dict, n_heads: int, words: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """States [L, D], logits and values [L, T] of one sentence, from the released names and the published arithmetic."""
    tokens, values = torch.tensor(words).T
    x_LD = tensors["transformer.wte.weight"][tokens] + tensors["transformer.wee.weight"][values]
    length, width = x_LD.shape

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), tensors[name], eps=1e-5)

    for i in range(sum(name.endswith("ln_1.weight") for name in tensors)):
        block = f"transformer.h.{i}."
        q, k, v = (normed(x_LD, block + "ln_1.weight") @ tensors[block + "attn.c_attn.weight"].T).split(width, dim=1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.split(width // n_heads, dim=1) for part in (q, k, v)), strict=True):
            scores_LL = q_h @ k_h.T / math.sqrt(width // n_heads)
            future_LL = torch.ones(length, length).triu(1).bool()
            heads.append(scores_LL.masked_fill(future_LL, -torch.inf).softmax(1) @ v_h)
        x_LD = x_LD + torch.cat(heads, 1) @ tensors[block + "attn.c_proj.weight"].T
        a = normed(x_LD, block + "ln_2.weight") @ tensors[block + "mlp.c_fc.weight"].T
        a = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x_LD = x_LD + a @ tensors[block + "mlp.c_proj.weight"].T
    h_LD = normed(x_LD, "transformer.ln_f.weight")
    return h_LD, h_LD @ tensors["lm_head.weight"].T, h_LD @ tensors["epx_head.weight"].T


def published_reading(tensors: dict, n_heads: int, words: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
    """The last word but one's state in the last of at most three forwards, and what was said, of one cell."""
    said = []
    for _ in range(3):
        h_LD, logits_LT, values_LT = published_forward(tensors, n_heads, words)
        logits_T = logits_LT[-1].clone()
        logits_T[[token for token, _ in words[:-1]]] = -torch.inf
        token = int(logits_T.argmax())
        words = [*words, (token, round(min(max(float(values_LT[-1, token]), 0), 10)))]
        said.append(token)
        if token == 0:
            break
    return h_LD[-2], said


def test_the_arithmetic_is_the_published_one(released):
    """From the file alone: states and both heads, and the released pooling cell by cell, however the model goes on."""
    model, folder = released
    random = np.random.default_rng(0)
    cells = [{int(g): int(random.integers(1, 90)) for g in random.permutation(9)[: 1 + i % 9]} for i in range(120)]
    inputs = model.embed_inputs(make_batch(cells))
    content = content_of(folder)
    content["model"]["epx_head.weight"] *= 5  # values of 0 to 10
    content["model"]["lm_head.weight"][[0, model.pct]] = torch.randn(2, 12, generator=torch.Generator().manual_seed(14))
    torch.save(content, folder / WEIGHTS)
    tensors, model = content["model"], read_released("scmulan", folder).model
    with torch.inference_mode():
        h_ND, layout = model.encode(inputs), inputs["layout"]
        states_BD = model.embed_cells(inputs, "released")
        said = []
        for row in range(len(cells)):
            span = slice(layout.starts[row], layout.ends[row])
            words = list(zip(inputs["tokens"][span].tolist(), inputs["values"][span].tolist(), strict=True))
            h_LD, logits_LT, values_LT = published_forward(tensors, SIZES.n_heads, words)
            torch.testing.assert_close(h_ND[span], h_LD, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.logits(h_ND[span]), logits_LT, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model.bins(h_ND[span]), values_LT, atol=1e-5, rtol=1e-5)
            state_D, tokens = published_reading(tensors, SIZES.n_heads, words)
            torch.testing.assert_close(states_BD[row], state_D, atol=1e-5, rtol=1e-5)
            said.append(tokens)
    assert {len(tokens) for tokens in said} == {1, 2, 3}  # with <E> as the first word, as the second, or neither
    assert {model.pct, 0} < {tokens[0] for tokens in said}  # <PCT> may be said again


def test_a_released_file_comes_back_as_it_was(released, tmp_path):
    _, folder = released
    again = read_released("scmulan", folder / WEIGHTS)
    write_released("scmulan", again.model, {"feature_ids": again.genes}, tmp_path / "again")
    one, other = content_of(folder), content_of(tmp_path / "again")
    assert one["model_args"] == other["model_args"]
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def test_the_layout_is_the_published_one(released):
    _, folder = released
    content = content_of(folder)
    shapes = {name: list(tensor.shape) for name, tensor in content["model"].items()}
    layers = {
        **{"ln_1.weight": [12], "attn.c_attn.weight": [36, 12], "attn.c_proj.weight": [12, 12]},
        **{"ln_2.weight": [12], "mlp.c_fc.weight": [48, 12], "mlp.c_proj.weight": [12, 48]},
    }
    n_tokens = 1 + 9 + 8 + 16
    assert shapes == {
        **{"transformer.wte.weight": [n_tokens, 12], "transformer.wee.weight": [11, 12]},
        **{f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in layers.items()},
        **{"transformer.ln_f.weight": [12], "lm_head.weight": [n_tokens, 12], "epx_head.weight": [n_tokens, 12]},
    }
    assert content["model_args"]["vocab_size"] == n_tokens
    with torch.serialization.safe_globals([set]):
        meta = torch.load(folder / META, weights_only=True)
    assert meta["token_set"][:12] == ["<E>", *GENES, "lung", "blood"]
    assert meta["token_set"][14:19] == ["alveoli", "tissue: blood", "M", "F", "<PCT>"]
    assert meta["organ"] == {"lung", "blood"}


@pytest.mark.parametrize(("n_model_genes", "n_chosen"), [(3, 3), (8, 7)])
def test_only_the_genes_that_are_words_are_written(tmp_path, n_model_genes, n_chosen):
    """Of nine genes two are never expressed, so that eight words are more than there are genes."""
    medians = torch.ones(9)
    variable = torch.tensor([0.1, 2, 0.1, 3, 0.1, torch.nan, torch.nan, 1, 0.1])
    statistics = replace(
        statistics_of_medians(medians),
        nonzero_cells=torch.full((9,), 50),
        mean_log1p_cp10k=torch.where(variable.isnan(), torch.nan, torch.arange(1.0, 10)),
        std_log1p_cp10k=variable,
    )
    model = model_of(sizes=replace(SIZES, n_model_genes=n_model_genes), statistics=statistics)
    chosen = [GENES[gene] for gene in (model.token_V >= 0).nonzero().squeeze(1)]
    write_released("scmulan", model, {"feature_ids": GENES}, tmp_path)
    again = read_released("scmulan", tmp_path)
    assert len(chosen) == n_chosen
    assert again.genes == chosen + [f"<no gene {i}>" for i in range(n_chosen + 1, n_model_genes + 1)]
    assert torch.equal(again.model.word_embedding.weight, model.word_embedding.weight)


def test_the_published_vocabulary(data, tmp_path):
    """The real meta_info, with random weights of a narrow model: 2,222 tokens in seven columns."""
    source = data / REAL
    meta = json.loads(gzip.decompress(source.read_bytes()))
    narrow = replace(SIZES, n_model_genes=2000)
    published = Scmulan.published_categories["published"]
    model = model_of(2000, published, narrow)
    write_released("scmulan", model, {"feature_ids": meta["gene_set"]}, tmp_path)
    (tmp_path / META).unlink()
    shutil.copy(source, tmp_path / "meta_info.json.gz")
    read = read_released("scmulan", tmp_path)
    assert_same(model, read.model)
    words = read.model.categories
    assert {column: len(values) for column, values in words.items()} == {
        column: len(values) for column, values in published.items()
    }
    assert [word for values in words.values() for word in values] == meta["token_set"][2001:2206]
    assert words["tissue_general"][:2] == ["Lung", "Thymus"]
    assert words["sex"] == ["F", "M"]
    assert "Unclassified" in words["cell_type"]
    assert read.genes == meta["gene_set"]
    assert parameter_counts(read.model)["total"] == parameter_counts(model)["total"]
    # as a torch file with sets, beside the weights or elsewhere
    sets = {name: set(meta[name]) for names in SETS.values() for name in names}
    (tmp_path / "elsewhere").mkdir()
    torch.save(meta | sets, tmp_path / "elsewhere" / META)
    again = read_released("scmulan", tmp_path / WEIGHTS, tmp_path / "elsewhere" / META)
    assert again.model.categories == words


def test_what_surrounds_the_tensors_is_tolerated(released):
    model, folder = released
    content = content_of(folder)
    tensors = {f"_orig_mod.{name}": tensor.half() for name, tensor in content["model"].items()}
    tensors["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
    torch.save(content | {"model": tensors, "iter_num": 3}, folder / WEIGHTS)
    read = read_released("scmulan", folder)
    assert len(read.remarks) == 1
    assert "1 tensors are not used (transformer.h.0.attn.bias)" in read.remarks[0]
    assert read.model.norm.weight.dtype == torch.float32
    torch.testing.assert_close(read.model.norm.weight, model.norm.weight, atol=1e-3, rtol=1e-3)


def refused(folder, fault: str, genes=None) -> None:
    with pytest.raises(CellmillError, match=re.escape(fault)) as error:
        read_released("scmulan", folder, genes)
    assert "\n" not in str(error.value)


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", [WEIGHTS, META])
def test_a_pickle_with_code_is_refused_and_not_run(released, tmp_path, name):
    _, folder = released
    change(folder / name, extra=Shell(tmp_path / "ran"))
    refused(folder, "which could run code")
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files_are_refused(released):
    _, folder = released
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot be read as a torch file")
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS} does not exist")
    (folder / WEIGHTS).write_bytes(whole)
    (folder / META).unlink()
    refused(folder, "holds no meta_info.pt or meta_info.json or meta_info.json.gz")


def test_foreign_weights_are_refused(released):
    _, folder = released
    content = content_of(folder)
    tensors, arguments = content["model"], content["model_args"]
    name = "transformer.h.1.mlp.c_fc.weight"
    no_bias_said = {n: v for n, v in arguments.items() if n != "bias"}
    biases = {f"transformer.h.{i}.ln_1.bias": torch.ones(12) for i in range(2)}
    for changes, fault in (
        (
            {"model": {n: t for n, t in tensors.items() if n != name}},
            f"tensors of a Scmulan ({name}); it is of another",
        ),
        ({"model": tensors | {name: torch.zeros(5, 12)}}, f"{name} is [5, 12], expected [48, 12]"),
        ({"model": tensors | {name: torch.full((48, 12), torch.nan)}}, "values that are not finite"),
        ({"model": {}}, "holds no state_dict"),
        ({"model_args": None}, "holds no model_args and model"),
        ({"model_args": {n: v for n, v in arguments.items() if n != "n_head"}}, "model_args lacks n_head"),
        ({"model_args": arguments | {"n_layer": 3}}, "lacks 6 of the"),
        ({"model_args": arguments | {"n_head": 5}}, "model_args are impossible"),
        ({"model_args": arguments | {"bias": True}}, "is of another scMulan"),
        (
            {"model_args": no_bias_said, "model": tensors | biases},
            "holds 2 biases (the first is transformer.h.0.ln_1.bias)",
        ),
        ({"model_args": arguments | {"expression_level": 50}}, "is of another scMulan"),
    ):
        torch.save(content, folder / WEIGHTS)
        change(folder / WEIGHTS, **changes)
        refused(folder, fault)


def test_another_vocabulary_is_refused(released):
    _, folder = released
    whole = (folder / META).read_bytes()
    with torch.serialization.safe_globals([set]):
        meta = torch.load(folder / META, weights_only=True)
    tokens = meta["token_set"]
    for changes, fault in (
        ({"gene_set": GENES[:-1], "token_set": [t for t in tokens if t != GENES[-1]]}, "has 34 tokens and"),
        ({"gene_set": GENES[::-1]}, "its tokens are not <E>, the genes, the words, <PCT>"),
        ({"token_set": tokens[:-1]}, "its tokens are not <E>, the genes, the words, <PCT>"),
        ({"token_set": [tokens[1], *tokens[1:]]}, "token_set holds a word twice"),
        ({"organ": set()}, "the word 'lung' stands in none of the lists"),
        ({"MCT": None}, "is no meta_info of scMulan: it lacks MCT"),
        ({"gene_set": 5}, "gene_set is no list of words"),
    ):
        (folder / META).write_bytes(whole)
        change(folder / META, **changes)
        refused(folder, fault)
