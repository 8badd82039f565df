"""The whole workflow, from a Census of real cells to the report: run, rerun, change, repeat."""

import copy
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from workflow_runs import Workflow

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workflow")]


@pytest.fixture(scope="module")
def finished(demo_census, tmp_path_factory) -> Workflow:
    workflow = Workflow(tmp_path_factory.mktemp("workflow"), demo_census.soma)
    ended = workflow.run()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return workflow


@pytest.fixture
def changed(finished):
    """The finished run, whose config may be changed; it is put back afterwards."""
    config, models = copy.deepcopy(finished.config), copy.deepcopy(finished.models)
    yield finished
    finished.config, finished.models = config, models


def test_it_ends_in_the_report_and_the_table(finished):
    assert (finished.results / "report" / "index.html").stat().st_size > 100_000
    table = pq.read_table(finished.results / "scores.parquet").to_pandas()
    assert (finished.results / "scores.csv").read_text().count("\n") == len(table) + 1
    assert set(table["task"]) == {"pretraining", "yardstick", "annotation", "integration"}
    assert set(table["kind"]) == {"model", "untrained", "baseline", "control"}
    assert set(table["seed"]) == {0, 1}
    assert not table.loc[table["value"].isna(), "reason"].isna().any()
    assert table["value"].notna().mean() > 0.9
    benchmark = table[~table["task"].isin(["pretraining", "yardstick"])]
    assert set(benchmark["seen"]) == {"no"}


def test_a_second_run_finds_nothing_to_do(finished):
    assert "Nothing to be done" in finished.run().stderr


def test_benchmark_cells_never_entered_the_corpus(finished):
    shards = finished.results / "shards"
    corpus = set()
    for path in (shards / "corpus").glob("*.parquet"):
        corpus |= set(pq.read_table(path, columns=["soma_joinid"])["soma_joinid"].to_pylist())
    target = set()
    for path in (shards / "baron_pancreas").glob("*.parquet"):
        target |= set(pq.read_table(path, columns=["soma_joinid"])["soma_joinid"].to_pylist())
    assert len(target) > 1900
    assert len(corpus) > 1000
    assert corpus.isdisjoint(target)


def test_held_out_donors_are_in_no_training_shard(finished):
    donors = {
        split: set(
            pq.read_table(finished.results / "shards" / "corpus" / f"{split}-00000.parquet", columns=["donor_id"])[
                "donor_id"
            ].to_pylist()
        )
        for split in ("train", "validation")
    }
    assert donors["validation"] == {"H1437", "K562"}
    assert donors["train"].isdisjoint(donors["validation"])


def test_a_learning_rate_reruns_its_models_branch_and_the_report(changed):
    changed.models["little-scgpt"]["training"]["learning_rate"] = 5e-4
    planned = changed.planned()
    assert planned == {
        "pretrain": 2,  # one per seed
        "embed_model": 2,
        "score_pretraining": 1,
        "score_yardstick": 1,
        "score": 2,  # one per task
        "collect_scores": 1,
        "write_report": 1,
        "all": 1,
    }
    ended = changed.run("--dry-run")
    listed = ended.stdout + ended.stderr
    assert "model=little-scgpt" in listed
    assert "wildcards: run=tiny, model=little-geneformer" not in listed


def test_a_qc_threshold_reruns_what_depends_on_it(changed):
    changed.config["corpus"]["quality"]["min_counts"] = 2000
    planned = changed.planned()
    assert planned["plan_cells"] == 1  # the corpus's, not the benchmark's
    for rule in ("vocabulary", "shards", "statistics", "pretrain", "embed_model", "score", "write_report"):
        assert rule in planned, rule


def test_how_embeddings_are_read_does_not_retrain(changed):
    changed.models["little-geneformer"]["embedding"] = {"batch_size": 16}
    planned = changed.planned()
    assert "pretrain" not in planned
    assert planned["embed_model"] == 2


def test_two_runs_from_clean_give_the_same_scores(finished, demo_census, tmp_path):
    again = Workflow(tmp_path, demo_census.soma)
    ended = again.run(cores=1)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tables = [pq.read_table(w.results / "scores.parquet").drop_columns(["seconds"]) for w in (finished, again)]
    assert tables[0].equals(tables[1])
    for path in finished.results.glob("shards/*/*.parquet"):
        assert path.read_bytes() == (again.results / path.relative_to(finished.results)).read_bytes()
    weights = "pretrain/little-scgpt/seed1/checkpoint.safetensors"
    assert (finished.results / weights).read_bytes() == (again.results / weights).read_bytes()


def test_snakemake_report_works(finished, tmp_path):
    target = tmp_path / "snakemake-report.zip"
    ended = finished.run("--report", str(target))
    assert ended.returncode == 0, ended.stderr
    assert target.stat().st_size > 100_000


def test_training_state_is_gone_and_checkpoints_are_traceable(finished):
    assert not list(finished.results.rglob("*.state"))
    meta = json.loads((finished.results / "pretrain/little-scgpt/seed0/checkpoint.json").read_text())
    table = pq.read_table(finished.results / "scores.parquet").to_pandas()
    rows = table[(table["model"] == "little-scgpt") & (table["seed"] == 0)]
    assert set(rows["checkpoint"]) == {meta["weights_sha256"]}
    embedding = np.load(finished.results / "embed/baron_pancreas/little-scgpt/seed0.npy")
    assert np.isfinite(embedding).all()


def test_only_what_is_lost_is_made_again(finished):
    """A part of the score table and what was made of it are gone; all else is kept."""
    lost = ["scores/annotation/baron_pancreas/controls.parquet", "scores.parquet", "report/index.html"]
    paths = [finished.results / name for name in lost]
    for path in paths:
        shutil.move(path, path.with_suffix(".kept"))
    planned = finished.planned()
    for path in paths:
        shutil.move(path.with_suffix(".kept"), path)
    assert planned == {"score": 1, "collect_scores": 1, "write_report": 1, "all": 1}
