"""The typed config: what is generated does not drift, and every wrong config ends in one sentence."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cellmill.cli import check
from cellmill.config import DEMO, Config, Dataset, Run, check_names, load, parse, read_yaml
from cellmill.config_docs import FILES, default_yaml
from cellmill.errors import CellmillError
from cellmill.flow import Flow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", FILES)
def test_generated_files_do_not_drift(name):
    assert (ROOT / name).read_text() == FILES[name](), f"{name} differs from the typed config: run `make config`"


def test_drift_is_noticed(tmp_path):
    """The check that `make lint` runs fails when a generated file was edited."""
    code = (
        "import sys, pathlib, cellmill.config_docs as docs; docs.PROJECT = pathlib.Path(sys.argv[1]);"
        "sys.argv = ['config_docs', '--check']; raise SystemExit(docs.main())"
    )
    for name in FILES:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == 0
    path = tmp_path / "config" / "demo.yaml"
    path.write_text(path.read_text().replace("min_counts: 500", "min_counts: 501"))
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "min_counts: 501" in ended.stderr
    assert "make config" in ended.stderr


def test_the_default_yaml_is_the_demo():
    assert parse(Config, yaml.safe_load(default_yaml()), "demo") == DEMO


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    check_names(load(read_yaml(path), ROOT))


BAD = {
    "wrong key": ({"runn": "x"}, "'runn' is not a known key"),
    "wrong nested key": ({"corpus": {"quality": {"min_count": 5}}}, "'corpus.quality.min_count' is not a known key"),
    "wrong type": ({"seeds": "many"}, "'seeds' is 'many'"),
    "out of bounds": ({"corpus": {"quality": {"max_mito_fraction": 2}}}, "less than or equal to 1"),
    "no seed": ({"seeds": []}, "'seeds' is []"),
    "negative seed": ({"seeds": [-1]}, "'seeds.0' is -1"),
    "seed twice": ({"seeds": [0, 1, 0]}, "'seeds' is [0, 1, 0]: value error, 0 is named twice"),
    "baseline twice": ({"baselines": ["harmony", "harmony"]}, "harmony is named twice"),
    "task twice": ({"tasks": ["annotation", "annotation"]}, "named twice"),
    "suspension type": ({"corpus": {"quality": {"suspension_types": ["cells"]}}}, "'cell', 'nucleus' or 'na'"),
    "no validation": ({"corpus": {"splits": {"validation_fraction": 0}}}, "greater than 0"),
    "no path": ({"census": {"source": "local"}}, "needs census.path"),
    "unknown source": ({"census": {"source": "cloud"}}, "'census.source' is 'cloud'"),
    "unknown model": ({"models": ["gpt-9"]}, "model 'gpt-9' is unknown"),
    "unknown task": ({"tasks": ["divination"]}, "task 'divination' is unknown"),
    "unknown baseline": ({"baselines": ["magic"]}, "baseline 'magic' is unknown"),
    "named twice": ({"models": ["scgpt-demo", "scgpt-demo"]}, "named twice"),
    "bad run name": ({"run": "../escape"}, "'run' is '../escape'"),
    "lost column": ({"datasets": {"x": {"include": {}, "batch": "library"}}}, "datasets.x.batch is 'library'"),
    "reserved data set": ({"datasets": {"corpus": {"include": {}}}}, "cannot be called 'corpus'"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_a_wrong_config_ends_in_one_sentence(content, said):
    with pytest.raises(CellmillError) as error:
        check_names(load(content, ROOT))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_threshold_of_a_benchmark_leaves_its_other_defaults():
    dataset = parse(Config, {"datasets": {"x": {"include": {}, "quality": {"min_genes": 7}}}}, "it").datasets["x"]
    assert dataset.quality == Dataset(include={}).quality.model_copy(update={"min_genes": 7})
    assert (dataset.quality.min_counts, dataset.quality.max_mito_fraction) == (1, 1.0)
    assert dataset.quality.suspension_types == []


def test_tasks_without_data_sets_are_warned_of(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("tasks: [annotation]\n")
    check(path)
    assert "warning: tasks annotation score nothing" in capsys.readouterr().out
    path.write_text("tasks: []\n")
    check(path)
    assert "warning" not in capsys.readouterr().out


def test_what_changes_no_cell_reruns_no_reading():
    """Buffers, gene table and extra columns are no parameters of planning, nor the seed of a benchmark's shards."""
    changed = DEMO.model_copy(
        update={
            "census": DEMO.census.model_copy(update={"buffer_mb": 64, "gene_table": "x.csv", "extra_obs": []}),
            "corpus": DEMO.corpus.model_copy(update={"shuffle_seed": 5}),
        }
    )
    before, after = (Flow(Run(config=config, models={}, tasks={})) for config in (DEMO, changed))
    for cells, same in (("corpus", False), ("baron_pancreas", True)):
        wildcards = SimpleNamespace(cells=cells)
        assert before.opened_census(wildcards) == after.opened_census(wildcards)
        assert before.selection(wildcards) == after.selection(wildcards)
        assert (before.shuffle_seed(wildcards) == after.shuffle_seed(wildcards)) == same


MODEL = {"architecture": "geneformer", "preset": "demo"}
BAD_MODELS = {
    "unknown architecture": (MODEL | {"architecture": "transformerformer"}, "transformerformer"),
    "unknown preset": (MODEL | {"preset": "v9"}, "v9"),
    "unknown size": (MODEL | {"sizes": {"n_heds": 3}}, "n_heds"),
    "unknown pooling": (MODEL | {"embedding": {"pooling": "max"}}, "pooling 'max' is unknown"),
    "unknown training key": (MODEL | {"training": {"lr": 1}}, "'training.lr' is not a known key"),
    "no steps": (MODEL | {"training": {"steps": 0}}, "'training.steps' is 0"),
    "uneven ranks": (MODEL | {"training": {"batch_size": 10, "ranks": 4}}, "not a multiple of the 4 ranks"),
    "no micro batch": (MODEL | {"training": {"micro_batch_tokens": 0}}, "micro_batch_tokens is 0"),
    "sharded muon": (MODEL | {"training": {"optimizer": "muon", "parallel": "fsdp", "ranks": 2}}, "take ddp or adamw"),
    "many shapes": (MODEL | {"training": {"compile": "on", "packing": "padded"}}, "needs few shapes"),
    "a limit of nothing": (MODEL | {"training": {"memory_gb": 4}}, "micro_batch_tokens: auto"),
}


@pytest.mark.parametrize(("content", "said"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_wrong_model_ends_in_one_sentence(content, said, tmp_path):
    path = tmp_path / "my-model.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(CellmillError) as error:
        check_names(load({"models": [str(path)]}, ROOT))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_cannot_take_a_baselines_name(tmp_path):
    path = tmp_path / "hvg_pca.yaml"
    path.write_text(yaml.safe_dump(MODEL))
    with pytest.raises(CellmillError, match="has the name of a baseline"):
        check_names(load({"models": [str(path)]}, ROOT))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", ""])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(CellmillError, match=r"broken\.yaml"):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CellmillError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
