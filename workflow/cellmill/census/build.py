"""Build a private Census: the SOMA layout of Census schema 2.4 from any .h5ad files.

Layout: ``census_info/{summary, datasets, summary_cell_counts, organisms}`` and ``census_data/ORGANISM``, an Experiment
with ``obs``, ``ms/RNA/var``, ``ms/RNA/X/raw`` and ``ms/RNA/feature_dataset_presence_matrix``. The ``normalized`` layer,
which the schema calls experimental and which follows from ``raw``, is not written. Reference: the Census schema 2.4.0
and its builder, github.com/chanzuckerberg/cellxgene-census.

Every SOMA object is created first, its handles are closed, and it is opened again by its URI to be written: tiledbsoma
2.3.0 silently loses the dictionary of a column that is written through the handle of the parent that created it.

Shape legend: D = cells of a chunk, G = genes of a file, V = genes of the Census, S = data sets.
"""

import datetime
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import tiledbsoma as soma
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cellmill.census.genes import GeneTable, map_genes, read_gene_table
from cellmill.census.h5ad import H5ad, open_h5ad, read_chunks
from cellmill.census.ontology import Ontologies
from cellmill.census.read import suggest
from cellmill.errors import CellmillError
from cellmill.files import atomic

SCHEMA_VERSION, DATASET_SCHEMA_VERSION = "2.4.0", "7.0.0"
ORGANISMS = {  # those of the Census: name: (label, taxon)
    "callithrix_jacchus": ("Callithrix jacchus", "NCBITaxon:9483"),
    "homo_sapiens": ("Homo sapiens", "NCBITaxon:9606"),
    "macaca_mulatta": ("Macaca mulatta", "NCBITaxon:9544"),
    "mus_musculus": ("Mus musculus", "NCBITaxon:10090"),
    "pan_troglodytes": ("Pan troglodytes", "NCBITaxon:9598"),
}
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
DATASET_COLUMNS = (
    "citation",
    "collection_id",
    "collection_name",
    "collection_doi",
    "collection_doi_label",
    "dataset_id",
)
DATASET_COLUMNS += ("dataset_version_id", "dataset_title", "dataset_h5ad_path")
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
X_CONFIG = {  # tiles and filters of the Census's X/raw
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [{"_type": "ZstdFilter", "level": 3}]},
                "soma_dim_1": {"tile": 2048, "filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 3}]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


@dataclass(frozen=True)
class Source:
    """One data set on its way into the Census: its file, cells, genes, and the columns that had to be filled."""

    h5ad: H5ad
    dataset_id: str
    obs: pd.DataFrame
    mapping: pd.DataFrame
    filled: list[str]


def as_bool(values: pd.Series, where: str) -> pd.Series:
    """`is_primary_data` as booleans, also from the words True and False."""
    words = values.astype(str).str.lower()
    if not words.isin(["true", "false"]).all():
        raise CellmillError(
            f"{where}: is_primary_data must be True or False, not {words[~words.isin(['true', 'false'])].iloc[0]}"
        )
    return words == "true"


def census_obs(
    h5ad: H5ad, dataset_id: str, extra_obs: list[str], ontologies: Ontologies | None
) -> tuple[pd.DataFrame, list[str]]:
    """The obs columns of the Census (without joinid and statistics) of one file, and those that it lacked.

    A text column that the file lacks, and a missing value, is "unknown"; a missing ``is_primary_data`` is True; a
    missing ``observation_joinid`` is the cell's own name, so that a cell can be traced back to its file.
    """
    given, filled = h5ad.obs, []
    obs = pd.DataFrame(index=given.index)
    for field in OBS_SCHEMA:
        name = field.name
        if name in ("soma_joinid", "n_measured_vars", *STATISTICS):
            continue
        if name == "dataset_id":
            obs[name] = pd.Categorical([dataset_id] * len(given))
        elif name == "is_primary_data":
            obs[name] = as_bool(given[name], str(h5ad.path)) if name in given else True
        elif name == "observation_joinid":
            obs[name] = given[name].astype(str) if name in given else given.index.astype(str)
        elif name in given:
            obs[name] = as_text(given[name])
        elif name == "tissue_general_ontology_term_id" and "tissue_general" not in given and ontologies is not None:
            terms = obs["tissue_ontology_term_id"].astype(str)
            general = {term: ontologies.tissue_general(term) for term in terms.unique()}
            known = set(terms[terms.str.startswith("UBERON:")].map(general))
            names = {term: ontologies.label(term) for term in known}
            obs[name] = pd.Categorical(terms.map(general))
            obs["tissue_general"] = as_text(terms.map(general).map(names).fillna(obs["tissue"].astype(str)))
            filled.remove("tissue_general")
            continue
        else:
            obs[name] = pd.Categorical(["unknown"] * len(given))
        if name not in given and name != "dataset_id":
            filled.append(name)
    for name in extra_obs:
        if name in OBS_SCHEMA.names:
            raise CellmillError(f"census.extra_obs names {name}, which a Census has anyway; leave it out")
        obs[name] = as_text(given[name]) if name in given else pd.Categorical(["unknown"] * len(given))
        if name not in given:
            filled.append(name)
    return obs, filled


def as_text(values: pd.Series) -> pd.Categorical:
    """A column as text categories; missing values are "unknown"."""
    codes, categories = pd.factorize(values, use_na_sentinel=True, sort=True)
    names = ["unknown" if name == "" else str(name) for name in categories]
    text = np.array([*names, "unknown"], dtype=object)[codes]
    return pd.Categorical(text)


def read_source(path: Path, table: GeneTable, extra_obs: list[str], ontologies: Ontologies | None) -> Source:
    """Open one file, check its cells and map its genes; reads no counts but the first rows."""
    h5ad = open_h5ad(path)
    mapping = map_genes(h5ad.var, table, str(path))
    obs, filled = census_obs(h5ad, path.stem, extra_obs, ontologies)
    mapping.insert(0, "dataset_id", path.stem)
    return Source(h5ad, path.stem, obs, mapping, filled)


def create_census(root: Path, organism: str, obs_schema: pa.Schema, n_obs: int, n_var: int, n_datasets: int) -> None:
    """Create every collection, frame and array of the Census, empty, and close them."""
    with soma.Collection.create(str(root)) as census:
        census.add_new_collection("census_info")
        experiment = census.add_new_collection("census_data").add_new_collection(organism, soma.Experiment)
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


def add_table(folder: Path, name: str, table: pa.Table) -> None:
    """Create and write a frame of census_info, indexed by soma_joinid."""
    table = table.add_column(0, "soma_joinid", pa.array(np.arange(len(table))))
    with soma.Collection.open(str(folder), "w") as parent:
        parent.add_new_dataframe(
            name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, max(len(table) - 1, 0))]
        )
    write_table(folder / name, table)


