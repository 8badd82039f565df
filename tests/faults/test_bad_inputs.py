"""Bad input, as a user meets it: one sentence at the end that says what is wrong, where and how to mend it.

Nothing that was finished is lost, and after mending the same command succeeds.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import yaml
from cellmill.checkpoints import vocabulary_hash
from workflow_runs import ROOT, Workflow, contents, one_model, said, succeeds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

PLAN = "results/tiny/selections/corpus/plan.parquet"
VOCABULARY = "results/tiny/vocabulary/homo_sapiens.parquet"
BLOCK = "results/tiny/selections/corpus/blocks/0.arrow"
CENSUS = "results/tiny/census/soma"
SHARDS = "results/tiny/shards/corpus"
TARGET_SHARDS = "results/tiny/shards/baron_pancreas"
STATISTICS = "results/tiny/statistics.safetensors"
CHECKPOINT = "results/tiny/pretrain/little-scgpt/seed0/checkpoint.json"
EMBEDDING = "results/tiny/embed/baron_pancreas/little-scgpt/seed0.npy"


def cellmill(*arguments) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("cellmill"), *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corpsu": {}}, r"the config: 'corpsu' is not a known key; see docs/config\.md"),
        ({"models": ["scgtp-demo"]}, r"model 'scgtp-demo' is unknown .*; known are .*scgpt-demo"),
        ({"tasks": ["anotation"]}, r"task 'anotation' is unknown .*; known are annotation, integration"),
        ({"baselines": ["hvgpca"]}, r"baseline 'hvgpca' is unknown; known are hvg_pca"),
        ({"seeds": [0.5]}, r"'seeds\.0' is 0\.5: .*see docs/config\.md"),
        ({"census": {"source": "local", "path": "/no/census"}}, r"census\.path is '/no/census', which is no folder"),
        ({"census": {"source": "h5ad", "path": "/no/h5ads"}}, r"'/no/h5ads', .*name the folder of \.h5ad files"),
        (
            {"census": {"gene_tables": {"homo_sapiens": "/no/genes.csv"}}},
            r"census\.gene_tables\.homo_sapiens is '/no/genes\.csv', which is no file",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config(tmp_path, changes, sentence):
    demo = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
    census = demo["census"] | changes.get("census", {})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(demo | changes | {"census": census}))
    assert re.search(sentence, said(cellmill("check", path)))


def test_missing_config(tmp_path):
    assert said(cellmill("check", tmp_path / "no.yaml")).endswith("no.yaml does not exist; name a YAML file that does")


def test_config_that_is_no_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"run: \xff\xfe")
    assert "mine.yaml is not YAML: " in said(cellmill("check", path))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("corpsu", {}, r"the config: 'corpsu' is not a known key"),
        ("models", ["scgtp-demo"], r"model 'scgtp-demo' is unknown"),
        (
            "census",
            {"source": "local", "path": "no-census", "extra_obs": ["library", "author_cell_type"]},
            r"census\.path is 'no-census', which is no folder",
        ),
    ],
)
def test_snakemake_stops_at_a_bad_config(demo_census, tmp_path, key, value, sentence):
    workflow = one_model(tmp_path, demo_census.soma)
    workflow.config[key] = value
    assert re.search(sentence, said(workflow.run(PLAN)))
    assert not workflow.results.exists()


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(demo_census, tmp_path_factory) -> Workflow:
    return one_model(tmp_path_factory.mktemp("planned"), demo_census.soma)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (
            {"include": {"cell_type": ["T cel"]}},
            r"corpus\.include: no cell .* cell_type 'T cel'; did you mean 'T cell'",
        ),
        ({"include": {"cell_typ": ["T cell"]}}, r"no obs column 'cell_typ'; did you mean 'cell_type'"),
        (
            {"include": {"dataset_id": ["li_cell_lines"], "cell_type": ["T cell"]}},
            r"corpus: no cell of homo_sapiens passes .* so relax corpus\.include or exclude",
        ),
        ({"quality": {"min_counts": 10**9}}, r"corpus: no cell is left after quality control: .*relax corpus\.quality"),
        ({"splits": {"validation": ["K56"]}}, r"corpus\.splits\.validation names the donor 'K56', .* 'K562'"),
    ],
    ids=["term", "column", "empty", "quality", "donor"],
)
def test_selection(planned, section, sentence):
    good = dict(planned.config["corpus"])
    census = contents(Path(planned.config["census"]["path"]))
    planned.config["corpus"] |= section
    ended = planned.run(PLAN)
    planned.config["corpus"] = good
    assert re.search(sentence, said(ended))
    assert contents(Path(planned.config["census"]["path"])) == census
    assert not list(planned.results.rglob("*.tmp*"))


def test_mended_selection(planned):
    succeeds(planned.run(PLAN))


def test_folder_that_is_no_census(planned, tmp_path):
    good = planned.config["census"]
    planned.config["census"] = good | {"path": str(tmp_path)}
    ended = planned.run(PLAN)
    planned.config["census"] = good
    assert f"{tmp_path} is no Census: " in said(ended)


# --- cells ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(demo_census) -> ad.AnnData:
    """Forty cells of the cell lines."""
    return ad.read_h5ad(demo_census.h5ads / "li_cell_lines.h5ad")[:40, :4000].copy()


@pytest.fixture
def folder(cells, tmp_path) -> Path:
    """A folder of two good files, ``a.h5ad`` and ``b.h5ad``."""
    folder = tmp_path / "h5ads"
    folder.mkdir()
    cells[:20].write_h5ad(folder / "a.h5ad", compression="lzf")
    cells[20:].write_h5ad(folder / "b.h5ad", compression="lzf")
    return folder


def build(folder: Path, out: Path, demo_census) -> subprocess.CompletedProcess:
    """``cellmill build-census``, with the data wheels that are here already."""
    if not (out.parent / "wheels").exists():
        (out.parent / "wheels").symlink_to(demo_census.wheels)
    return cellmill("build-census", folder, out, "--gene-table", demo_census.genes)


def changed(change):
    """A fault that changes the cells of a file."""

    @functools.wraps(change)
    def spoil(path: Path) -> None:
        found = ad.read_h5ad(path)
        change(found)
        found.write_h5ad(path, compression="lzf")

    return spoil


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_format(path: Path) -> None:
    path.write_text("a,b,c\n1,2,3\n")


def flipped(path: Path) -> None:
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    path.write_bytes(content)


@changed
def log_normalised(found: ad.AnnData) -> None:
    found.X.data = np.log1p(found.X.data / found.X.data.mean())


@changed
def negative(found: ad.AnnData) -> None:
    found.X.data[7] = -1


@changed
def not_a_number(found: ad.AnnData) -> None:
    found.X.data[7] = np.nan


@changed
def duplicate_gene(found: ad.AnnData) -> None:
    names = found.var_names.to_list()
    found.var_names = [names[1], *names[1:]]


@changed
def no_gene_known(found: ad.AnnData) -> None:
    found.var_names = [f"probe{number}" for number in range(found.n_vars)]


@changed
def odd_flag(found: ad.AnnData) -> None:
    found.obs["is_primary_data"] = "perhaps"


SPOILT = [
    (truncated, r"b\.h5ad cannot be read as \.h5ad: .*copy it again"),
    (other_format, r"b\.h5ad cannot be read as \.h5ad: .*copy it again"),
    (flipped, r"b\.h5ad(: X holds no raw counts| cannot be read as \.h5ad: .*copy it again)"),
    (
        log_normalised,
        r"b\.h5ad: X holds no raw counts: gene \S+ of cell \S+ is [\d.]+, no whole number .*put raw counts",
    ),
    (negative, r"b\.h5ad: X holds no raw counts: gene \S+ of cell \S+ is negative \(-1\); put raw counts"),
    (not_a_number, r"b\.h5ad: X holds no raw counts: gene \S+ of cell \S+ is not a number \(NaN\); put raw counts"),
    (duplicate_gene, r"b\.h5ad: gene \S+ stands twice in var .*sum or rename the duplicates"),
    (no_gene_known, r"b\.h5ad: none of its 4000 genes \(probe0, .*name the genes by either"),
    (odd_flag, r"b\.h5ad: is_primary_data must be True or False, not perhaps"),
]


@pytest.mark.parametrize(("spoil", "sentence"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_h5ad(folder, demo_census, tmp_path, spoil, sentence):
    spoil(folder / "b.h5ad")
    before = contents(folder)
    assert re.search(sentence, said(build(folder, tmp_path / "soma", demo_census)))
    assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"h5ads", "wheels"}


def test_missing_and_empty_folder_then_mended(folder, demo_census, tmp_path):
    out = tmp_path / "soma"
    assert "does not exist; name one that does" in said(build(tmp_path / "no", out, demo_census))
    (tmp_path / "empty").mkdir()
    assert "empty holds no .h5ad file; put at least one there" in said(build(tmp_path / "empty", out, demo_census))
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / "empty")
    succeeds(build(tmp_path / "empty", out, demo_census))


def test_truncated_h5ad_in_the_workflow(folder, demo_census, tmp_path):
    workflow = one_model(tmp_path, demo_census.soma)
    workflow.config["census"] |= {"source": "h5ad", "path": str(folder)}
    (workflow.results / "census").mkdir(parents=True)
    shutil.copytree(demo_census.wheels, workflow.results / "census" / "wheels", copy_function=os.link)
    (workflow.results / "census" / "wheels").touch()  # a folder older than the script would be fetched again
    (workflow.results / "census" / "genes").mkdir()
    shutil.copy(demo_census.genes, workflow.results / "census" / "genes" / "homo_sapiens.csv.gz")
    good = (folder / "b.h5ad").read_bytes()
    truncated(folder / "b.h5ad")
    before = contents(workflow.results)
    assert "b.h5ad cannot be read as .h5ad" in said(workflow.run(CENSUS))
    assert contents(workflow.results) == before
    (folder / "b.h5ad").write_bytes(good)
    succeeds(workflow.run(CENSUS))


# --- shards and checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def milled(demo_census, tmp_path_factory) -> Workflow:
    """Shards of the cell lines and of the pancreas, and statistics."""
    workflow = one_model(tmp_path_factory.mktemp("milled"), demo_census.soma)
    succeeds(workflow.run(STATISTICS, TARGET_SHARDS))
    return workflow


@pytest.fixture
def untrained(milled) -> Workflow:
    shutil.rmtree(milled.results / "pretrain", ignore_errors=True)
    return milled


def test_missing_shard(untrained):
    path = untrained.folder / SHARDS / "train-00000.parquet"
    away = path.rename(untrained.folder / "away.parquet")
    before = contents(untrained.results)
    sentence = said(untrained.run(CHECKPOINT))
    assert f"shard {SHARDS}/train-00000.parquet does not exist but the manifest names it" in sentence
    assert f"delete {SHARDS} and run again" in sentence
    assert contents(untrained.results) == before
    away.rename(path)
    succeeds(untrained.run(CHECKPOINT))


def test_corrupt_shard(untrained):
    path = untrained.folder / SHARDS / "train-00000.parquet"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 3] ^= 1
    path.write_bytes(bad)
    before = contents(untrained.results)
    sentence = said(untrained.run(CHECKPOINT))
    assert f"shard {SHARDS}/train-00000.parquet is corrupt: " in sentence
    assert contents(untrained.results) == before
    shutil.rmtree(untrained.folder / re.search(r"; delete (\S+) and run again", sentence)[1])
    succeeds(untrained.run(CHECKPOINT))
    assert path.read_bytes() == good


def test_checkpoint_of_another_vocabulary(milled):
    succeeds(milled.run(CHECKPOINT))
    path = milled.folder / CHECKPOINT
    good = path.read_text()
    meta = json.loads(good)
    meta["feature_ids"][0] = "ENSG00000000000"
    meta["vocabulary_hash"] = vocabulary_hash(meta["feature_ids"])
    path.write_text(json.dumps(meta))
    before = contents(milled.results)
    sentence = said(milled.run(EMBEDDING))
    assert f"{TARGET_SHARDS} was written with the vocabulary " in sentence
    assert sentence.endswith("take a checkpoint and shards that were made with one vocabulary")
    assert contents(milled.results) == before
    path.write_text(good)
    succeeds(milled.run(EMBEDDING))


# --- disk full --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many MB at a folder below the test's own."""
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only")
    mounted = []

    def mount(name: str, megabytes: int) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            pytest.skip(f"a small disk cannot be mounted here ({ended.stderr.strip()})")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for so many bytes; to be removed by whoever wants space."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def test_disk_full_in_the_workflow(demo_census, tmp_path, small_disk):
    results = small_disk("run/results", 32)
    workflow = one_model(tmp_path / "run", demo_census.soma)
    succeeds(workflow.run(VOCABULARY))
    ballast = fill(results, left=500_000)
    before = contents(results)
    sentence = said(workflow.run(BLOCK))
    assert re.search(
        r"could not be written \(No space left on device\); free space .*what is finished is kept", sentence
    )
    assert before.items() <= contents(results).items()
    assert not list(results.rglob("blocks/*"))
    ballast.unlink()
    succeeds(workflow.run(BLOCK))


@pytest.mark.parametrize("left", [150_000, 1_000_000])  # full while its groups are made, and while cells are written
def test_disk_full_while_a_census_is_built(folder, demo_census, small_disk, left):
    disk = small_disk("disk", 4)
    ballast = fill(disk, left)
    sentence = said(build(folder, disk / "soma", demo_census))
    assert re.search(r"disk is full while \S+soma is built; free some space", sentence)
    assert not (disk / "soma").exists()
    ballast.unlink()
    succeeds(build(folder, disk / "soma", demo_census))
    assert {path.name for path in disk.iterdir()} == {"wheels", "soma", "soma_genes_mapping.parquet"}
