"""A private Census from other people's .h5ad files, and every bad input's sentence."""

import signal
import subprocess
import sys

import anndata as ad
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from cellmill.census.build import build_census
from cellmill.census.h5ad import find_h5ads, open_h5ad, read_chunks
from cellmill.errors import CellmillError

REAL = (
    "cells/celltypist_sample.h5ad",
    "cells/tenx_pbmc1k_v2.h5ad",
    "formats/cellxgene_placenta.h5ad",
    "cells/harmony_kang_ifnb.h5ad",
)


@pytest.fixture(scope="module")
def cells(demo_census) -> ad.AnnData:
    """Thirty real cells of four lines, 2,000 genes."""
    li = ad.read_h5ad(demo_census.h5ads / "li_cell_lines.h5ad")
    return li[::19, 1000:3000].copy()


@pytest.fixture
def build(demo_census, tmp_path):
    """Build a Census of the given files in a folder of the test."""

    def build(*h5ads, **options):
        options = {"extra_obs": [], "mapping": tmp_path / "mapping.parquet", "quiet": True} | options
        build_census(list(h5ads), demo_census.genes, tmp_path / "soma", **options)
        return tmp_path / "soma"

    return build


def write(adata: ad.AnnData, path):
    adata.write_h5ad(path)
    return path


def read_back(soma, name: str) -> ad.AnnData:
    with cellxgene_census.open_soma(uri=str(soma)) as census:
        return cellxgene_census.get_anndata(census, "homo_sapiens", obs_value_filter=f"dataset_id == '{name}'")


def test_real_files_come_back_cell_for_cell(data, demo_census, build):
    paths = [data / file for file in REAL]
    soma = build(*paths, extra_obs=["condition"], wheels=demo_census.wheels)
    mapping = pd.read_parquet(soma.parent / "mapping.parquet")
    for path in paths:
        given, name = ad.read_h5ad(path), path.stem
        read = read_back(soma, name)
        assert list(read.obs["observation_joinid"]) == list(given.obs_names)
        where = mapping[mapping["dataset_id"] == name].reset_index(drop=True).dropna(subset="feature_id")
        onto = sp.csr_matrix(
            (np.ones(len(where)), (where.index, pd.Index(read.var["feature_id"]).get_indexer(where["feature_id"]))),
            shape=(given.n_vars, read.n_vars),
        )
        assert (given.X @ onto != read.X).nnz == 0
        assert where["counts"].sum() == read.X.sum()
    placenta = read_back(soma, "cellxgene_placenta").obs
    given = ad.read_h5ad(paths[2]).obs
    for column in ("cell_type", "cell_type_ontology_term_id", "donor_id", "tissue_general"):
        assert list(placenta[column].astype(str)) == list(given[column].astype(str))
    assert set(placenta["assay"].astype(str)) == set(placenta["condition"].astype(str)) == {"unknown"}
    kang = read_back(soma, "harmony_kang_ifnb").obs
    assert list(kang["condition"].astype(str)) == list(ad.read_h5ad(paths[3]).obs["condition"].astype(str))
    with cellxgene_census.open_soma(uri=str(soma)) as census:
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert "assay" in summary["filled_columns cellxgene_placenta"]
    assert "donor_id" not in summary["filled_columns cellxgene_placenta"]


def test_missing_general_tissue_comes_from_the_ontology(cells, demo_census, build, tmp_path):
    some = cells.copy()
    some.obs = pd.DataFrame(
        {"tissue": "lobe of liver", "tissue_ontology_term_id": "UBERON:0001113"}, index=cells.obs_names
    )
    obs = read_back(build(write(some, tmp_path / "liver.h5ad"), wheels=demo_census.wheels), "liver").obs
    assert set(obs["tissue_general"].astype(str)) == {"liver"}
    assert set(obs["tissue_general_ontology_term_id"].astype(str)) == {"UBERON:0002107"}


@pytest.mark.parametrize("kind", ["csr", "csc", "dense"])
def test_every_storage_of_x_is_read(cells, tmp_path, kind):
    stored = cells.copy()
    stored.X = {"csr": cells.X, "csc": cells.X.tocsc(), "dense": cells.X.toarray()}[kind]
    h5ad = open_h5ad(write(stored, tmp_path / "x.h5ad"))
    chunks = [chunk.toarray() for _, chunk in read_chunks(h5ad, rows=7)]
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate(chunks), cells.X.toarray())


@pytest.mark.parametrize("place", ["raw/X", "layers/counts"])
def test_counts_are_found_where_x_is_normalised(cells, build, tmp_path, place):
    given = cells.copy()
    if place == "raw/X":
        given.raw = cells
    else:
        given.layers["counts"] = cells.X.copy()
    given.X = np.log1p(cells.X.toarray())
    given = given[:, :1500]
    path = write(given, tmp_path / "given.h5ad")
    assert open_h5ad(path).layer == place
    mapping = tmp_path / "mapping.parquet"
    read = read_back(build(path), "given")
    n_genes = 2000 if place == "raw/X" else 1500
    kept = pd.read_parquet(mapping)
    assert len(kept) == n_genes
    assert read.X.sum() == cells.X[:, :n_genes][:, kept["feature_id"].notna().to_numpy()].sum()


