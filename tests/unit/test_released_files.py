"""Files of others: plain values are read, and whatever is damaged, foreign or malicious ends in one sentence."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.models.exceiver import Exceiver
from cellmill.models.geneformer import Geneformer
from cellmill.models.scmulan import Scmulan
from cellmill.released import files, read_released, write_released
from cellmill.released.files import read_dictionary, read_json, read_torch, state_dict_of
from model_cells import statistics_of_medians
from safetensors.torch import load_file, save_file

DTYPE, SCALAR = b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n"


def text(word: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def made(function: bytes, *arguments: bytes) -> bytes:
    """The opcodes that call a function."""
    return function + b"(" + b"".join(arguments) + b"tR"


def kind(name: str, *state: bytes) -> bytes:
    """The opcodes of a numpy dtype, and of its state where that is given."""
    dtype = made(DTYPE, text(name), b"K\x00", b"K\x01")
    return dtype + b"(" + b"".join(state) + b"tb" if state else dtype


def dictionary(value: bytes) -> bytes:
    """A pickle of {"a": value}."""
    return b"\x80\x03}" + text("a") + value + b"s."


EIGHT = b"C\x08" + b"\x41" * 8  # an address of the attacker's choice
NONE, LESS, MINUS, ZERO = b"N", text("|"), b"J\xff\xff\xff\xff", b"K\x00"
FIELDS = b"}" + text("f") + b"(" + kind("O", b"K\x03", LESS, NONE, NONE, NONE, MINUS, MINUS, ZERO) + ZERO + b"ts"
NAMES = b"(" + text("f") + b"t"
ATTACKS = {
    "a field of objects in a record whose flags are cleared": made(
        SCALAR, kind("V8", b"K\x03", LESS, NONE, NAMES, FIELDS, b"K\x08", b"K\x01", ZERO), EIGHT
    ),
    "an object whose flags are cleared": made(
        SCALAR, kind("O", b"K\x03", LESS, NONE, NONE, NONE, MINUS, MINUS, ZERO), EIGHT
    ),
    "a record": made(SCALAR, kind("V8"), EIGHT),
    "text": made(SCALAR, kind("S8"), EIGHT),
    "an array's constructor": b"cnumpy\nndarray\n",
    "another encoding": made(b"c_codecs\nencode\n", text("a"), text("rot13")),
    "no dtype": made(SCALAR, text("f8"), EIGHT),
    "too few bytes": made(SCALAR, kind("f8"), b"C\x04" + b"\x41" * 4),
    "a changed function": SCALAR + b"N}" + text("__defaults__") + b"(Nts\x86b",
    "a call": b"cposix\nsystem\n" + text("true") + b"\x85R",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_pickles(tmp_path, attack):
    """Read in another process, so that what crashes shows as a failure."""
    path = tmp_path / "dictionary.pkl"
    path.write_bytes(dictionary(ATTACKS[attack]))
    code = (
        "import sys; from pathlib import Path; from cellmill.errors import CellmillError\n"
        "from cellmill.released.files import read_dictionary\n"
        "try: print(read_dictionary(Path(sys.argv[1])))\n"
        "except CellmillError as error: print('refused:', error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"refused: {path} is refused: it ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickled_numbers(tmp_path, protocol):
    """As numpy pickles them."""
    values = {
        "float64": np.float64(1.1),
        "float32": np.float32(2.5),
        "float16": np.float16(0.5),
        "int64": np.int64(-3),
        "uint8": np.uint8(200),
        "bool": np.bool_(True),
        "plain": [1, 2.0, "x", None],
    }
    expected = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    pickled = pickle.dumps(OrderedDict(values), protocol)
    path = tmp_path / "dictionary.pkl"
    for content in (pickled, gzip.compress(pickled)):
        path.write_bytes(content)
        read = read_dictionary(path)
        assert read == expected
        assert {name: type(value) for name, value in read.items()} == {
            name: type(value) for name, value in expected.items()
        }


def test_big_endian_numbers_and_the_old_module(tmp_path):
    path = tmp_path / "dictionary.pkl"
    state = (b"K\x03", text(">"), NONE, NONE, NONE, MINUS, MINUS, ZERO)
    path.write_bytes(dictionary(made(SCALAR, kind("f8", *state), b"C\x08" + struct.pack(">d", 7.25))))
    assert read_dictionary(path) == {"a": 7.25}


NO_TORCH_FILES = [
    b"<!DOCTYPE html><html>not found</html>",
    b'{"a": 1}',
    b"version https://git-lfs.github.com/spec/v1\n",
    b"",
    b"PK\x03\x04",
    *(np.random.default_rng(seed).bytes(500) for seed in range(20)),
]


@pytest.mark.parametrize("content", NO_TORCH_FILES)
def test_what_is_no_torch_file_is_not_accused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CellmillError, match="cannot be read as a torch file: .*; copy it again") as caught:
        read_torch(path)
    assert "could run code" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reasons_that_say_nothing_are_left_out(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    for error, shown in ((KeyError(119), "format; copy"), (RecursionError("too deep"), r"format \(too deep\); copy")):

        def fails(*_, raised=error, **__):
            raise raised

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(CellmillError, match=shown):
            read_torch(path)


def test_torch_files_with_code_are_refused_by_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"a": Evil()}, tmp_path / "model.pt")
    with pytest.raises(CellmillError, match="refused: .* posix.system, which could run code"):
        read_torch(tmp_path / "model.pt")


def test_files_that_unpack_without_end(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as stored:
        entries = {entry.filename: stored.read(entry) for entry in stored.infolist()}
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, content)
    assert read_torch(tmp_path / "model.pt")["a"].shape == (100_000,)
    with pytest.raises(CellmillError, match="is refused: it is compressed .*data.pkl"):
        read_torch(tmp_path / "packed.pt")
    monkeypatch.setattr(files, "MAX_UNPACKED", 2**20)
    for name, read in (("big.json.gz", read_json), ("big.json", read_dictionary), ("big.pkl", read_dictionary)):
        (tmp_path / name).write_bytes(gzip.compress(b" " * (2**20 - 2) + b"{}"))
        if name != "big.pkl":
            assert read(tmp_path / name) == {}
        (tmp_path / name).write_bytes(gzip.compress(b" " * (2**20 - 1) + b"{}"))
        with pytest.raises(CellmillError, match="is refused: it unpacks to more than 1 MiB"):
            read(tmp_path / name)


def test_damaged_dictionaries(tmp_path):
    packed = gzip.compress(json.dumps({f"gene{i}": i for i in range(1000)}).encode())
    damaged = {
        "damaged.json.gz": packed[:200] + b"\xff" * 50 + packed[250:],
        "cut.json.gz": packed[:-100],
        "deep.json": b"[" * 200_000,
        "cut.pkl.gz": packed[:-100],
        "cut.pkl": pickle.dumps({"a": 1})[:-3],
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CellmillError, match="is no (JSON|pickled dictionary).*; copy it again"):
            read_dictionary(tmp_path / name)
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(CellmillError, match="holds a list, not a dictionary"):
        read_dictionary(tmp_path / "list.pkl")


def strange_tensors() -> dict[str, torch.Tensor]:
    table = torch.ones(3, 3)
    return {
        "sparse": table.to_sparse(),
        "compressed": table.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(table, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([table, table[:2]]),
        "meta": table.to("meta"),
        "complex": table.to(torch.complex64),
        "repeated": torch.ones(1, dtype=torch.float16).expand(100_000, 1_000_000),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind_of_tensor", ["sparse", "compressed", "quantised", "nested", "meta", "complex", "repeated"]
)
def test_tensors_that_are_no_plain_numbers(tmp_path, kind_of_tensor):
    path = tmp_path / "model.pt"
    torch.save({"fine": torch.zeros(2), "odd.weight": strange_tensors()[kind_of_tensor]}, path)
    with pytest.raises(CellmillError, match=r"holds 1 tensors that are not plain .* \(odd.weight\)"):
        state_dict_of(read_torch(path), path)


def test_a_state_dict(tmp_path):
    path = tmp_path / "model.pt"
    tensors = {"half": torch.ones(4, dtype=torch.float16), "n": torch.tensor(3), "part": torch.arange(9.0)[2:5]}
    for legacy in (False, True):
        torch.save(OrderedDict(tensors), path, _use_new_zipfile_serialization=not legacy)
        read = state_dict_of(read_torch(path), path)
        assert read["half"].dtype == torch.float32
        assert read["n"].item() == 3
        assert read["part"].tolist() == [2, 3, 4]
    for content in ({3: torch.zeros(1)}, {}, [torch.zeros(1)], {"a": 1}, None):
        with pytest.raises(CellmillError, match="holds no state_dict"):
            state_dict_of(content, path)


def exported(architecture: str, folder) -> None:
    """A small random model in its published layout."""
    genes = [f"ENSG{gene:011d}" for gene in range(9)]
    if architecture == "geneformer":
        sizes = Geneformer.Sizes(version="V2", n_layers=2, width=16, n_heads=2, hidden=24, max_length=12, dropout=0.02)
        model = Geneformer(sizes, 9, statistics_of_medians(np.ones(9)))
    elif architecture == "exceiver":
        model = Exceiver(Exceiver.Sizes(width=16, n_latents=4, n_layers=2, n_heads=2, hidden=24), 9)
        model.mean.zero_()
        model.std.fill_(1)
    else:
        sizes = Scmulan.Sizes(n_layers=2, width=12, n_heads=3, max_length=40, unprompted=0.0, n_model_genes=9)
        model = Scmulan(sizes, 9, categories={"cell_type": ["T cell"]})
    write_released(architecture, model, {"feature_ids": genes}, folder)


def claim(architecture: str, folder, **settings) -> str:
    """Change the settings of an exported model; returns what to read."""
    if architecture == "geneformer":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder
    path = folder / {"exceiver": "exceiver.ckpt", "scmulan": "ckpt_scMulan.pt"}[architecture]
    content = torch.load(path, weights_only=True)
    content[{"exceiver": "hyper_parameters", "scmulan": "model_args"}[architecture]] |= settings
    torch.save(content, path)
    return path


CLAIMS = [
    ("geneformer", {"num_hidden_layers": 10**5}),
    ("geneformer", {"hidden_size": 10**7}),
    ("geneformer", {"intermediate_size": 10**10}),
    ("geneformer", {"max_position_embeddings": 10**12}),
    ("geneformer", {"hidden_size": 10**30}),
    ("exceiver", {"num_layers": 10**5}),
    ("exceiver", {"query_dim": 10**7, "seq_dim": 10**7}),
    ("exceiver", {"seq_len": 10**10}),
    ("exceiver", {"query_len": 10**10}),
    ("exceiver", {"dim_feedforward": 10**10}),
    ("scmulan", {"n_layer": 10**5}),
    ("scmulan", {"n_embd": 3 * 10**6}),
    ("scmulan", {"n_embd": 3 * 10**30}),
    ("scmulan", {"dropout": "a lot"}),
]


@pytest.mark.parametrize(("architecture", "settings"), CLAIMS)
def test_settings_that_claim_more_than_the_tensors_hold(tmp_path, architecture, settings):
    """They are refused at once, and nothing of the claimed size is built."""
    exported(architecture, tmp_path)
    read_released(architecture, claim(architecture, tmp_path))
    path = claim(architecture, tmp_path, **settings)
    started = time.monotonic()
    with pytest.raises(CellmillError, match="lacks|other shapes|make no model|impossible") as caught:
        read_released(architecture, path)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "part", "name"),
    [
        ("exceiver", "state_dict", "gene_emb.weight"),
        ("exceiver", "state_dict", "query_emb"),
        ("scmulan", "model", "transformer.wte.weight"),
    ],
)
def test_a_number_in_the_place_of_a_table(tmp_path, architecture, part, name):
    exported(architecture, tmp_path)
    path = claim(architecture, tmp_path)
    content = torch.load(path, weights_only=True)
    content[part][name] = torch.tensor(1.0)
    if architecture == "exceiver":
        content[part]["mlp_classify.0.weight"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(CellmillError, match="other shapes"):
        read_released(architecture, path)


def test_geneformers_table_is_no_number(tmp_path):
    exported("geneformer", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CellmillError, match="other shapes"):
        read_released("geneformer", tmp_path)
