"""The layout of Census schema 2.4: its frames and arrays, made empty, and the tables of ``census_info``.

Every SOMA object is created first, its handles are closed, and it is opened again by its URI to be written: tiledbsoma
2.3.0 silently loses the dictionary of a column that is written through the handle of the parent that created it.

Reference: the Census schema 2.4.0 and its builder, github.com/chanzuckerberg/cellxgene-census.
"""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma as soma

from cellmill.census.organisms import ORGANISMS

SCHEMA_VERSION, DATASET_SCHEMA_VERSION = "2.4.0", "7.0.0"
TEXT = pa.dictionary(pa.int32(), pa.large_string())
OBS_SCHEMA = pa.schema(
    [("soma_joinid", pa.int64()), ("dataset_id", TEXT)]
    + [
        (column, TEXT)
        for term in ("assay", "cell_type", "development_stage", "disease")
        for column in (term, f"{term}_ontology_term_id")
    ]
    + [("donor_id", TEXT), ("is_primary_data", pa.bool_()), ("observation_joinid", pa.large_string())]
    + [(column, TEXT) for term in ("self_reported_ethnicity", "sex") for column in (term, f"{term}_ontology_term_id")]
    + [("suspension_type", TEXT), ("tissue", TEXT), ("tissue_ontology_term_id", TEXT), ("tissue_type", TEXT)]
    + [("tissue_general", TEXT), ("tissue_general_ontology_term_id", TEXT)]
    + [("raw_sum", pa.float64()), ("nnz", pa.int64()), ("raw_mean_nnz", pa.float64())]
    + [("raw_variance_nnz", pa.float64()), ("n_measured_vars", pa.int64())]
)
VAR_SCHEMA = pa.schema(
    [("soma_joinid", pa.int64()), ("feature_id", pa.large_string()), ("feature_name", pa.large_string())]
    + [("feature_type", pa.large_string()), ("feature_length", pa.int64())]
    + [("nnz", pa.int64()), ("n_measured_obs", pa.int64())]
)
STATISTICS = ("raw_sum", "nnz", "raw_mean_nnz", "raw_variance_nnz")
COMPUTED = ("soma_joinid", "dataset_id", *STATISTICS, "n_measured_vars")
"""Columns of obs that never come from a file."""
DATASET_COLUMNS = (
    "citation",
    "collection_id",
    "collection_name",
    "collection_doi",
    "collection_doi_label",
    "dataset_id",
    "dataset_version_id",
    "dataset_title",
    "dataset_h5ad_path",
)
COUNTED = (
    "cell_type",
    "assay",
    "tissue",
    "tissue_general",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "suspension_type",
)
TILE = 2048
X_CONFIG = {  # tiles and filters of the Census's X/raw
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": TILE, "filters": [{"_type": "ZstdFilter", "level": 3}]},
                "soma_dim_1": {"tile": TILE, "filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}

IN_ORDER = {"tiledb": {"write": {"sort_coords": False}}}


def create_census(root: Path) -> None:
    """Create the collections of an empty Census."""
    with soma.Collection.create(str(root)) as census:
        census.add_new_collection("census_info")
        census.add_new_collection("census_data")


def create_experiment(
    root: Path, organism: str, obs_schema: pa.Schema, n_obs: int, n_var: int, n_datasets: int
) -> None:
    """Create every collection, frame and array of one organism, empty, and close them."""
    with soma.Collection.open(str(root / "census_data"), "w") as data:
        experiment = data.add_new_collection(organism, soma.Experiment)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        experiment.add_new_dataframe(
            "obs", schema=obs_schema, index_column_names=["soma_joinid"], domain=[(0, n_obs - 1)]
        )
        rna.add_new_dataframe("var", schema=VAR_SCHEMA, index_column_names=["soma_joinid"], domain=[(0, n_var - 1)])
        rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(n_obs, n_var), platform_config=X_CONFIG
        )
        rna.add_new_sparse_ndarray("feature_dataset_presence_matrix", type=pa.bool_(), shape=(n_datasets, n_var))


def write_table(uri: Path, table: pa.Table) -> None:
    """Write a frame that exists, through a handle of its own."""
    with soma.DataFrame.open(str(uri), "w") as frame:
        frame.write(table)


def write_chunk(x: soma.SparseNDArray, first: int, counts_DV: sp.csr_matrix) -> None:
    """Write the counts of some cells, of which `first` is the first's joinid, to the open X/raw.

    In the order of the tiles, which takes a sixth of the time that TileDB needs to sort by itself.
    """
    counts_DV.sort_indices()
    cells = np.repeat(np.arange(counts_DV.shape[0], dtype=np.int64) + first, np.diff(counts_DV.indptr))
    tile = (cells // TILE - first // TILE) * (counts_DV.shape[1] // TILE + 1) + counts_DV.indices // TILE
    order = np.argsort(tile.astype(np.uint16), kind="stable")
    columns = {"soma_dim_0": cells[order], "soma_dim_1": counts_DV.indices[order].astype(np.int64)}
    x.write(pa.table(columns | {"soma_data": counts_DV.data[order]}), platform_config=IN_ORDER)


def write_presence(uri: Path, datasets: list[int], present_SV: np.ndarray) -> None:
    """Write the presence matrix of one organism; row s of `present_SV` is that of the data set `datasets[s]`."""
    row, gene = np.nonzero(present_SV)
    columns = {"soma_dim_0": np.asarray(datasets)[row], "soma_dim_1": gene, "soma_data": np.ones(len(gene), bool)}
    with soma.SparseNDArray.open(str(uri), "w") as presence:
        presence.write(pa.table(columns))


def add_table(folder: Path, name: str, table: pa.Table) -> None:
    """Create and write a frame of census_info, indexed by soma_joinid."""
    table = table.add_column(0, "soma_joinid", pa.array(np.arange(len(table))))
    with soma.Collection.open(str(folder), "w") as parent:
        parent.add_new_dataframe(
            name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, max(len(table) - 1, 0))]
        )
    write_table(folder / name, table)


