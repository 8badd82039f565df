"""Build a private Census: the SOMA layout of Census schema 2.4, from any .h5ad files or cells that a program makes.

``census_info/{summary, datasets, summary_cell_counts, organisms}`` and, for each organism, ``census_data/ORGANISM``, an
Experiment with ``obs``, ``ms/RNA/var``, ``ms/RNA/X/raw`` and ``ms/RNA/feature_dataset_presence_matrix``
(`cellmill.census.layout`). The ``normalized`` layer, which the schema calls experimental and which follows from
``raw``, is not written. As in the public Census, joinids of cells and genes begin at 0 in every organism, those of data
sets are common to all.

Shape legend: D = cells of a chunk, G = genes of a file, V = genes of an organism, S = data sets of an organism.
"""

import errno
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import tiledbsoma as soma

from cellmill.census.genes import GeneTable, read_gene_table
from cellmill.census.h5ad import open_h5ad, read_chunks
from cellmill.census.layout import (
    OBS_SCHEMA,
    STATISTICS,
    TEXT,
    VAR_SCHEMA,
    add_table,
    cell_counts_table,
    create_census,
    create_experiment,
    datasets_table,
    organisms_table,
    summary_table,
    write_chunk,
    write_presence,
    write_table,
)
from cellmill.census.ontology import Ontologies
from cellmill.census.organisms import check_organism
from cellmill.census.read import suggest
from cellmill.census.source import Source, check_columns, make_source, organism_of
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.progress import Progress


def write_counts(
    x_uri: Path, sources: list[Source], gene_rows: pd.Series, progress: Progress, done: int
) -> tuple[list[pd.DataFrame], np.ndarray]:
    """Stream the counts of an organism's data sets into X/raw; `done` cells are those of earlier organisms.

    Returns
    -------
    statistics
        Per data set, the frame of `STATISTICS` of its cells; each source's mapping gets the column ``counts``.
    nnz_SV
        Number of cells of each data set with a count of each gene.
    """
    statistics, nnz_SV, first = [], np.zeros((len(sources), len(gene_rows)), dtype=np.int64), 0
    with soma.SparseNDArray.open(str(x_uri), "w") as x:
        for at, source in enumerate(sources):
            rows_G = source.mapping["feature_id"].map(gene_rows).fillna(-1).to_numpy(dtype=np.int64)
            is_merged = bool((source.mapping["n_merged"] > 1).any())
            totals_G, parts = np.zeros(len(rows_G)), []
            for start, counts_DG in source.chunks():
                totals_G += np.bincount(counts_DG.indices, weights=counts_DG.data, minlength=len(rows_G))
                counts_DV = to_census_genes(counts_DG, rows_G, len(gene_rows), is_merged)
                nnz_SV[at] += np.bincount(counts_DV.indices, minlength=len(gene_rows))
                parts.append(cell_statistics(counts_DV))
                write_chunk(x, first + start, counts_DV)
                progress.update(done + first + start + counts_DV.shape[0])
            source.mapping["counts"] = totals_G
            statistics.append(pd.concat(parts, ignore_index=True))
            if len(statistics[-1]) != len(source.obs):
                raise CellmillError(
                    f"data set {source.dataset_id} gave the counts of {len(statistics[-1])} cells for the "
                    f"{len(source.obs)} of its obs; give all of them, in the same order"
                )
            first += len(source.obs)
    return statistics, nnz_SV


def to_census_genes(counts_DG: sp.csr_matrix, rows_G: np.ndarray, n_var: int, is_merged: bool) -> sp.csr_matrix:
    """Counts over the Census's genes: unmapped genes dropped, genes of one id summed, no stored zeros."""
    rows = rows_G[counts_DG.indices]
    kept = (rows >= 0) & (counts_DG.data != 0)
    ends = np.concatenate([[0], np.cumsum(kept)])[counts_DG.indptr]
    shape = (counts_DG.shape[0], n_var)
    counts_DV = sp.csr_matrix((counts_DG.data[kept], rows[kept], ends), shape=shape)
    if is_merged or not counts_DG.has_canonical_format:
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
    """The obs of all data sets of an organism, one after the other."""
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