def write_counts(
    x_uri: Path, sources: list[Source], gene_rows: pd.Series, quiet: bool
) -> tuple[list[pd.DataFrame], np.ndarray]:
    """Stream the counts of all data sets into X/raw.

    Returns
    -------
    statistics
        Per data set, the frame of `STATISTICS` of its cells; each source's mapping gets the column ``counts``.
    nnz_SV
        Number of cells of each data set with a count of each gene.
    """
    statistics, nnz_SV, first = [], np.zeros((len(sources), len(gene_rows)), dtype=np.int64), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with soma.SparseNDArray.open(str(x_uri), "w") as x, Progress(*columns, disable=quiet) as progress:
        bar = progress.add_task("cells into the Census", total=sum(len(source.obs) for source in sources))
        for at, source in enumerate(sources):
            rows_G = source.mapping["feature_id"].map(gene_rows).fillna(-1).to_numpy(dtype=np.int64)
            totals_G, parts = np.zeros(len(rows_G)), []
            for start, counts_DG in read_chunks(source.h5ad):
                totals_G += np.bincount(counts_DG.indices, weights=counts_DG.data, minlength=len(rows_G))
                counts_DV = to_census_genes(counts_DG, rows_G, len(gene_rows))
                nnz_SV[at] += np.bincount(counts_DV.indices, minlength=len(gene_rows))
                parts.append(cell_statistics(counts_DV))
                cells = np.repeat(np.arange(counts_DV.shape[0]), np.diff(counts_DV.indptr)) + first + start
                x.write(
                    pa.table(
                        {
                            "soma_dim_0": cells.astype(np.int64),
                            "soma_dim_1": counts_DV.indices.astype(np.int64),
                            "soma_data": counts_DV.data,
                        }
                    )
                )
                progress.advance(bar, counts_DV.shape[0])
            source.mapping["counts"] = totals_G
            statistics.append(pd.concat(parts, ignore_index=True))
            first += len(source.obs)
    return statistics, nnz_SV


