"""Human and mouse in one run: a vocabulary and shards for each, and the pairs of their genes."""

import json

import pyarrow.parquet as pq
import pytest
from cellmill.shards.dataset import Shards
from cellmill.vocabulary import Vocabulary
from workflow_runs import Workflow, succeeds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("organisms")]

HUMAN = ("tenx_pbmc1k_v2", "scmixology_sc_dropseq")
MOUSE = ("mouse_blastocyst_E3.5_E4.5", "scicar_mouse_kidney_rna_atac")


@pytest.fixture(scope="module")
def milled(data, tmp_path_factory) -> Workflow:
    folder = tmp_path_factory.mktemp("organisms")
    files = [data / "cells" / f"{name}.h5ad" for name in HUMAN]
    files += [data / "time" / f"{MOUSE[0]}.h5ad", data / "multiome" / f"{MOUSE[1]}.h5ad"]
    (folder / "h5ad").mkdir()
    for path in files:
        (folder / "h5ad" / path.name).symlink_to(path)
    workflow = Workflow(folder, folder)
    workflow.config |= {"models": [], "tasks": [], "baselines": [], "datasets": {}}
    workflow.models = {}
    workflow.config["census"] |= {
        "source": "h5ad",
        "path": str(folder / "h5ad"),
        "extra_obs": [],
        "organisms": dict.fromkeys(MOUSE, "mus_musculus"),
    }
    workflow.config["corpus"] |= {
        "organisms": ["homo_sapiens", "mus_musculus"],
        "orthologs": str(data / "species" / "human_mouse_orthologs.csv.gz"),
        "splits": {"unit": "dataset", "validation": [HUMAN[1], MOUSE[1]]},
    }
    workflow.config["corpus"]["quality"] |= {"suspension_types": [], "min_counts": 100, "min_genes": 50}
    succeeds(workflow.run("corpus"))
    return workflow


def test_each_organism_has_its_own_vocabulary_and_shards(milled):
    for name, organism, datasets, prefix in (
        ("corpus", "homo_sapiens", HUMAN, "ENSG"),
        ("corpus-mus_musculus", "mus_musculus", MOUSE, "ENSMUSG"),
    ):
        shards = Shards(milled.results / "shards" / name)
        vocabulary = Vocabulary.read(milled.results / "vocabulary" / f"{organism}.parquet")
        assert shards.vocabulary_hash == vocabulary.hash
        assert all(gene.startswith(prefix) for gene in vocabulary.feature_ids)
        assert set().union(*(shards.datasets(split) for split in shards.splits)) == set(datasets)
        assert shards.manifest["organism"] == organism
        plan = json.loads((milled.results / "selections" / name / "plan.json").read_text())
        assert 0.5 * plan["cells"] < sum(shards.n_cells(split) for split in shards.splits) <= plan["cells"]


def test_the_table_of_orthologs_joins_the_two_vocabularies(milled):
    pairs = pq.read_table(milled.results / "orthologs.parquet").to_pandas()
    for side, organism in (("a", "homo_sapiens"), ("b", "mus_musculus")):
        vocabulary = Vocabulary.read(milled.results / "vocabulary" / f"{organism}.parquet")
        assert set(pairs[f"organism_{side}"]) == {organism}
        assert [vocabulary.feature_ids[gene] for gene in pairs[f"gene_{side}"]] == pairs[f"feature_id_{side}"].tolist()
    single = pairs[pairs["one_to_one"]]
    assert len(single) > 2000
    assert single["gene_a"].is_unique
    assert single["gene_b"].is_unique


def test_the_page_tells_of_both(milled):
    page = (milled.results / "report" / "corpus.html").read_text()
    assert "mus_musculus" in page
    assert all(name in page for name in (*HUMAN, *MOUSE))