def write_experiment(
    root: Path,
    organism: str,
    sources: dict[int, Source],
    n_datasets: int,
    genes: pd.DataFrame,
    extra_obs: list[str],
    progress: Progress,
    done: int,
) -> pa.Table:
    """Write one organism, of the data sets `sources` by joinid; returns its obs."""
    datasets, sources = list(sources), list(sources.values())
    ids = set().union(*(source.mapping["feature_id"].dropna() for source in sources))
    genes = genes[genes.index.isin(ids)].sort_index()  # the order of vocabularies: curation need not sort
    gene_rows = pd.Series(np.arange(len(genes)), index=genes.index)
    sizes = np.array([len(source.obs) for source in sources])
    schema = pa.schema([*OBS_SCHEMA, *((name, TEXT) for name in extra_obs)])
    create_experiment(root, organism, schema, int(sizes.sum()), len(genes), n_datasets)
    experiment = root / "census_data" / organism
    rna = experiment / "ms" / "RNA"

    statistics, nnz_SV = write_counts(rna / "X" / "raw", sources, gene_rows, progress, done)
    # The Census calls a gene measured in a data set if one of its cells has a count of it.
    present_SV = nnz_SV > 0
    obs = obs_table(sources, statistics, present_SV.sum(axis=1), schema)
    write_table(experiment / "obs", obs)
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
    write_presence(rna / "feature_dataset_presence_matrix", datasets, present_SV)
    return obs


def write_mapping(mapping: pd.DataFrame, path: Path) -> None:
    """Write the gene mapping as parquet."""
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pandas(mapping, preserve_index=False), temporary)