def to_census_genes(counts_DG: sp.csr_matrix, rows_G: np.ndarray, n_var: int) -> sp.csr_matrix:
    """Counts over the Census's genes, sorted: unmapped genes dropped, genes of one id summed, no stored zeros."""
    cells = np.repeat(np.arange(counts_DG.shape[0]), np.diff(counts_DG.indptr))
    rows = rows_G[counts_DG.indices]
    kept = (rows >= 0) & (counts_DG.data != 0)
    counts_DV = sp.csr_matrix((counts_DG.data[kept], (cells[kept], rows[kept])), shape=(counts_DG.shape[0], n_var))
    counts_DV.sum_duplicates()
    return counts_DV


def cell_statistics(counts_DV: sp.csr_matrix) -> pd.DataFrame:
    """The statistics of obs over the nonzero counts of each cell; the variance has ddof 1, as in the Census."""
    nnz = np.diff(counts_DV.indptr).astype(np.int64)
    cells = np.repeat(np.arange(len(nnz)), nnz)
    values = counts_DV.data.astype(np.float64)
    total = np.bincount(cells, weights=values, minlength=len(nnz))
    mean = total / np.maximum(nnz, 1)
    spread = np.bincount(cells, weights=(values - mean[cells]) ** 2, minlength=len(nnz))
    return pd.DataFrame(dict(zip(STATISTICS, (total, nnz, mean, spread / np.maximum(nnz - 1, 1)), strict=True)))


def obs_table(
    sources: list[Source], statistics: list[pd.DataFrame], n_measured: np.ndarray, schema: pa.Schema
) -> pa.Table:
    """The obs of all data sets, one after the other."""
    columns = {"soma_joinid": np.arange(sum(len(source.obs) for source in sources))}
    for field in schema:
        if pa.types.is_dictionary(field.type):
            values = pd.api.types.union_categoricals(
                [source.obs[field.name] for source in sources], sort_categories=True
            )
            names = pa.array(values.categories.astype(str), pa.large_string())
            columns[field.name] = pa.DictionaryArray.from_arrays(pa.array(values.codes, pa.int32()), names)
        elif field.name in STATISTICS:
            columns[field.name] = np.concatenate([part[field.name] for part in statistics])
        elif field.name == "n_measured_vars":
            columns[field.name] = np.repeat(n_measured, [len(source.obs) for source in sources])
        elif field.name != "soma_joinid":
            columns[field.name] = np.concatenate([source.obs[field.name] for source in sources])
    return pa.table(columns, schema=schema)


