"""Mapping of an h5ad's genes to the Ensembl ids of a gene table: by id, by current symbol, by alias."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cellmill.errors import CellmillError

COLUMNS = ["feature_id", "feature_name", "version", "feature_length", "feature_type", "aliases"]
ID_PATTERN = r"(ENS[A-Z]*G\d{11})(?:\.\d+)?"
SYMBOL_COLUMNS = (
    "feature_name",
    "gene_name",
    "gene_names",
    "gene_symbol",
    "gene_symbols",
    "symbol",
    "gene_short_name",
    "name",
)
HOW = ("id", "symbol", "alias", "ambiguous", "none")


@dataclass(frozen=True)
class GeneTable:
    """The genes of an organism and what their names lead to.

    Attributes
    ----------
    genes
        Indexed by ``feature_id``, with ``feature_name, version, feature_length, feature_type, aliases``.
    symbols, aliases
        From a current and an older name to the id; None where several ids bear it.
    """

    genes: pd.DataFrame
    symbols: dict[str, str | None]
    aliases: dict[str, str | None]


def read_gene_table(path: Path) -> GeneTable:
    """Read a gene table.

    Parameters
    ----------
    path
        CSV without a header, plain or gzipped: id, symbol, version, length, biotype and, optionally, aliases joined
        by ``|``.

    Returns
    -------
    GeneTable
        Its genes in the file's order.

    Raises
    ------
    CellmillError
        If the file is absent, has other columns, or names an id twice.
    """
    if not path.is_file():
        raise CellmillError(f"the gene table {path} does not exist; name one in census.gene_tables or leave it out")
    try:
        table = pd.read_csv(path, header=None, keep_default_na=False, dtype=str)
    except (OSError, EOFError, ValueError) as error:
        raise CellmillError(
            f"the gene table {path} cannot be read ({error}); it must be a CSV file, plain or gzipped"
        ) from error
    if table.shape[1] not in (5, 6):
        raise CellmillError(
            f"the gene table {path} has {table.shape[1]} columns; it needs id,symbol,version,length,biotype"
        )
    table.columns = COLUMNS[: table.shape[1]]
    if "aliases" not in table:
        table["aliases"] = ""
    if table["feature_id"].duplicated().any():
        twice = table.loc[table["feature_id"].duplicated(), "feature_id"].iloc[0]
        raise CellmillError(f"the gene table {path} names {twice} twice; an id may stand there once")
    try:
        table["feature_length"] = table["feature_length"].astype("int64")
    except ValueError as error:
        raise CellmillError(f"the gene table {path} has no whole numbers in its 4th column, the gene length") from error
    genes = table.set_index("feature_id")
    symbols = names_to_ids(genes["feature_name"])
    aliases = genes["aliases"].str.split("|").explode()
    # An id that repeats its symbol among its aliases owns it, whatever other ids bear it.
    symbols.update(names_to_ids(aliases[aliases == genes["feature_name"].reindex(aliases.index)]))
    return GeneTable(genes, symbols, names_to_ids(aliases[~aliases.isin(symbols)]))


def names_to_ids(names: pd.Series) -> dict[str, str | None]:
    """From name to id; a name of several ids has None. `names` is indexed by id."""
    unique = ~names.duplicated(keep=False)
    known = dict.fromkeys(names[~unique])
    known.update(zip(names[unique], names.index[unique], strict=True))
    known.pop("", None)
    return known


def in_capitals(known: dict[str, str | None]) -> dict[str, str | None]:
    """The same in capitals; what only then becomes a name of several ids has None."""
    folded = {}
    for name, feature_id in known.items():
        capitals = name.upper()
        folded[capitals] = feature_id if folded.get(capitals, feature_id) == feature_id else None
    return folded


def map_genes(var: pd.DataFrame, table: GeneTable, where: str) -> pd.DataFrame:
    """Map the genes of one data set to ids of the gene table.

    For each gene the first of these that the table knows: an Ensembl id (in the index or any text column of `var`, its
    version suffix cut off), a current symbol (in the index or a column such as ``feature_name``), an alias; names are
    also tried with R's dots read as hyphens and, if all of a column are in capitals, against the table's in capitals
    (GAPDH for the mouse's Gapdh). A symbol or alias of several ids is ambiguous and maps to none, unless one of them
    owns it (`cellmill.census.wheels.write_gene_table`).

    Parameters
    ----------
    var
        The data set's genes, indexed by name.
    table
        From `read_gene_table`.
    where
        The file, for errors.

    Returns
    -------
    pandas.DataFrame
        One row per input gene, in order: ``gene`` (index of `var`), ``feature_id`` (null where none), ``how`` (id,
        symbol, alias, ambiguous, none) and ``n_merged``, the number of input genes of the same id, whose counts are
        summed.

    Raises
    ------
    CellmillError
        If a gene name stands twice, or no gene maps.
    """
    genes = pd.Series(var.index.astype(str), name="gene")
    if genes.duplicated().any():
        twice = genes[genes.duplicated()]
        raise CellmillError(
            f"{where}: gene {twice.iloc[0]} stands twice in var ({twice.nunique()} such names); "
            "sum or rename the duplicates (anndata: var_names_make_unique)"
        )
    text = {
        name: var[name].astype(str).reset_index(drop=True)
        for name in var
        if not pd.api.types.is_numeric_dtype(var[name])
    }
    feature_id = pd.Series(None, index=genes.index, dtype=object)
    how = pd.Series("none", index=genes.index)

    for column in (genes, *text.values()):
        ids = column.str.extract(f"^{ID_PATTERN}$", expand=False)
        fits = feature_id.isna() & ids.isin(table.genes.index)
        feature_id[fits], how[fits] = ids[fits], "id"

    named = [genes, *(text[name] for name in SYMBOL_COLUMNS if name in text)]
    # R turns the hyphen of a name into a dot (HLA.A), unless told not to.
    named.append(genes.str.replace(".", "-", regex=False))
    shouted = [column for column in named if column.str.upper().equals(column)]
    for kind, known in (("symbol", table.symbols), ("alias", table.aliases)):
        tries = [(column, known) for column in named]
        if shouted and (how == "none").any():
            capitals = in_capitals(known)
            tries += [(column, capitals) for column in shouted]
        for column, names in tries:
            left = column[how == "none"]
            found = left[np.array([name in names for name in left], dtype=bool)].map(names.get)
            feature_id[found.index] = found
            how[found.index] = found.notna().map({True: kind, False: "ambiguous"})

    if feature_id.isna().all():
        raise CellmillError(
            f"{where}: none of its {len(genes)} genes ({', '.join(genes[:3])}, ...) is an Ensembl id, a symbol or an "
            "alias of the gene table; name the genes by either, say of which organism they are, or give the organism's "
            "own table in census.gene_tables"
        )
    mapping = pd.DataFrame({"gene": genes, "feature_id": feature_id.where(feature_id.notna(), None), "how": how})
    mapping["n_merged"] = feature_id.map(feature_id.value_counts()).fillna(0).astype("int64")
    return mapping


def mapped_shares(mapping: pd.DataFrame) -> pd.DataFrame:
    """Per data set and way of mapping: number and share of genes and of counts.

    Parameters
    ----------
    mapping
        The table that `cellmill.census.build.build_census` writes: ``dataset_id, gene, feature_id, how, n_merged,
        counts``.

    Returns
    -------
    pandas.DataFrame
        ``dataset_id, how, genes, gene_share, counts, count_share``; a way that no gene took has a row of zeros.
    """
    kept = mapping.assign(
        how=pd.Categorical(mapping["how"], categories=HOW), dataset_id=mapping["dataset_id"].astype(str)
    )
    shares = kept.groupby(["dataset_id", "how"], observed=False).agg(genes=("gene", "size"), counts=("counts", "sum"))
    totals = shares.groupby("dataset_id").transform("sum")
    shares["gene_share"] = shares["genes"] / totals["genes"]
    shares["count_share"] = (shares["counts"] / totals["counts"]).fillna(0.0)
    return shares.reset_index()[["dataset_id", "how", "genes", "gene_share", "counts", "count_share"]].astype(
        {"how": str}
    )
