"""Opening a Census and checking filter terms."""

import anndata as ad
import cellxgene_census
import pytest
import requests
from cellmill.census.build import build_census
from cellmill.census.read import check_terms, open_census, value_filter
from cellmill.config import Census
from cellmill.errors import CellmillError

CONFIG = Census()


@pytest.fixture(scope="module")
def census(demo_census):
    with open_census(CONFIG, demo_census.soma) as opened:
        yield opened


def cells_of(census, include: dict, exclude: dict):
    terms = (check_terms(census, "homo_sapiens", part) for part in (include, exclude))
    return cellxgene_census.get_obs(census, "homo_sapiens", value_filter=value_filter(*terms))


def test_the_buffer_size_is_that_of_the_config(census):
    assert int(census.context.tiledb_config["soma.init_buffer_bytes"]) == CONFIG.buffer_mb * 1024**2


def test_terms_select_the_cells_that_pandas_selects(census):
    everything = cellxgene_census.get_obs(census, "homo_sapiens")
    found = cells_of(
        census,
        {"dataset_id": ["li_cell_lines", "baron_pancreas"], "is_primary_data": [True]},
        {"disease": ["normal"], "donor_id": ["A549"]},
    )
    expected = everything[
        everything["dataset_id"].isin(["li_cell_lines", "baron_pancreas"])
        & (everything["disease"] != "normal")
        & (everything["donor_id"] != "A549")
    ]
    assert list(found["soma_joinid"]) == list(expected["soma_joinid"])
    assert len(found) == 171


def test_no_terms_are_no_filter():
    assert value_filter({}, {}) is None


def test_values_with_quotes_and_both_booleans(census):
    text = value_filter({"assay": ["10x 3' v3"], "is_primary_data": [True, False]}, {})
    assert text == """assay in ["10x 3' v3"] and (is_primary_data == True or is_primary_data == False)"""
    assert len(cellxgene_census.get_obs(census, "homo_sapiens", value_filter=text)) == 0


def test_each_of_several_diseases_of_a_cell_counts(demo_census, tmp_path):
    cells = ad.read_h5ad(demo_census.h5ads / "li_cell_lines.h5ad")[:9, :3000].copy()
    cells.obs["disease"] = [
        "flu || gout",
        "gout",
        "flu",
        "gout || pox",
        "normal",
        "flu || gout || pox",
        "pox",
        "flu",
        "gout",
    ]
    cells.write_h5ad(tmp_path / "ill.h5ad")
    build_census(
        *([tmp_path / "ill.h5ad"], demo_census.genes, tmp_path / "soma"),
        **{"extra_obs": [], "mapping": tmp_path / "mapping.parquet", "quiet": True},
    )
    with open_census(CONFIG, tmp_path / "soma") as census:
        assert list(cells_of(census, {"disease": ["gout"]}, {})["soma_joinid"]) == [0, 1, 3, 5, 8]
        assert list(cells_of(census, {"disease": ["gout"]}, {"disease": ["pox"]})["soma_joinid"]) == [0, 1, 8]
        assert list(cells_of(census, {"disease": ["flu || gout"]}, {})["soma_joinid"]) == [0]


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"tisue": ["lung"]}, "no obs column 'tisue'; did you mean 'tissue'"),
        ({"tissue": ["Pancreas"]}, "no cell of the Census has tissue 'Pancreas'; did you mean 'pancreas'"),
        ({"suspension_type": ["zzz"]}, "has suspension_type 'zzz'; it knows cell"),
        ({"is_primary_data": ["True"]}, "holds true or false, without quotes"),
        ({"tissue": [True]}, "holds text; put it in quotes"),
        ({"nnz": ["500"]}, "'nnz' holds numbers"),
        ({"tissue": []}, "names no value"),
    ],
)
def test_unknown_terms_end_in_one_sentence(census, terms, said):
    with pytest.raises(CellmillError, match=said):
        check_terms(census, "homo_sapiens", terms)


def test_an_unknown_organism_ends_in_one_sentence(census):
    with pytest.raises(CellmillError, match="no organism 'mus_musculus'; corpus.organism may be homo_sapiens"):
        check_terms(census, "mus_musculus", {})


def test_what_is_no_census_ends_in_one_sentence(demo_census, tmp_path):
    for path, said in (
        (tmp_path / "nowhere", "there is no Census at"),
        (tmp_path, "is no Census"),
        (demo_census.soma / "census_info", "is a SOMA object but no Census"),
    ):
        with pytest.raises(CellmillError, match=said), open_census(CONFIG, path):
            pass


@pytest.mark.parametrize(
    ("fault", "said"),
    [(ValueError("unknown"), "no release '2025-11-08'"), (requests.ConnectionError("away"), "cannot be reached")],
)
def test_the_public_census_out_of_reach_ends_in_one_sentence(monkeypatch, fault, said):
    def refuse(**asked):
        assert asked["census_version"] == "2025-11-08"
        raise fault

    monkeypatch.setattr(cellxgene_census, "open_soma", refuse)
    with pytest.raises(CellmillError, match=said), open_census(CONFIG, None):
        pass