def summary_table(obs: pa.Table, organism: str, sources: list[Source]) -> pa.Table:
    """Label and value rows of census_info/summary; the last ones say which columns a data set lacked."""
    donors = dict.fromkeys(("homo_sapiens", "mus_musculus"), 0)
    pairs = obs.select(["dataset_id", "donor_id"]).to_pandas().drop_duplicates()
    donors[organism] = int((~pairs["donor_id"].isin(["pooled", "unknown"])).sum())
    rows = {
        "census_schema_version": SCHEMA_VERSION,
        "census_build_date": datetime.date.today().isoformat(),
        "dataset_schema_version": DATASET_SCHEMA_VERSION,
        "total_cell_count": len(obs),
        "unique_cell_count": int(np.sum(obs["is_primary_data"].to_numpy())),
    }
    rows |= {f"number_donors_{name}": count for name, count in donors.items()}
    rows |= {f"counts_from {source.dataset_id}": source.h5ad.layer for source in sources}
    rows |= {f"filled_columns {source.dataset_id}": ", ".join(source.filled) for source in sources if source.filled}
    return pa.table({"label": list(rows), "value": [str(value) for value in rows.values()]})


def datasets_table(sources: list[Source]) -> pa.Table:
    """One row per data set; what only CELLxGENE could say is empty."""
    columns = {name: [""] * len(sources) for name in DATASET_COLUMNS}
    columns["dataset_id"] = columns["dataset_title"] = [source.dataset_id for source in sources]
    columns["dataset_h5ad_path"] = [source.h5ad.path.name for source in sources]
    columns["dataset_total_cell_count"] = [len(source.obs) for source in sources]
    return pa.table(columns)


def cell_counts_table(obs: pa.Table, organism: str) -> pa.Table:
    """Cells and primary cells per value of the main columns of obs."""
    label = ORGANISMS[organism][0]
    is_primary = obs["is_primary_data"].to_numpy()
    rows = [(label, "all", "na", "na", len(obs), int(is_primary.sum()))]
    for category in COUNTED:
        term = f"{category}_ontology_term_id"
        frame = obs.select([name for name in (category, term) if name in obs.column_names]).to_pandas()
        frame = frame.astype(str).assign(primary=is_primary)
        if term not in frame:
            frame[term] = "na"
        counts = frame.groupby([category, term])["primary"].agg(["size", "sum"])
        rows += [(label, category, *key, int(size), int(primary)) for key, size, primary in counts.itertuples()]
    names = ("organism", "category", "label", "ontology_term_id", "total_cell_count", "unique_cell_count")
    return pa.table(dict(zip(names, zip(*rows, strict=True), strict=True)))


def check_target(out: Path) -> None:
    """Refuse to replace anything that is not a Census."""
    if out.exists() and not (out / "census_info").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise CellmillError(f"{out} exists and is no Census; remove it or name another place for the Census")


