"""The abilities from the command line, on real cells and small random models."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.checkpoints import build_model, save_checkpoint, vocabulary_hash
from cellmill.cli import app
from cellmill.cli_abilities import Opened
from cellmill.recipes import ModelRecipe
from cellmill.shards.statistics import compute_statistics
from cellmill.vocabulary import SCHEMA
from small_runs import META, N_GENES, RECIPES, make_corpus, make_shards
from typer.testing import CliRunner

GENES = META["feature_ids"]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Shards of 20 cells, and a checkpoint of each architecture."""
    folder = tmp_path_factory.mktemp("abilities")
    statistics = compute_statistics(make_corpus(folder / "corpus", data))
    statistics = dataclasses.replace(statistics, categories={"cell_type": ["alpha", "beta"], "tissue": ["pancreas"]})
    recipes = RECIPES | {"scmulan": ModelRecipe(architecture="scmulan", sizes={"n_model_genes": 300, "max_length": 64})}
    for name, recipe in recipes.items():
        model = build_model(recipe, N_GENES, statistics, seed=0)
        save_checkpoint(folder / name, model, {**META, "recipe": dataclasses.asdict(recipe)})
    make_shards(folder / "cells", data, {"all": np.arange(400, 420)}, cells_per_shard=20)
    return folder


def call(*arguments) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception and not isinstance(done.exception, SystemExit):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


def test_annotate(folder, tmp_path):
    call("annotate", folder / "scmulan", folder / "cells", tmp_path / "types.parquet")
    table = pq.read_table(tmp_path / "types.parquet").to_pandas()
    assert len(table) == 20
    assert set(table["cell_type"]) <= {"alpha", "beta"}
    assert table["probability"].between(0, 1).all()


def test_generate(folder, tmp_path):
    call("generate", folder / "scmulan", tmp_path / "a.parquet", "--word", "cell_type=beta", "--n", 5, "--seed", 3)
    call("generate", folder / "scmulan", tmp_path / "b.parquet", "--word", "cell_type=beta", "--n", 5, "--seed", 3)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.equals(pq.read_table(tmp_path / "b.parquet"))
    assert set(table["gene"].to_pylist()) <= set(GENES)
    said = call("generate", folder / "scmulan", tmp_path / "c.parquet", "--word", "cell_type=gamma")
    assert "gamma" in said
    assert "must be of the form" in call("generate", folder / "scmulan", tmp_path / "c.parquet", "--word", "beta")
    assert not (tmp_path / "c.parquet").exists()


def test_enhance(folder, tmp_path):
    options = ("--depth", "f2", "--gene", GENES[5], "--gene", GENES[9])
    call("enhance", folder / "scfoundation", folder / "cells", tmp_path / "deep.parquet", *options)
    table = pq.read_table(tmp_path / "deep.parquet").to_pandas()
    assert table.columns.tolist() == ["soma_joinid", GENES[5], GENES[9]]
    assert len(table) == 20
    assert np.isfinite(table.to_numpy(dtype=float)).all()
    assert "no gene NOGENE" in call(
        "enhance", folder / "scfoundation", folder / "cells", tmp_path / "x.parquet", "--gene", "NOGENE"
    )


@pytest.mark.parametrize("by", ["genes", "cell", "both"])
def test_prompt(folder, tmp_path, by):
    options = ("--gene", GENES[7], "--gene", GENES[8], "--by", by, "--steps", 2)
    call("prompt", folder / "scgpt", folder / "cells", tmp_path / "made.parquet", *options)
    table = pq.read_table(tmp_path / "made.parquet").to_pandas()
    assert table.columns.tolist() == ["soma_joinid", GENES[7], GENES[8]]
    assert np.isfinite(table.to_numpy(dtype=float)).all()


def test_perturb(folder, tmp_path):
    options = ("--cells", 6, "--random", 5)
    call("perturb", folder / "geneformer", folder / "cells", tmp_path / "moved.parquet", *options)
    rows = pq.read_table(tmp_path / "moved.parquet").to_pandas()
    cells = pq.read_table(tmp_path / "moved.cells.parquet").to_pandas()
    assert cells["joinid"].nunique() == 6
    assert set(rows["feature_id"]) <= set(GENES)
    assert (cells["cell_shift"].dropna() >= -1e-6).all()


def test_cells_of_another_vocabulary(folder, data, tmp_path):
    """Genes go by symbol, the first of two that share one; scFoundation's totals are over the genes that it has."""
    ids = [*GENES[2000:], *(f"ENSG9{gene:010d}" for gene in range(2000))]  # the models know the first thousand
    names = [f"S{place}" for place in range(N_GENES)]
    names[7] = names[4]
    columns = {"feature_id": ids, "feature_name": names}
    rows = {field.name: pa.array(columns.get(field.name, [None] * N_GENES), field.type) for field in SCHEMA}
    vocabulary = tmp_path / "homo_sapiens.parquet"
    pq.write_table(pa.table(rows, schema=SCHEMA), vocabulary)
    cells = make_shards(tmp_path / "cells", data, {"all": np.arange(400, 410)}, cells_per_shard=20)
    manifest = json.loads((cells.folder / "manifest.json").read_text())
    manifest["vocabulary"]["hash"] = vocabulary_hash(ids)
    (cells.folder / "manifest.json").write_text(json.dumps(manifest))

    opened = {name: Opened(folder / name, cells.folder, "all", vocabulary) for name in ("scfoundation", "scgpt")}
    assert opened["scgpt"].gene_ids(["S4", GENES[3]]).tolist() == [2004, 3]
    read = {name: next(one.cells()) for name, one in opened.items()}
    raw = next(cells.batches("all", 10))
    assert read["scgpt"].totals.tolist() == raw.totals.tolist()
    sums = [raw.counts[raw.cell_of == row][raw.genes[raw.cell_of == row] < 1000].sum() for row in range(10)]
    assert read["scfoundation"].totals.tolist() == sums
    assert read["scfoundation"].genes.min() >= 2000


def test_a_model_of_another_kind_and_foreign_cells_are_refused(folder, data, tmp_path):
    said = call("annotate", folder / "scgpt", folder / "cells", tmp_path / "x.parquet")
    assert "scmulan" in said.lower()
    said = call("perturb", folder / "scgpt", folder / "cells", tmp_path / "x.parquet")
    assert "geneformer" in said.lower()
