"""Opening a Census and checking filter terms."""

import shutil
from pathlib import Path

import cellxgene_census
import pyarrow as pa
import pytest
import requests
import tiledbsoma as soma
from cellmill.census.read import check_terms, open_census, value_filter, values_elsewhere
from cellmill.config import Census
from cellmill.errors import CellmillError

CONFIG = Census()


@pytest.fixture(scope="module")
def census(demo_census):
    with open_census(CONFIG, demo_census.soma) as opened:
        yield opened


def cells_of(census, include: dict, exclude: dict, organism: str = "homo_sapiens"):
    terms = (check_terms(census, organism, part) for part in (include, exclude))
    return cellxgene_census.get_obs(census, organism, value_filter=value_filter(*terms))


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


def add_organism(soma_path: Path, name: str, columns: dict[str, list]) -> None:
    """Add an organism whose obs has these columns of text."""
    table = pa.table({"soma_joinid": list(range(len(next(iter(columns.values()))))), **columns})
    with soma.open(str(soma_path / "census_data"), "w") as organisms:
        experiment = organisms.add_new_collection(name, soma.Experiment)
        experiment.add_new_dataframe("obs", schema=table.schema, domain=[[0, len(table) - 1]]).write(table)


def test_each_of_several_diseases_of_a_cell_counts(demo_census, tmp_path):
    diseases = ["flu || gout", "gout", "flu", "gout || pox", "normal", "flu || gout || pox", "pox", "flu", "gout"]
    add_organism(shutil.copytree(demo_census.soma, tmp_path / "soma"), "mus_musculus", {"disease": diseases})

    def joinids(census, include: dict, exclude: dict) -> list[int]:
        return list(cells_of(census, include, exclude, "mus_musculus")["soma_joinid"])

    with open_census(CONFIG, tmp_path / "soma") as census:
        assert joinids(census, {"disease": ["gout"]}, {}) == [0, 1, 3, 5, 8]
        assert joinids(census, {"disease": ["gout"]}, {"disease": ["pox"]}) == [0, 1, 8]
        assert joinids(census, {"disease": ["flu || gout"]}, {}) == [0]


def test_a_value_of_another_organism_selects_nothing(demo_census, tmp_path):
    path = shutil.copytree(demo_census.soma, tmp_path / "soma")
    add_organism(path, "mus_musculus", {"tissue": ["islet", "tail || paw"], "strain": ["black", "black"]})
    with open_census(CONFIG, path) as census:
        assert len(cells_of(census, {"tissue": ["pancreas", "islet"]}, {})) == 1937
        assert len(cells_of(census, {"tissue": ["paw"]}, {})) == 0
        assert len(cells_of(census, {}, {"tissue": ["islet", "pancreas"]})) == 3057 - 1937
        assert values_elsewhere(census, "homo_sapiens", "tissue") == {"islet", "tail || paw", "tail", "paw"}
        assert values_elsewhere(census, "mus_musculus", "strain") == set()
        for value, near in (("isle", "'islet'"), ("pancras", "'pancreas'")):
            with pytest.raises(CellmillError, match=f"no cell of the Census has tissue '{value}'; did you mean {near}"):
                check_terms(census, "homo_sapiens", {"tissue": [value]})
        with pytest.raises(CellmillError, match="no obs column 'strain'"):
            check_terms(census, "homo_sapiens", {"strain": ["black"]})


@pytest.mark.parametrize("size", [4, 32])
def test_buffers_of_a_size_of_their_own(demo_census, size):
    with open_census(CONFIG, demo_census.soma, buffer_mb=size) as census:
        assert int(census.context.tiledb_config["soma.init_buffer_bytes"]) == size * 1024**2


def test_a_census_that_vanishes_ends_in_one_sentence(demo_census, tmp_path):
    path = shutil.copytree(demo_census.soma, tmp_path / "soma")

    def read_counts() -> None:
        with open_census(CONFIG, path) as census:
            counts = census["census_data"]["homo_sapiens"].ms["RNA"].X["raw"]
            shutil.rmtree(path)
            list(counts.read((slice(0, 100),)).tables())

    with pytest.raises(CellmillError, match="the Census at .*soma could not be read to the end .*run again") as error:
        read_counts()
    assert "\n" not in str(error.value)


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
    with pytest.raises(CellmillError, match="no organism 'mus_musculus'; corpus.organisms may be homo_sapiens"):
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