def test_names_of_one_gene_are_summed(cells, build, tmp_path):
    two = cells[:, :2].copy()
    two.var_names = ["INS", "ENSG00000254647.9"]
    read = read_back(build(write(two, tmp_path / "two.h5ad")), "two")
    assert read.var["feature_name"].tolist() == ["INS"]
    assert np.array_equal(read.X.toarray().ravel(), two.X.toarray().sum(axis=1))


def spoilt(cells: ad.AnnData, value: float) -> ad.AnnData:
    """The cells with one count, of the 3rd cell and 5th gene, replaced."""
    dense = cells.X.toarray()
    dense[2, 4] = value
    other = cells.copy()
    other.X = sp.csr_matrix(dense)
    return other


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "is not a number"), (-1.0, "is negative"), (0.5, "no whole number"), (3e7, "above the")],
)
def test_values_that_are_no_counts(cells, build, tmp_path, value, said):
    path = write(spoilt(cells, value), tmp_path / "bad.h5ad")
    with pytest.raises(CellmillError, match=said) as caught:
        build(path)
    for part in (str(path), cells.obs_names[2], cells.var_names[4], "layers/counts"):
        assert part in str(caught.value)
    assert not (tmp_path / "soma").exists()


def test_a_fault_far_down_the_file_is_found(cells, build, tmp_path):
    many = ad.concat([cells[:, :200]] * 80)
    many.obs_names = [f"cell{i}" for i in range(many.n_obs)]
    many.X[2300, 7] = 1.5
    with pytest.raises(CellmillError, match="cell2300"):
        build(write(many, tmp_path / "many.h5ad"))
    assert not list(tmp_path.glob("soma*"))


def test_truncated_corrupt_and_foreign_files(cells, build, tmp_path):
    whole = write(cells, tmp_path / "whole.h5ad").read_bytes()
    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "foreign": b"gene,cell1\nINS,3\n",
        "corrupt": whole[:2000] + bytes(len(whole) - 2000),
    }.items():
        path = tmp_path / f"{name}.h5ad"
        path.write_bytes(content)
        with pytest.raises(CellmillError, match=f"{name}.h5ad cannot be read as .h5ad"):
            build(path)


def test_compressed_counts_that_went_bad_on_disk(demo_census, build, tmp_path):
    content = bytearray((demo_census.h5ads / "celltypist_blood.h5ad").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50_000] = bytes(50_000)
    path = tmp_path / "rotten.h5ad"
    path.write_bytes(content)
    with pytest.raises(CellmillError, match="rotten.h5ad"):
        build(path)


def test_empty_inputs(cells, build, tmp_path):
    with pytest.raises(CellmillError, match="holds no cells"):
        build(write(cells[:0].copy(), tmp_path / "empty.h5ad"))
    with pytest.raises(CellmillError, match="holds no genes"):
        build(write(cells[:, :0].copy(), tmp_path / "bare.h5ad"))
    with pytest.raises(CellmillError, match=r"no .h5ad file was given"):
        build()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CellmillError, match=r"holds no .h5ad file"):
        find_h5ads(tmp_path / "folder")
    with pytest.raises(CellmillError, match="does not exist"):
        find_h5ads(tmp_path / "nowhere")
    with pytest.raises(CellmillError, match="does not exist"):
        build(tmp_path / "absent.h5ad")


def test_impossible_requests(cells, build, tmp_path):
    path = write(cells, tmp_path / "a.h5ad")
    (tmp_path / "other").mkdir()
    with pytest.raises(CellmillError, match=r"two files are called a.h5ad"):
        build(path, write(cells, tmp_path / "other" / "a.h5ad"))
    with pytest.raises(CellmillError, match="'danio_rerio' is not an organism"):
        build(path, organism="danio_rerio")
    with pytest.raises(CellmillError, match="which a Census has anyway"):
        build(path, extra_obs=["tissue"])
    with pytest.raises(CellmillError, match="census.extra_obs names 'tisue', a column of no file's obs; did you mean"):
        build(path, extra_obs=["tisue"])
    (tmp_path / "soma").mkdir()
    (tmp_path / "soma" / "thesis.doc").write_text("dear")
    with pytest.raises(CellmillError, match="is no Census"):
        build(path)
    assert (tmp_path / "soma" / "thesis.doc").exists()


def test_a_killed_build_leaves_nothing_that_looks_finished(cells, demo_census, build, tmp_path):
    path = write(cells, tmp_path / "a.h5ad")
    program = f"""
import os, signal
from pathlib import Path
import cellmill.census.build as build
build.write_mapping = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build.build_census([Path({str(path)!r})], Path({str(demo_census.genes)!r}), Path({str(tmp_path / "soma")!r}),
                   extra_obs=[], mapping=Path({str(tmp_path / "mapping.parquet")!r}), quiet=True)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.h5ad", "soma.partial"]
    build(path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.h5ad", "mapping.parquet", "soma"]


def test_a_full_disk_is_said(cells, build, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cellmill.census.build.write_table", full)
    with pytest.raises(CellmillError, match="the disk is full"):
        build(write(cells, tmp_path / "a.h5ad"))
    assert [found.name for found in tmp_path.iterdir()] == ["a.h5ad"]