def write_census(
    sources: list[Source],
    genes: dict[str, GeneTable],
    out: Path,
    *,
    extra_obs: list[str] = (),
    mapping: Path,
    quiet: bool = False,
) -> None:
    """Write a Census of data sets whose counts come in chunks, from files or from a program.

    Cells keep the order of the sources and of their rows. Memory holds one chunk and the obs of all cells. The Census
    appears under `out` when it is whole: a killed build leaves only ``OUT.partial``, which the next one removes.

    Parameters
    ----------
    sources
        From `make_source`, with unique ``dataset_id``.
    genes
        By organism; its order is that of the Census's genes.
    out
        Folder of the Census.
    extra_obs
        Columns beyond the Census's that the sources were made with.
    mapping
        Parquet to write: what every input gene was mapped to and how, with its counts.
    quiet
        Show no progress.

    Raises
    ------
    CellmillError
        `out` holds something else than a Census, a source's counts are no raw counts, or the disk is full.
    """
    if out.exists() and not (out / "census_info").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise CellmillError(f"{out} exists and is no Census; remove it or name another place for the Census")
    root = out.with_name(f"{out.name}.partial")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    sizes = [len(source.obs) for source in sources]
    try:
        create_census(root)
        obs, done = {}, 0
        with Progress("cells into the Census", sum(sizes), show=not quiet) as progress:
            for organism in sorted({source.organism for source in sources}):
                own = {joinid: source for joinid, source in enumerate(sources) if source.organism == organism}
                table = genes[organism].genes
                obs[organism] = write_experiment(
                    root, organism, own, len(sources), table, list(extra_obs), progress, done
                )
                done += len(obs[organism])
        notes = {f"{key} {source.dataset_id}": said for source in sources for key, said in source.notes.items()}
        info = root / "census_info"
        add_table(info, "summary", summary_table(obs, notes))
        names, files = zip(*((source.dataset_id, source.file) for source in sources), strict=True)
        add_table(info, "datasets", datasets_table(list(names), list(files), sizes))
        add_table(info, "summary_cell_counts", cell_counts_table(obs))
        add_table(info, "organisms", organisms_table(list(obs)))
        write_mapping(pd.concat([source.mapping for source in sources], ignore_index=True), mapping)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(root, out)
    except (OSError, RuntimeError, soma.SOMAError) as error:  # tiledbsoma raises RuntimeError when a group is closed
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CellmillError(f"the disk is full while {out} is built; free some space and run again") from error
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def build_census(
    h5ads: list[Path],
    gene_tables: dict[str, Path],
    out: Path,
    *,
    organism: str = "homo_sapiens",
    file_organisms: dict[str, str] | None = None,
    extra_obs: list[str],
    obs_columns: dict[str, list[str]] | None = None,
    mapping: Path,
    wheels: Path | None = None,
    quiet: bool = False,
) -> None:
    """Build a private Census from .h5ad files, one Experiment per organism that they hold.

    Cells keep the order of the files and of their rows, so the joinids of a data set are contiguous. See `write_census`
    for what a killed build leaves.

    Parameters
    ----------
    h5ads
        The files; the name of a file without ``.h5ad`` is its ``dataset_id``.
    gene_tables
        By organism: from `cellmill.census.wheels.write_gene_table`, or of the same columns.
    out
        Folder of the Census.
    organism
        Organism of the files that do not say theirs (`cellmill.census.organisms.said_organism`).
    file_organisms
        By ``dataset_id``: organisms of single files, whatever they say.
    extra_obs
        Columns of obs to keep beyond the Census's, as text, at the end.
    obs_columns
        By column of the Census (or of `extra_obs`): columns of files that fill it, the first that a file has; a file
        that has the column itself keeps its own.
    mapping
        Parquet to write: what every input gene was mapped to and how, with its counts (`cellmill.census.genes`).
    wheels
        Folder with the cellxgene-ontology-guide wheel, from which a missing ``tissue_general`` is filled.
    quiet
        Show no progress.

    Raises
    ------
    CellmillError
        If no file is given, two share a name, one is unreadable, empty or holds no raw counts, its organism is unknown
        or has no gene table, it is of several organisms, no gene maps, a gene name stands twice, no file has a column
        of `extra_obs` or `obs_columns`, or the disk is full.
    """
    file_organisms, obs_columns = file_organisms or {}, obs_columns or {}
    organism = check_organism(organism, "the organism")
    if not h5ads:
        raise CellmillError("no .h5ad file was given; a Census needs at least one")
    names = [path.stem for path in h5ads]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CellmillError(f"two files are called {twice[0]}.h5ad; a file's name is its dataset_id, so rename one")
    for name in file_organisms:
        if name not in names:
            raise CellmillError(f"census.organisms names '{name}', but no file is called so{suggest(name, names)}")
    genes = {name: read_gene_table(path) for name, path in gene_tables.items()}
    ontologies = None if wheels is None else Ontologies(wheels)
    opened = [open_h5ad(path) for path in h5ads]
    check_columns(opened, extra_obs, obs_columns)
    sources = []
    for h5ad in opened:
        own, where = organism_of(h5ad, organism, file_organisms), str(h5ad.path)
        if own not in genes:
            raise CellmillError(
                f"{where} is of {own}, but gene tables are at hand of {', '.join(genes) or 'no organism'} only; add "
                f"{own} to corpus.organisms, say another organism in census.organisms, or move the file elsewhere"
            )
        source = make_source(
            *(h5ad.path.stem, h5ad.obs, h5ad.var, partial(read_chunks, h5ad), genes[own], own),
            **{"extra_obs": extra_obs, "obs_columns": obs_columns, "ontologies": ontologies, "where": where},
        )
        notes = {"counts_from": h5ad.layer, **source.notes}
        sources.append(replace(source, notes=notes, file=h5ad.path.name))
    write_census(sources, genes, out, extra_obs=extra_obs, mapping=mapping, quiet=quiet)