def build_census(
    h5ads: list[Path],
    gene_table: Path,
    out: Path,
    *,
    organism: str = "homo_sapiens",
    extra_obs: list[str],
    mapping: Path,
    wheels: Path | None = None,
    quiet: bool = False,
) -> None:
    """Build a private Census from .h5ad files.

    Cells keep the order of the files and of their rows, so the joinids of a data set are contiguous. The Census appears
    under `out` when it is whole: a killed build leaves only ``OUT.partial``, which the next build removes.

    Parameters
    ----------
    h5ads
        The files; the name of a file without ``.h5ad`` is its ``dataset_id``.
    gene_table
        From `cellmill.census.wheels.write_gene_table`, or one of the same columns.
    out
        Folder of the Census.
    organism
        One of the Census's five, such as ``homo_sapiens``.
    extra_obs
        Columns of obs to keep beyond the Census's, as text, at the end.
    mapping
        Parquet to write: what every input gene was mapped to and how, with its counts (`cellmill.census.genes`).
    wheels
        Folder with the cellxgene-ontology-guide wheel, from which a missing ``tissue_general`` is filled.
    quiet
        Show no progress bar.

    Raises
    ------
    CellmillError
        If no file is given, two share a name, one is unreadable, empty or holds no raw counts, no gene maps, a gene
        name stands twice, no file has a column of `extra_obs`, or the disk is full.
    """
    if organism not in ORGANISMS:
        raise CellmillError(f"'{organism}' is not an organism of the Census; it may be {', '.join(ORGANISMS)}")
    if not h5ads:
        raise CellmillError("no .h5ad file was given; a Census needs at least one")
    names = [path.stem for path in h5ads]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CellmillError(f"two files are called {twice[0]}.h5ad; a file's name is its dataset_id, so rename one")
    check_target(out)
    table = read_gene_table(gene_table)
    ontologies = None if wheels is None else Ontologies(wheels)
    sources = [read_source(path, table, extra_obs, ontologies) for path in h5ads]
    for name in extra_obs:
        if all(name in source.filled for source in sources):
            known = sorted(set().union(*(source.h5ad.obs.columns for source in sources)))
            raise CellmillError(f"census.extra_obs names '{name}', a column of no file's obs{suggest(name, known)}")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_census(partial, sources, table.genes, organism, extra_obs, quiet)
        write_mapping(pd.concat([source.mapping for source in sources], ignore_index=True), mapping)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    except (OSError, RuntimeError, soma.SOMAError) as error:  # tiledbsoma raises RuntimeError when a group is closed
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CellmillError(f"the disk is full while {out} is built; free some space and run again") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_census(
    root: Path, sources: list[Source], table: pd.DataFrame, organism: str, extra_obs: list[str], quiet: bool
) -> None:
    """Write all of the Census under `root`."""
    ids = set().union(*(source.mapping["feature_id"].dropna() for source in sources))
    genes = table[table.index.isin(ids)]
    gene_rows = pd.Series(np.arange(len(genes)), index=genes.index)
    sizes = np.array([len(source.obs) for source in sources])
    schema = pa.schema([*OBS_SCHEMA, *((name, TEXT) for name in extra_obs)])
    create_census(root, organism, schema, int(sizes.sum()), len(genes), len(sources))
    rna = root / "census_data" / organism / "ms" / "RNA"

    statistics, nnz_SV = write_counts(rna / "X" / "raw", sources, gene_rows, quiet)
    # The Census calls a gene measured in a data set if one of its cells has a count of it.
    present_SV = nnz_SV > 0
    obs = obs_table(sources, statistics, present_SV.sum(axis=1), schema)
    write_table(root / "census_data" / organism / "obs", obs)
    var = {
        "soma_joinid": np.arange(len(genes)),
        "feature_id": genes.index,
        "feature_name": genes["feature_name"],
        "feature_type": genes["feature_type"],
        "feature_length": genes["feature_length"],
        "nnz": nnz_SV.sum(axis=0),
        "n_measured_obs": sizes @ present_SV,
    }
    write_table(rna / "var", pa.table({name: np.asarray(values) for name, values in var.items()}, schema=VAR_SCHEMA))
    dataset, gene = np.nonzero(present_SV)
    with soma.SparseNDArray.open(str(rna / "feature_dataset_presence_matrix"), "w") as presence:
        presence.write(
            pa.table({"soma_dim_0": dataset, "soma_dim_1": gene, "soma_data": np.ones(len(gene), dtype=bool)})
        )

    info = root / "census_info"
    add_table(info, "summary", summary_table(obs, organism, sources))
    add_table(info, "datasets", datasets_table(sources))
    add_table(info, "summary_cell_counts", cell_counts_table(obs, organism))
    label, taxon = ORGANISMS[organism]
    columns = {"organism_ontology_term_id": [taxon], "organism_label": [label], "organism": [organism]}
    add_table(info, "organisms", pa.table(columns))


def write_mapping(mapping: pd.DataFrame, path: Path) -> None:
    """Write the gene mapping as parquet."""
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pandas(mapping, preserve_index=False), temporary)
