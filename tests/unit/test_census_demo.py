"""The demo's cells and the Census built from them, read back with plain cellxgene_census."""

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
from cellmill.census.demo import BARON_TYPES, LINES
from cellmill.census.layout import OBS_SCHEMA

NAMES = ("baron_pancreas", "celltypist_blood", "li_cell_lines")


@pytest.fixture(scope="module")
def census(demo_census):
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as opened:
        yield opened


@pytest.fixture(scope="module")
def mapping(demo_census) -> pd.DataFrame:
    return pd.read_parquet(demo_census.mapping)


def counts_by_id(h5ad: ad.AnnData, mapping: pd.DataFrame, ids: pd.Index) -> np.ndarray:
    """The counts of an h5ad over Census genes, summed by a plain loop over the mapping."""
    expected = np.zeros((h5ad.n_obs, len(ids)), dtype=np.float64)
    dense = h5ad.X.toarray()
    for column, feature_id in enumerate(mapping["feature_id"]):
        if feature_id is not None:
            expected[:, ids.get_loc(feature_id)] += dense[:, column]
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_plain_get_anndata_gives_back_every_count(demo_census, census, mapping, name):
    h5ad = ad.read_h5ad(demo_census.h5ads / f"{name}.h5ad")
    mapping = mapping.query("dataset_id == @name")
    assert list(mapping["gene"]) == list(h5ad.var_names)
    read = cellxgene_census.get_anndata(census, "homo_sapiens", obs_value_filter=f"dataset_id == '{name}'")
    assert list(read.obs["observation_joinid"]) == list(h5ad.obs_names)
    rows = np.arange(0, h5ad.n_obs, 7)
    expected = counts_by_id(h5ad[rows], mapping, pd.Index(read.var["feature_id"]))
    assert np.array_equal(read.X[rows].toarray(), expected)
    # All the other cells by their totals.
    mapped = mapping["feature_id"].notna().to_numpy()
    assert np.array_equal(read.X.sum(axis=1), h5ad.X[:, mapped].sum(axis=1))


def test_demo_cells_are_those_of_the_studies(demo_census):
    baron = ad.read_h5ad(demo_census.h5ads / "baron_pancreas.h5ad")
    assert baron.shape == (1937, 20125)
    assert dict(baron.obs["library"].value_counts()) == {"human1_lib1": 568, "human1_lib2": 629, "human1_lib3": 740}
    assert set(baron.obs["author_cell_type"]) == set(BARON_TYPES)
    beta = baron[baron.obs["cell_type"] == "type B pancreatic cell"]
    assert beta.n_obs == 872
    others = baron[baron.obs["cell_type"] != "type B pancreatic cell"]
    assert beta[:, "INS"].X.mean() > 20 * others[:, "INS"].X.mean()
    li = ad.read_h5ad(demo_census.h5ads / "li_cell_lines.h5ad")
    assert set(li.obs["donor_id"]) == set(LINES)
    in_batches = li.obs.groupby("donor_id", observed=True)["library"].nunique()
    assert set(in_batches[in_batches == 2].index) == {"GM12878", "H1"}
    # GM12878 is female, H1 male; K562 makes fetal globin.
    medians = pd.DataFrame(li[:, ["XIST", "RPS4Y1", "HBG1"]].X.toarray(), columns=["XIST", "RPS4Y1", "HBG1"])
    medians = medians.groupby(li.obs["donor_id"].to_numpy()).median()
    assert medians["XIST"]["GM12878"] > 100 > medians["XIST"]["H1"]
    assert medians["RPS4Y1"]["H1"] > 100 > medians["RPS4Y1"]["GM12878"]
    assert medians["HBG1"].idxmax() == "K562"
    for name in NAMES:
        x = ad.read_h5ad(demo_census.h5ads / f"{name}.h5ad").X
        assert x.format == "csr"
        assert x.dtype == np.float32
        assert np.array_equal(x.data, np.rint(x.data))
        assert x.data.min() >= 1


