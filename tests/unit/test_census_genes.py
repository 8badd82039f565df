"""Mapping of gene names to Ensembl ids."""

import gzip

import anndata as ad
import pandas as pd
import pytest
from cellmill.census.genes import GeneTable, in_capitals, map_genes, mapped_shares, read_gene_table
from cellmill.errors import CellmillError


@pytest.fixture(scope="module")
def table(demo_census) -> GeneTable:
    return read_gene_table(demo_census.genes)


def test_id_symbol_alias_dots_ambiguous_and_none(table):
    shared = table.genes["feature_name"].value_counts().idxmax()
    genes = ["ENSG00000254647.7", "GCG", "ATP5B", "HLA.A", shared, "no such gene", "INS"]
    mapping = map_genes(pd.DataFrame(index=genes), table, "here.h5ad")
    assert list(mapping["how"]) == ["id", "symbol", "alias", "symbol", "ambiguous", "none", "symbol"]
    assert list(mapping["feature_id"]) == [
        *("ENSG00000254647", "ENSG00000115263", "ENSG00000110955", "ENSG00000206503"),
        *(None, None, "ENSG00000254647"),
    ]
    # INS came twice, once as id and once as symbol.
    assert list(mapping["n_merged"]) == [2, 1, 1, 1, 0, 0, 2]


def test_a_symbol_of_several_ids_goes_to_the_one_that_hgnc_names(table):
    # CD99 lies in the pseudoautosomal region: the copies on X and Y have an id each and one symbol.
    assert (table.genes["feature_name"] == "CD99").sum() == 2
    assert map_genes(pd.DataFrame(index=["CD99"]), table, "x")["feature_id"].tolist() == ["ENSG00000002586"]


def test_names_in_capitals_are_matched_as_such_where_all_are(table):
    # C1orf87 is a current symbol; a file that has any small letter is taken at its word
    capitals = map_genes(pd.DataFrame(index=["C1ORF87", "INS"]), table, "x")
    assert list(capitals["feature_id"]) == ["ENSG00000162598", "ENSG00000254647"]
    assert list(capitals["how"]) == ["symbol", "symbol"]
    assert list(map_genes(pd.DataFrame(index=["C1ORF87", "INS", "x"]), table, "x")["how"]) == ["none", "symbol", "none"]


def test_capitals_that_are_of_two_genes_are_ambiguous(tmp_path):
    (tmp_path / "genes.csv").write_text(
        "ENSMUSG00000000001,Aa1,1,1,protein_coding\nENSMUSG00000000002,AA1,1,1,protein_coding\n"
        "ENSMUSG00000000003,Gapdh,1,1,protein_coding\n"
    )
    mouse = read_gene_table(tmp_path / "genes.csv")
    mapping = map_genes(pd.DataFrame(index=["GAPDH", "AA1"]), mouse, "x")
    # AA1 is the symbol of one gene as it stands
    assert list(mapping["feature_id"]) == ["ENSMUSG00000000003", "ENSMUSG00000000002"]
    assert in_capitals(mouse.symbols) == {"AA1": None, "GAPDH": "ENSMUSG00000000003"}


def test_ids_in_a_column_go_before_names_in_the_index(table):
    var = pd.DataFrame({"gene_ids": ["ENSG00000254647", "ENSG99999999999"]}, index=["GCG", "SST"])
    mapping = map_genes(var, table, "here.h5ad")
    assert list(mapping["feature_id"]) == ["ENSG00000254647", "ENSG00000157005"]
    assert list(mapping["how"]) == ["id", "symbol"]


@pytest.mark.parametrize(
    ("file", "how", "share"),
    [
        ("cells/tenx_pbmc1k_v2.h5ad", "id", 0.95),
        ("cells/harmony_kang_ifnb.h5ad", "symbol", 0.85),
        ("formats/cellxgene_placenta.h5ad", "symbol", 0.8),
    ],
)
def test_real_data_sets_map(data, table, file, how, share):
    var = ad.read_h5ad(data / file, backed="r").var
    mapping = map_genes(var, table, file)
    assert len(mapping) == len(var)
    assert (mapping["how"] == how).mean() > share
    mapped = mapping.dropna(subset="feature_id")
    assert mapped["feature_id"].isin(table.genes.index).all()
    assert set(mapping["how"][mapping["feature_id"].isna()]) <= {"ambiguous", "none"}


def test_symbols_agree_with_the_ids_of_the_same_file(data, table):
    # 10x files carry both; where the symbol maps, it must nearly always name the id beside it.
    var = ad.read_h5ad(data / "cells/tenx_pbmc1k_v2.h5ad", backed="r").var
    by_symbol = map_genes(pd.DataFrame(index=var["symbol"].astype(str).drop_duplicates()), table, "symbols")
    ids = pd.Series(var.index, index=var["symbol"].astype(str))
    ids = ids[~ids.index.duplicated()]
    both = by_symbol.dropna(subset="feature_id")
    both = both[both["gene"].map(ids).isin(table.genes.index)]
    assert len(both) > 20_000
    assert (both["feature_id"] == both["gene"].map(ids)).mean() > 0.995


def test_shares_count_genes_and_counts(demo_census):
    shares = mapped_shares(pd.read_parquet(demo_census.mapping))
    sums = shares.groupby("dataset_id")[["gene_share", "count_share"]].sum()
    assert sums.to_numpy() == pytest.approx(1)
    baron = shares[shares["dataset_id"] == "baron_pancreas"].set_index("how")
    assert baron["genes"].sum() == 20125
    assert baron.loc["symbol", "count_share"] > 0.95
    assert baron.loc["none", "count_share"] < 0.01


def test_bad_genes_end_in_one_sentence(table):
    with pytest.raises(CellmillError, match="gene INS stands twice in var"):
        map_genes(pd.DataFrame(index=["INS", "GCG", "INS"]), table, "here.h5ad")
    with pytest.raises(CellmillError, match=r"here.h5ad: none of its 2 genes \(gene_1, gene_2"):
        map_genes(pd.DataFrame(index=["gene_1", "gene_2"]), table, "here.h5ad")


def test_bad_gene_tables_end_in_one_sentence(tmp_path):
    with pytest.raises(CellmillError, match="does not exist"):
        read_gene_table(tmp_path / "absent.csv.gz")
    few = tmp_path / "few.csv"
    few.write_text("ENSG00000254647,INS\n")
    with pytest.raises(CellmillError, match="has 2 columns"):
        read_gene_table(few)
    twice = tmp_path / "twice.csv.gz"
    with gzip.open(twice, "wt") as file:
        file.write("ENSG00000254647,INS,7,465,protein_coding\n" * 2)
    with pytest.raises(CellmillError, match="names ENSG00000254647 twice"):
        read_gene_table(twice)
