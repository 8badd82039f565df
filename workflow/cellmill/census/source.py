"""A data set on its way into a private Census: its cells described as the Census describes them, its genes mapped.

Shape legend: D = cells of a chunk, G = genes of a file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellmill.census.genes import GeneTable, map_genes
from cellmill.census.h5ad import H5ad, open_h5ad
from cellmill.census.layout import COMPUTED, OBS_SCHEMA
from cellmill.census.ontology import Ontologies
from cellmill.census.organisms import check_organism, said_organism
from cellmill.census.read import suggest
from cellmill.errors import CellmillError


@dataclass(frozen=True)
class Source:
    """One data set on its way into the Census (`make_source`).

    Attributes
    ----------
    dataset_id, organism
        Its names.
    obs
        The text columns of the Census's obs, one row a cell.
    mapping
        What its genes were mapped to (`cellmill.census.genes.map_genes`).
    chunks
        Called, yields all counts in the order of `obs`: row of the first cell, CSR float32 [D, G].
    notes
        What ``census_info/summary`` says of it.
    missing
        Columns of `obs` that had to be filled with "unknown".
    file
        Its file's name, or "".
    """

    dataset_id: str
    organism: str
    obs: pd.DataFrame
    mapping: pd.DataFrame
    chunks: Callable[[], Iterator[tuple[int, sp.csr_matrix]]]
    notes: dict[str, str]
    missing: list[str]
    file: str = ""


def as_bool(values: pd.Series, where: str) -> pd.Series:
    """`is_primary_data` as booleans, also from the words True and False."""
    words = values.astype(str).str.lower()
    if not words.isin(["true", "false"]).all():
        raise CellmillError(
            f"{where}: is_primary_data must be True or False, not {words[~words.isin(['true', 'false'])].iloc[0]}"
        )
    return words == "true"


def as_text(values: pd.Series) -> pd.Categorical:
    """A column as text categories; missing values are "unknown"."""
    codes, categories = pd.factorize(values, use_na_sentinel=True, sort=True)
    names = ["unknown" if name == "" else str(name) for name in categories]
    text = np.array([*names, "unknown"], dtype=object)[codes]
    return pd.Categorical(text)


def census_obs(
    given: pd.DataFrame, dataset_id: str, extra_obs: list[str], ontologies: Ontologies | None, where: str
) -> tuple[pd.DataFrame, list[str]]:
    """The obs columns of the Census (without joinid and statistics) of one file, and those that it lacked.

    A text column that the file lacks, and a missing value, is "unknown"; a missing ``is_primary_data`` is True; a
    missing ``observation_joinid`` is the cell's own name, so that a cell can be traced back to its file.
    """
    missing = []
    obs = pd.DataFrame({"dataset_id": pd.Categorical([dataset_id] * len(given))}, index=given.index)
    for name in (name for name in OBS_SCHEMA.names if name not in COMPUTED):
        if name == "is_primary_data":
            obs[name] = as_bool(given[name], where) if name in given else True
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
            missing.remove("tissue_general")
            continue
        else:
            obs[name] = pd.Categorical(["unknown"] * len(given))
        if name not in given:
            missing.append(name)
    for name in extra_obs:
        obs[name] = as_text(given[name]) if name in given else pd.Categorical(["unknown"] * len(given))
        if name not in given:
            missing.append(name)
    return obs, missing


def make_source(
    dataset_id: str,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    chunks: Callable[[], Iterator[tuple[int, sp.csr_matrix]]],
    genes: GeneTable,
    organism: str,
    *,
    extra_obs: list[str] = (),
    obs_columns: dict[str, list[str]] | None = None,
    ontologies: Ontologies | None = None,
    where: str | None = None,
) -> Source:
    """Complete the obs of a data set's cells and map its genes; no counts are read.

    Parameters
    ----------
    dataset_id, organism
        Names of the data set and of the organism.
    obs, var
        Cells and genes as in an h5ad, indexed by name.
    chunks
        Called, yields all counts in the order of `obs`: row of the first cell, CSR float32 [D, G], whole numbers.
    genes
        The organism's (`cellmill.census.genes.read_gene_table`).
    extra_obs, obs_columns, ontologies
        As in `build_census`.
    where
        The file, for errors.

    Raises
    ------
    CellmillError
        No gene maps, a gene name stands twice, or ``is_primary_data`` holds something else than True and False.
    """
    where = where or dataset_id
    taken = {
        name: next(column for column in columns if column in obs)
        for name, columns in (obs_columns or {}).items()
        if name not in obs and any(column in obs for column in columns)
    }
    mapping = map_genes(var, genes, where)
    mapping.insert(0, "dataset_id", dataset_id)
    mapping.insert(1, "organism", organism)
    given = obs.assign(**{name: obs[column] for name, column in taken.items()})
    full, missing = census_obs(given, dataset_id, list(extra_obs), ontologies, where)
    notes = {"filled_columns": ", ".join(missing)} if missing else {}
    if taken:
        notes["columns_from"] = ", ".join(f"{name}: {column}" for name, column in taken.items())
    return Source(dataset_id, organism, full, mapping, chunks, notes, missing)


def check_columns(h5ads: list[H5ad], extra_obs: list[str], obs_columns: dict[str, list[str]]) -> None:
    """Refuse columns that no file has, and names that may not be filled."""
    known = sorted(set().union(*(h5ad.obs.columns for h5ad in h5ads)))
    for name in extra_obs:
        if name in OBS_SCHEMA.names:
            raise CellmillError(f"census.extra_obs names {name}, which a Census has anyway; leave it out")
        if name not in known and name not in obs_columns:
            raise CellmillError(f"census.extra_obs names '{name}', a column of no file's obs{suggest(name, known)}")
    fillable = [name for name in (*OBS_SCHEMA.names, *extra_obs) if name not in COMPUTED]
    for name, columns in obs_columns.items():
        if name not in fillable:
            raise CellmillError(
                f"census.obs_columns fills '{name}', which is neither a column that a Census takes from files nor one "
                f"of census.extra_obs{suggest(name, fillable)}"
            )
        for column in columns:
            if column not in known:
                raise CellmillError(
                    f"census.obs_columns.{name} names '{column}', a column of no file's obs{suggest(column, known)}"
                )


def organism_of(h5ad: H5ad, default: str, file_organisms: dict[str, str]) -> str:
    """The organism of a file: what `file_organisms` says, else the file itself, else `default`."""
    name = h5ad.path.stem
    if name in file_organisms:
        return check_organism(file_organisms[name], f"census.organisms.{name}:")
    return said_organism(h5ad.uns, h5ad.obs, str(h5ad.path)) or default


def read_organisms(h5ads: list[Path], default: str, file_organisms: dict[str, str]) -> list[str]:
    """The organisms that some files hold, sorted; parameters and errors as those of `build_census`."""
    return sorted({organism_of(open_h5ad(path), default, file_organisms) for path in h5ads})