def test_layout_is_that_of_the_census(census):
    assert set(census["census_info"]) == {"summary", "datasets", "summary_cell_counts", "organisms"}
    experiment = census["census_data"]["homo_sapiens"]
    assert isinstance(experiment, soma.Experiment)
    assert experiment.obs.keys() == (*OBS_SCHEMA.names, "library", "author_cell_type")
    rna = experiment.ms["RNA"]
    assert rna.var.keys() == (
        *("soma_joinid", "feature_id", "feature_name", "feature_type", "feature_length"),
        *("nnz", "n_measured_obs"),
    )
    assert rna.X["raw"].schema.field("soma_data").type == pa.float32()
    summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert summary["census_schema_version"] == "2.4.0"
    assert summary["total_cell_count"] == "3057"
    assert summary["number_donors_homo_sapiens"] == "8"
    counts = census["census_info"]["summary_cell_counts"].read().concat().to_pandas()
    assert (counts.groupby("category")["total_cell_count"].sum() == 3057).all()


def test_filters_on_dictionary_columns_find_their_cells(census):
    # The trap of tiledbsoma 2.3.0: a dictionary written through the wrong handle is lost, and a filter finds nothing.
    for column, value, n in (
        ("dataset_id", "li_cell_lines", 561),
        ("cell_type", "pancreatic epsilon cell", 13),
        ("library", "human1_lib1", 568),
        ("disease", "lung adenocarcinoma", 121),
        ("tissue_general", "pancreas", 1937),
    ):
        found = cellxgene_census.get_obs(census, "homo_sapiens", value_filter=f"{column} == '{value}'")
        assert len(found) == n
        assert set(found[column]) == {value}


def test_joinids_of_a_data_set_are_contiguous(census):
    obs = cellxgene_census.get_obs(census, "homo_sapiens", column_names=["soma_joinid", "dataset_id"])
    assert list(obs["soma_joinid"]) == list(range(3057))
    assert (obs["dataset_id"].astype(str) != obs["dataset_id"].astype(str).shift()).sum() == len(NAMES)


def test_statistics_and_presence_follow_from_the_counts(census):
    rna = census["census_data"]["homo_sapiens"].ms["RNA"]
    obs = cellxgene_census.get_obs(census, "homo_sapiens")
    var = cellxgene_census.get_var(census, "homo_sapiens")
    table = rna.X["raw"].read().tables().concat()
    cell, gene, count = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
    assert (count > 0).all()
    assert np.array_equal(obs["raw_sum"], np.bincount(cell, weights=count))
    assert np.array_equal(obs["nnz"], np.bincount(cell))
    some = [0, 700, 2000, 2900, 3056]
    values = [count[cell == row].astype(np.float64) for row in some]
    assert np.allclose(obs["raw_mean_nnz"][some], [value.mean() for value in values])
    assert np.allclose(obs["raw_variance_nnz"][some], [value.var(ddof=1) for value in values])
    assert np.array_equal(var["nnz"], np.bincount(gene, minlength=len(var)))

    presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens").toarray()
    assert presence.shape == (3, len(var))
    assert set(np.unique(presence)) == {0, 1}
    datasets = obs["dataset_id"].cat.codes.to_numpy()[cell]
    for at in range(3):
        measured = np.zeros(len(var), dtype=bool)
        measured[gene[datasets == at]] = True
        assert np.array_equal(presence[at], measured)
        assert set(obs["n_measured_vars"][obs["dataset_id"] == NAMES[at]]) == {measured.sum()}
    sizes = obs["dataset_id"].value_counts().reindex(NAMES).to_numpy()
    assert np.array_equal(var["n_measured_obs"], sizes @ presence)


def test_genes_are_keyed_by_ensembl_id_with_length_and_type(census):
    var = cellxgene_census.get_var(census, "homo_sapiens").set_index("feature_id")
    assert var.index.is_unique
    insulin = var.loc["ENSG00000254647"]
    assert insulin["feature_name"] == "INS"
    assert insulin["feature_type"] == "protein_coding"
    assert insulin["feature_length"] > 0