def summary_table(obs: dict[str, pa.Table], notes: dict[str, str]) -> pa.Table:
    """Label and value rows of census_info/summary: those of the Census, then `notes`; `obs` is by organism."""
    donors = dict.fromkeys(("homo_sapiens", "mus_musculus"), 0)
    for organism, table in obs.items():
        pairs = table.select(["dataset_id", "donor_id"]).to_pandas().drop_duplicates()
        donors[organism] = int((~pairs["donor_id"].isin(["pooled", "unknown"])).sum())
    rows = {
        "census_schema_version": SCHEMA_VERSION,
        "census_build_date": datetime.date.today().isoformat(),
        "dataset_schema_version": DATASET_SCHEMA_VERSION,
        "total_cell_count": sum(len(table) for table in obs.values()),
        "unique_cell_count": int(sum(np.sum(table["is_primary_data"].to_numpy()) for table in obs.values())),
    }
    rows |= {f"number_donors_{name}": count for name, count in donors.items()} | notes
    return pa.table({"label": list(rows), "value": [str(value) for value in rows.values()]})


def datasets_table(names: list[str], files: list[str], cells: list[int]) -> pa.Table:
    """One row per data set of any organism; what only CELLxGENE could say is empty."""
    columns = {name: [""] * len(names) for name in DATASET_COLUMNS}
    columns["dataset_id"] = columns["dataset_title"] = names
    columns["dataset_h5ad_path"] = files
    columns["dataset_total_cell_count"] = cells
    return pa.table(columns)


def cell_counts_table(obs: dict[str, pa.Table]) -> pa.Table:
    """Cells and primary cells per organism and value of the main columns of obs."""
    rows = []
    for organism, table in obs.items():
        label = ORGANISMS[organism][0]
        is_primary = table["is_primary_data"].to_numpy()
        rows.append((label, "all", "na", "na", len(table), int(is_primary.sum())))
        for category in COUNTED:
            term = f"{category}_ontology_term_id"
            frame = table.select([name for name in (category, term) if name in table.column_names]).to_pandas()
            frame = frame.astype(str).assign(primary=is_primary)
            if term not in frame:
                frame[term] = "na"
            counts = frame.groupby([category, term])["primary"].agg(["size", "sum"])
            rows += [(label, category, *key, int(size), int(primary)) for key, size, primary in counts.itertuples()]
    names = ("organism", "category", "label", "ontology_term_id", "total_cell_count", "unique_cell_count")
    return pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))


def organisms_table(organisms: list[str]) -> pa.Table:
    """The organisms of the Census."""
    labels, taxa = ([ORGANISMS[name][at] for name in organisms] for at in (0, 1))
    return pa.table({"organism_ontology_term_id": taxa, "organism_label": labels, "organism": organisms})
