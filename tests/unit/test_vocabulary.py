"""Which genes enter the vocabulary, in which order, and what a damaged one says."""

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.census.vocabulary import build_vocabulary, choose_genes, is_mitochondrial, is_ribosomal
from cellmill.config import Census, Genes
from cellmill.errors import CellmillError
from cellmill.fingerprints import GENES_PER_GROUP, GROUPS
from cellmill.vocabulary import Vocabulary

VAR = pa.table(
    {
        "soma_joinid": [0, 1, 2, 3],
        "feature_id": ["ENSG4", "ENSG1", "ENSG3", "ENSG2"],
        "feature_name": ["A", "MT-ND1", "A", "B"],
        "feature_type": ["protein_coding", "protein_coding", "protein_coding", "lncRNA"],
        "feature_length": [10, 20, 30, 40],
        "nnz": [7, 8, 0, 9],
    }
)
MEASURED = np.array([3, 1, 2, 3])


def test_genes_are_keyed_and_sorted_by_id():
    genes = choose_genes(VAR, MEASURED, MEASURED, [], 1)
    assert genes.feature_ids == ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
    assert genes.feature_names == ["MT-ND1", "B", "A", "A"]  # one symbol, two genes
    assert genes.table["is_mitochondrial"].to_pylist() == [True, False, False, False]
    assert genes.table["is_ribosomal"].to_pylist() == [False] * 4
    # the gene without a cell tells nothing; of the others, the one that fewest data sets measured is dealt last
    assert genes.table["fingerprint_group"].to_pylist() == [2, 0, None, 1]
    assert genes.group_V.tolist() == [2, 0, -1, 1]
    assert len(genes) == 4


def test_biotypes_and_presence_choose():
    assert choose_genes(VAR, MEASURED, MEASURED, ["lncRNA"], 1).feature_ids == ["ENSG2"]
    assert choose_genes(VAR, MEASURED, MEASURED, ["protein_coding"], 2).feature_ids == ["ENSG3", "ENSG4"]
    assert choose_genes(VAR, MEASURED, MEASURED, [], 3).feature_ids == ["ENSG2", "ENSG4"]


def test_nothing_left_and_unknown_biotype_are_errors():
    with pytest.raises(CellmillError, match=r"no gene is left for the vocabulary.*in at least 4 data sets"):
        choose_genes(VAR, MEASURED, MEASURED, [], 4)
    with pytest.raises(CellmillError, match=r"'coding'.*it has lncRNA, protein_coding"):
        choose_genes(VAR, MEASURED, MEASURED, ["coding"], 1)


def test_mitochondrial_symbols():
    names = pa.chunked_array([["MT-CO1", "mt-Nd1", "MTOR", "MT1X", "ACMT-1", None]])
    assert is_mitochondrial(names).tolist() == [True, True, False, False, False, False]


def test_ribosomal_symbols():
    proteins = [
        "RPL3",
        "RPL10A",
        "RPL36AL",
        "RPL22L1",
        "RPLP0",
        "RPLP2",
        "RPSA",
        "RPS27A",
        "RPS4X",
        "RPS4Y1",
        "RPS3A",
        "Rpl13a",
        "Rps3a1",
        "Rplp1",
    ]
    others = [
        "RPS6KA1",
        "RPS6KB1",
        "Rps6ka3",
        "MRPL1",
        "MRPS12",
        "RPS19BP1",
        "RPL10P1",
        "Rpl10-ps3",
        "RPS10-NUDT3",
        "RPL",
        "RPSAP58",
        "RPLP3",
        "RP1",
    ]
    assert is_ribosomal(pa.chunked_array([proteins])).all()
    assert not is_ribosomal(pa.chunked_array([[*others, None]])).any()


@pytest.mark.parametrize(("organism", "proteins"), [("homo_sapiens", 88), ("mus_musculus", 88)])
def test_ribosomal_proteins_of_the_gene_tables(data, organism, proteins):
    """About 80 proteins make up the ribosome; a handful have a second gene."""
    genes = pd.read_csv(data / "genes" / f"genes_{organism}.csv.gz", header=None, keep_default_na=False)
    coding = genes[genes[4] == "protein_coding"]
    assert is_ribosomal(pa.chunked_array([coding[1].astype(str)])).sum() == proteins


def test_the_hash_is_of_ids_and_order(tmp_path):
    genes = choose_genes(VAR, MEASURED, MEASURED, [], 1)
    pq.write_table(genes.table, tmp_path / "v.parquet")
    read = Vocabulary.read(tmp_path / "v.parquet")
    assert read.hash == genes.hash != choose_genes(VAR, MEASURED, MEASURED, [], 2).hash
    assert Vocabulary(genes.table.take([1, 0, 2, 3])).hash != genes.hash


def test_damaged_files_are_said(tmp_path):
    path = tmp_path / "v.parquet"
    with pytest.raises(CellmillError, match="v.parquet cannot be read as parquet"):
        Vocabulary.read(path)
    genes = choose_genes(VAR, MEASURED, MEASURED, [], 1)
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
    # the corpus's data sets are those of its plan; the pancreas is held out
    pq.write_table(pa.table({"dataset_id": ["celltypist_blood", "li_cell_lines"]}), tmp_path / "plan.parquet")
    genes = build_vocabulary(
        Census(source="local", path=str(demo_census.soma)),
        demo_census.soma,
        organism="homo_sapiens",
        genes=Genes(min_datasets=min_datasets),
        plan=tmp_path / "plan.parquet",
        out=tmp_path / "vocabulary.parquet",
    )
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        var = cellxgene_census.get_var(census, "homo_sapiens")
        datasets = census["census_info"]["datasets"].read().concat().to_pandas()
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens")
    rows = datasets["soma_joinid"][datasets["dataset_id"] != "baron_pancreas"]
    measured = np.asarray(presence[rows.to_numpy()].sum(axis=0)).ravel()
    expected = var[(measured >= min_datasets) & (var["feature_type"] == "protein_coding")]
    assert genes.feature_ids == sorted(expected["feature_id"])
    assert Vocabulary.read(tmp_path / "vocabulary.parquet").hash == genes.hash
    everywhere = np.asarray(presence.sum(axis=0)).ravel()
    in_groups = {
        feature_id
        for feature_id, group in zip(genes.feature_ids, genes.group_V, strict=True)
        if 0 <= group < GROUPS // 2
    }
    assert np.bincount(genes.group_V[genes.group_V >= 0]).tolist() == [GENES_PER_GROUP] * GROUPS
    assert (everywhere[var["feature_id"].isin(in_groups)] == len(datasets)).all()  # also those outside the corpus
    names = dict(zip(expected["feature_id"], expected["feature_name"], strict=True))
    assert genes.feature_names == [names[feature_id] for feature_id in genes.feature_ids]
