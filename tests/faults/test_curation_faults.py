"""What may happen to a corpus on its way: a leak, a Census that goes away, files that are not what they should be."""

import re
import shutil

import anndata as ad
import pytest
from workflow_runs import Workflow, contents, one_model, said, succeeds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

SHARDS = "results/tiny/shards/corpus"
TARGET_SHARDS = "results/tiny/shards/baron_pancreas"
STATISTICS = "results/tiny/statistics.safetensors"
PLANTED = 20


@pytest.fixture
def leaky(demo_census, tmp_path) -> Workflow:
    """A run whose corpus holds cells of the benchmark under other names, among other cells and genes."""
    folder = tmp_path / "h5ads"
    folder.mkdir()
    shutil.copy(demo_census.h5ads / "baron_pancreas.h5ad", folder)
    pancreas = ad.read_h5ad(folder / "baron_pancreas.h5ad")[10 : 10 + PLANTED].copy()
    pancreas.obs_names = [f"mine-{number}" for number in range(PLANTED)]
    blood = ad.read_h5ad(demo_census.h5ads / "celltypist_blood.h5ad")
    mixed = ad.concat([blood, pancreas], join="outer", fill_value=0)
    mixed.obs["donor_id"] = ["one", "two"] * (len(mixed) // 2) + ["two"] * (len(mixed) % 2)
    mixed.write_h5ad(folder / "my_blood.h5ad")

    workflow = one_model(tmp_path / "run", demo_census.soma)
    workflow.config["census"] |= {"source": "h5ad", "path": str(folder)}
    workflow.config["corpus"] |= {"include": {}, "splits": {"validation": ["one"]}, "blocks": 2}
    return workflow


def test_a_planted_leak_is_found_and_named(leaky):
    sentence = said(leaky.run(SHARDS))
    assert re.search(rf"\b{PLANTED} cells\b", sentence)
    for name in ("my_blood", "baron_pancreas", "mine-"):
        assert name in sentence
    assert "leaks: drop" in sentence or "corpus.leaks" in sentence
    assert not (leaky.folder / SHARDS).exists()
    before = contents(leaky.results / "selections")

    leaky.config["corpus"]["leaks"] = "drop"
    succeeds(leaky.run(SHARDS))
    kept = {path: digest for path, digest in contents(leaky.results / "selections").items() if "blocks" in path.parts}
    assert kept == {path: digest for path, digest in before.items() if "blocks" in path.parts}


def test_a_census_that_goes_away(demo_census, tmp_path):
    soma = tmp_path / "soma"
    shutil.copytree(demo_census.soma, soma)
    workflow = one_model(tmp_path / "run", soma)
    workflow.config["corpus"]["blocks"] = 3
    first = "results/tiny/selections/corpus/blocks/0.arrow"
    succeeds(workflow.run(first))
    finished = contents(workflow.results)
    counts = soma / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw"
    away = counts.rename(tmp_path / "away")
    sentence = said(workflow.run(SHARDS, "--rerun-triggers", "mtime"))
    assert str(soma) in sentence
    assert finished.items() <= contents(workflow.results).items()
    away.rename(counts)
    succeeds(workflow.run(SHARDS, "--rerun-triggers", "mtime"))
    assert finished.items() <= contents(workflow.results).items()


def test_a_manifest_from_another_corpus(demo_census, tmp_path):
    workflow = one_model(tmp_path / "run", demo_census.soma)
    succeeds(workflow.run(SHARDS, TARGET_SHARDS))
    manifest = workflow.folder / SHARDS / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes((workflow.folder / TARGET_SHARDS / "manifest.json").read_bytes())
    sentence = said(workflow.run(STATISTICS))
    assert f"delete {SHARDS}" in sentence
    manifest.write_bytes(good)
    succeeds(workflow.run(STATISTICS))
