"""Published weights in a run: the real Exceiver embeds real cells beside the controls."""

import csv
import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from workflow_runs import Workflow, succeeds

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("released")]

N_PUBLISHED = 19_067


@pytest.fixture(scope="module")
def finished(data, demo_census, tmp_path_factory) -> Workflow:
    folder = tmp_path_factory.mktemp("released")
    with gzip.open(data / "genes" / "genes_homo_sapiens.csv.gz", "rt") as file:
        genes = sorted({row[0] for row in csv.reader(file) if "protein_coding" in row})[:N_PUBLISHED]
    assert len(genes) == N_PUBLISHED
    # the order of the published rows is unknown: any list of genes shows that cells get through
    (folder / "genes.txt").write_text("\n".join(genes) + "\n")
    workflow = Workflow(folder, demo_census.soma)
    weights = data / "checkpoints" / "exceiver_tabula_sapiens.ckpt"
    workflow.models = {
        "published-exceiver": {
            "architecture": "exceiver",
            "released": {"path": str(weights), "genes": str(folder / "genes.txt")},
            "embedding": {"pooling": "mean"},
        }
    }
    workflow.config |= {"models": [str(folder / "published-exceiver.yaml")], "seeds": [0, 1], "baselines": ["hvg_pca"]}
    workflow.config["tasks"] = ["annotation"]
    succeeds(workflow.run())
    return workflow


def test_nothing_is_trained_and_the_rows_say_that_nobody_knows_what_was_seen(finished):
    assert not (finished.results / "pretrain").exists()
    table = pq.read_table(finished.results / "scores.parquet").to_pandas()
    rows = table[table["model"] == "published-exceiver"]
    assert set(rows["seen"]) == {"unknown"}
    assert set(rows["seed"]) == {0}
    assert set(rows["kind"]) == {"model"}
    assert rows["value"].notna().all()
    assert set(rows["task"]) == {"annotation", "yardstick"}
    meta = json.loads((finished.results / "released" / "published-exceiver" / "checkpoint.json").read_text())
    assert set(rows["checkpoint"]) == {meta["weights_sha256"]}
    assert "exceiver_tabula_sapiens.ckpt" in meta["released"]["files"]


def test_cells_got_through_their_genes(finished):
    x = np.load(finished.results / "embed" / "baron_pancreas" / "published-exceiver" / "seed0.npy")
    assert x.shape[1] == 4
    assert np.isfinite(x).all()
    assert x.std(0).min() > 0
    log = (finished.results / "logs" / "embed" / "baron_pancreas-published-exceiver-seed0.log").read_text()
    assert "of the model's 19067 genes" in log


def test_weights_that_are_not_there_are_missed_before_any_job(finished):
    finished.models["published-exceiver"]["released"]["path"] = "nowhere.ckpt"
    ended = finished.run("--dry-run")
    assert ended.returncode != 0
    assert "released.path is 'nowhere.ckpt', which does not exist" in ended.stdout + ended.stderr
