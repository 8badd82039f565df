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
from cellmill.census.build import build_census, write_census
from cellmill.census.genes import read_gene_table
from cellmill.census.h5ad import find_h5ads, open_h5ad, read_chunks
from cellmill.census.organisms import said_organism
from cellmill.census.source import make_source
from cellmill.census.wheels import write_gene_table
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

    def build(*h5ads, tables=None, **options):
        options = {"extra_obs": [], "mapping": tmp_path / "mapping.parquet", "quiet": True} | options
        build_census(list(h5ads), tables or {"homo_sapiens": demo_census.genes}, tmp_path / "soma", **options)
        return tmp_path / "soma"

    return build


@pytest.fixture(scope="module")
def tables(demo_census, tmp_path_factory):
    """Gene tables of human and mouse."""
    mouse = tmp_path_factory.mktemp("genes") / "mus_musculus.csv.gz"
    write_gene_table(demo_census.wheels, mouse, "mus_musculus")
    return {"homo_sapiens": demo_census.genes, "mus_musculus": mouse}


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


def test_columns_of_files_fill_the_census_own(data, demo_census, build):
    paths = [data / "cells" / f"{name}.h5ad" for name in ("fasttopics_pbmc_facs", "celltypist_sample", "baron_h1")]
    soma = build(*paths, obs_columns={"cell_type": ["subpop", "celltype"], "batch": ["split"]}, extra_obs=["batch"])
    facs, baron = (ad.read_h5ad(paths[at]).obs for at in (0, 2))
    read = read_back(soma, "fasttopics_pbmc_facs").obs
    assert list(read["cell_type"].astype(str)) == list(facs["subpop"].astype(str))
    assert list(read["batch"].astype(str)) == list(facs["split"].astype(str))
    assert set(read["cell_type_ontology_term_id"].astype(str)) == {"unknown"}
    assert set(read_back(soma, "celltypist_sample").obs["cell_type"].astype(str)) == {"unknown"}
    # a file's own column goes before any other
    assert list(read_back(soma, "baron_h1").obs["cell_type"].astype(str)) == list(baron["cell_type"].astype(str))
    with cellxgene_census.open_soma(uri=str(soma)) as census:
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    assert summary["columns_from fasttopics_pbmc_facs"] == "cell_type: subpop, batch: split"
    assert "columns_from baron_h1" not in summary
    assert "cell_type," not in summary["filled_columns fasttopics_pbmc_facs"]


def test_two_organisms_are_two_experiments_of_one_census(data, tables, build):
    paths = [
        data / "multiome" / "scicar_mouse_kidney_rna_atac.h5ad",  # says its species in uns; ids with versions
        data / "cells" / "celltypist_sample.h5ad",  # says nothing: human by default
        data / "time" / "mouse_blastocyst_E3.5_E4.5.h5ad",  # says nothing; the mouse's symbols in capitals
    ]
    soma = build(*paths, tables=tables, file_organisms={"mouse_blastocyst_E3.5_E4.5": "mouse"})
    given = [ad.read_h5ad(path) for path in paths]
    mapping = pd.read_parquet(soma.parent / "mapping.parquet")
    organisms = mapping.groupby("dataset_id")["organism"].unique().map(list)
    assert [organisms[path.stem] for path in paths] == [["mus_musculus"], ["homo_sapiens"], ["mus_musculus"]]
    shares = mapping.assign(is_mapped=mapping["feature_id"].notna() * mapping["counts"]).groupby("dataset_id")
    shares = shares["is_mapped"].sum() / shares["counts"].sum()
    assert (shares[[paths[0].stem, paths[2].stem]] > 0.99).all()
    capitals = mapping[mapping["dataset_id"] == paths[2].stem].set_index("gene")
    assert capitals.loc["GPX7", ["feature_id", "how"]].tolist() == ["ENSMUSG00000028597", "symbol"]

    with cellxgene_census.open_soma(uri=str(soma)) as census:
        datasets = census["census_info"]["datasets"].read().concat().to_pandas()
        assert list(datasets["dataset_id"]) == [path.stem for path in paths]
        assert list(datasets["dataset_total_cell_count"]) == [part.n_obs for part in given]
        assert set(census["census_info"]["organisms"].read().concat()["organism"].to_pylist()) == set(tables)
        counts = census["census_info"]["summary_cell_counts"].read().concat().to_pandas()
        assert (counts.groupby(["organism", "category"])["total_cell_count"].sum().unstack().T == [559, 1456]).all(None)
        for organism, own in (("homo_sapiens", [1]), ("mus_musculus", [0, 2])):
            read = cellxgene_census.get_anndata(census, organism)
            assert list(read.obs["soma_joinid"]) == list(range(read.n_obs))
            assert list(read.obs["observation_joinid"]) == [cell for at in own for cell in given[at].obs_names]
            prefix = {"homo_sapiens": "ENSG0", "mus_musculus": "ENSMUSG0"}[organism]
            assert read.var["feature_id"].str.startswith(prefix).all()
            kept = mapping[(mapping["organism"] == organism) & mapping["feature_id"].notna()]
            assert read.X.sum() == kept["counts"].sum()
            presence = cellxgene_census.get_presence_matrix(census, organism).toarray()
            assert presence.shape == (3, read.n_vars)
            for at, path in enumerate(paths):
                cells = (read.obs["dataset_id"] == path.stem).to_numpy()
                assert np.array_equal(presence[at], np.asarray((read.X[cells] > 0).sum(axis=0) > 0).ravel())


