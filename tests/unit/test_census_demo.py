"""The demo's cells and the Census built from them, read back with plain cellxgene_census."""

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest

NAMES = ("baron_pancreas", "celltypist_blood", "li_cell_lines")


def counts_by_id(h5ad: ad.AnnData, mapping: pd.DataFrame, ids: pd.Index) -> np.ndarray:
    """The counts of an h5ad over Census genes, summed by a plain loop over the mapping."""
    expected = np.zeros((h5ad.n_obs, len(ids)), dtype=np.float64)
    dense = h5ad.X.toarray()
    for column, feature_id in enumerate(mapping["feature_id"]):
        if feature_id is not None:
            expected[:, ids.get_loc(feature_id)] += dense[:, column]
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_plain_get_anndata_gives_back_every_count(demo_census, name):
    h5ad = ad.read_h5ad(demo_census.h5ads / f"{name}.h5ad")
    mapping = pd.read_parquet(demo_census.mapping).query("dataset_id == @name")
    assert list(mapping["gene"]) == list(h5ad.var_names)
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as census:
        read = cellxgene_census.get_anndata(census, "homo_sapiens", obs_value_filter=f"dataset_id == '{name}'")
    assert list(read.obs["observation_joinid"]) == list(h5ad.obs_names)
    rows = np.arange(0, h5ad.n_obs, 7)
    expected = counts_by_id(h5ad[rows], mapping, pd.Index(read.var["feature_id"]))
    assert np.array_equal(read.X[rows].toarray(), expected)
