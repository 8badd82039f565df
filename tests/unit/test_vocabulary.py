"""Which genes enter the vocabulary, in which order, and what a damaged one says."""

import cellxgene_census
import corpus_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.errors import CellmillError
from cellmill.vocabulary import Vocabulary, choose_genes, is_mitochondrial

VAR = pa.table(
    {
        "soma_joinid": [0, 1, 2, 3],
        "feature_id": ["ENSG4", "ENSG1", "ENSG3", "ENSG2"],
        "feature_name": ["A", "MT-ND1", "A", "B"],
        "feature_type": ["protein_coding", "protein_coding", "protein_coding", "lncRNA"],
        "feature_length": [10, 20, 30, 40],
    }
)
MEASURED = np.array([3, 1, 2, 3])


def test_genes_are_keyed_and_sorted_by_id():
    genes = choose_genes(VAR, MEASURED, [], 1)
    assert genes.feature_ids == ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
    assert genes.feature_names == ["MT-ND1", "B", "A", "A"]  # one symbol, two genes
    assert genes.table["is_mitochondrial"].to_pylist() == [True, False, False, False]
    assert len(genes) == 4


def test_biotypes_and_presence_choose():
    assert choose_genes(VAR, MEASURED, ["lncRNA"], 1).feature_ids == ["ENSG2"]
    assert choose_genes(VAR, MEASURED, ["protein_coding"], 2).feature_ids == ["ENSG3", "ENSG4"]
    assert choose_genes(VAR, MEASURED, [], 3).feature_ids == ["ENSG2", "ENSG4"]


def test_nothing_left_and_unknown_biotype_are_errors():
    with pytest.raises(CellmillError, match=r"no gene is left for the vocabulary.*in at least 4 data sets"):
        choose_genes(VAR, MEASURED, [], 4)
    with pytest.raises(CellmillError, match=r"'coding'.*it has lncRNA, protein_coding"):
        choose_genes(VAR, MEASURED, ["coding"], 1)


def test_mitochondrial_symbols():
    names = pa.chunked_array([["MT-CO1", "mt-Nd1", "MTOR", "MT1X", "ACMT-1", None]])
    assert is_mitochondrial(names).tolist() == [True, True, False, False, False, False]


def test_the_hash_is_of_ids_and_order(tmp_path):
    genes = choose_genes(VAR, MEASURED, [], 1)
    pq.write_table(genes.table, tmp_path / "v.parquet")
    read = Vocabulary.read(tmp_path / "v.parquet")
    assert read.hash == genes.hash != choose_genes(VAR, MEASURED, [], 2).hash
    assert Vocabulary(genes.table.take([1, 0, 2, 3])).hash != genes.hash


def test_damaged_files_are_said(tmp_path):
    path = tmp_path / "v.parquet"
    with pytest.raises(CellmillError, match="v.parquet cannot be read as parquet"):
        Vocabulary.read(path)
    genes = choose_genes(VAR, MEASURED, [], 1)
    pq.write_table(genes.table, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CellmillError, match="v.parquet cannot be read as parquet"):
        Vocabulary.read(path)
    pq.write_table(genes.table.drop_columns(["feature_type"]), path)
    with pytest.raises(CellmillError, match="has columns"):
        Vocabulary.read(path)
    pq.write_table(genes.table.take([1, 0, 2, 3]), path)
    with pytest.raises(CellmillError, match="not sorted by unique feature_id"):
        Vocabulary.read(path)


@pytest.mark.parametrize("min_datasets", [1, 2])
def test_the_demo_vocabulary_is_what_the_presence_matrix_says(demo_census, tmp_path, min_datasets):
    selection = corpus_runs.corpus(genes={"min_datasets": min_datasets})
    corpus_runs.plan(demo_census.soma, tmp_path, selection)
    genes = corpus_runs.vocabulary(demo_census.soma, tmp_path, selection)
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        var = cellxgene_census.get_var(census, "homo_sapiens")
        datasets = census["census_info"]["datasets"].read().concat().to_pandas()
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens")
    rows = datasets["soma_joinid"][datasets["dataset_id"] != "baron_pancreas"]  # held out of the corpus
    measured = np.asarray(presence[rows.to_numpy()].sum(axis=0)).ravel()
    expected = var[(measured >= min_datasets) & (var["feature_type"] == "protein_coding")]
    assert genes.feature_ids == sorted(expected["feature_id"])
    assert Vocabulary.read(tmp_path / "vocabulary.parquet").hash == genes.hash
    names = dict(zip(expected["feature_id"], expected["feature_name"], strict=True))
    assert genes.feature_names == [names[feature_id] for feature_id in genes.feature_ids]