@pytest.mark.parametrize(
    ("uns", "obs"),
    [
        ({"organism": "Mus musculus"}, {}),
        ({"species": "mus_musculus"}, {"tissue": "kidney"}),
        ({"organism_ontology_term_id": "NCBITaxon:10090"}, {"organism": "Homo sapiens"}),
        ({}, {"organism": "mouse"}),
        ({"organism": "unknown"}, {"organism_ontology_term_id": "NCBITaxon:10090"}),
    ],
)
def test_a_file_says_its_organism(uns, obs):
    assert said_organism(uns, pd.DataFrame(obs, index=["cell1", "cell2"]), "x.h5ad") == "mus_musculus"


def test_organisms_that_no_census_can_hold(cells, build, tmp_path):
    fish, both = cells.copy(), cells.copy()
    fish.uns["organism"] = "Danio rerio"
    with pytest.raises(
        CellmillError, match=r"fish.h5ad: uns\['organism'\] 'Danio rerio' is not an organism of the Cen"
    ):
        build(write(fish, tmp_path / "fish.h5ad"))
    both.obs["organism"] = ["Homo sapiens"] * 20 + ["Mus musculus"] * (both.n_obs - 20)
    with pytest.raises(
        CellmillError, match=r"obs\['organism'\] names several organisms \(Homo sapiens, Mus musculus\)"
    ):
        build(write(both, tmp_path / "both.h5ad"))
    # the user's own word goes before the file's
    build(tmp_path / "fish.h5ad", file_organisms={"fish": "human"})


def test_cells_that_a_program_makes(demo_census, cells, tmp_path):
    genes = {"homo_sapiens": read_gene_table(demo_census.genes)}

    def chunks():
        for start in range(0, 2 * cells.n_obs, 11):
            rows = np.arange(start, min(start + 11, 2 * cells.n_obs)) % cells.n_obs
            yield start, cells.X[rows]

    obs = pd.concat([cells.obs, cells.obs])
    source = make_source("twice", obs, cells.var, chunks, genes["homo_sapiens"], "homo_sapiens")
    write_census([source], genes, tmp_path / "soma", mapping=tmp_path / "mapping.parquet", quiet=True)
    read = read_back(tmp_path / "soma", "twice")
    assert read.n_obs == 2 * cells.n_obs
    assert (read.X[: cells.n_obs] != read.X[cells.n_obs :]).nnz == 0
    assert read.X.sum() == pd.read_parquet(tmp_path / "mapping.parquet").dropna(subset="feature_id")["counts"].sum()
    short = make_source("short", obs, cells.var, lambda: [(0, cells.X)], genes["homo_sapiens"], "homo_sapiens")
    with pytest.raises(CellmillError, match=f"short gave the counts of {cells.n_obs} cells for the {2 * cells.n_obs}"):
        write_census([short], genes, tmp_path / "soma", mapping=tmp_path / "mapping.parquet", quiet=True)
    assert read_back(tmp_path / "soma", "twice").n_obs == 2 * cells.n_obs


def test_counts_of_many_tiles_of_cells_and_genes(demo_census, cells, build, tmp_path):
    # chunks that begin anywhere in a tile: the second data set starts at a joinid that is no multiple of 2,048
    li = ad.read_h5ad(demo_census.h5ads / "li_cell_lines.h5ad")[::19, ::8]
    many = ad.concat([li] * 80)
    many.obs_names = [f"cell{at}" for at in range(many.n_obs)]
    soma = build(write(li, tmp_path / "a.h5ad"), write(many, tmp_path / "b.h5ad"))
    first, read = read_back(soma, "a"), read_back(soma, "b")
    assert read.n_obs == 2400
    assert read.n_vars > 2048
    for at in range(0, 2400, 30):
        assert (read.X[at : at + 30] != first.X).nnz == 0


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
    with pytest.raises(CellmillError, match="census.organisms names 'b', but no file is called so; it knows a"):
        build(path, file_organisms={"b": "mouse"})
    with pytest.raises(CellmillError, match=r"a.h5ad is of mus_musculus, but gene tables .* homo_sapiens only"):
        build(path, file_organisms={"a": "mouse"})
    with pytest.raises(CellmillError, match="which a Census has anyway"):
        build(path, extra_obs=["tissue"])
    with pytest.raises(CellmillError, match="census.extra_obs names 'tisue', a column of no file's obs; did you mean"):
        build(path, extra_obs=["tisue"])
    with pytest.raises(CellmillError, match=r"census.obs_columns fills 'cel_type', .* did you mean 'cell_type'"):
        build(path, obs_columns={"cel_type": ["donor_id"]})
    with pytest.raises(CellmillError, match="census.obs_columns fills 'raw_sum', which is neither"):
        build(path, obs_columns={"raw_sum": ["donor_id"]})
    with pytest.raises(CellmillError, match=r"census.obs_columns.cell_type names 'lin', a column of no file's obs"):
        build(path, obs_columns={"cell_type": ["donor_id", "lin"]})
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
build.build_census([Path({str(path)!r})], {{"homo_sapiens": Path({str(demo_census.genes)!r})}},
                   Path({str(tmp_path / "soma")!r}), extra_obs=[],
                   mapping=Path({str(tmp_path / "mapping.parquet")!r}), quiet=True)
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
