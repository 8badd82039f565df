"""Pairs of genes of two organisms that descend from one: a table of anybody's, in terms of the run's vocabularies."""

import itertools
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.census.genes import ID_PATTERN, names_to_ids
from cellmill.census.organisms import ORGANISMS
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.progress import Progress
from cellmill.vocabulary import Vocabulary

SCHEMA = pa.schema(
    [
        *(("organism_a", pa.string()), ("gene_a", pa.int32()), ("feature_id_a", pa.string())),
        *(("organism_b", pa.string()), ("gene_b", pa.int32()), ("feature_id_b", pa.string())),
        ("one_to_one", pa.bool_()),
    ]
)
HEADER = re.compile(
    r"\b(genes?|symbols?|ensembl|entrez|orthologs?|organism|species)\b|_(id|name|symbol)$", re.IGNORECASE
)


def read_pairs(table: Path) -> tuple[list[str], pd.DataFrame]:
    """The header (or [], if there is none) and the pairs of a table of orthologs, each once; half pairs are left out.

    Parameters
    ----------
    table
        CSV or TSV of two columns, plain or gzipped.

    Raises
    ------
    CellmillError
        The file is missing or unreadable, or has other than two columns.
    """
    if not table.is_file():
        raise CellmillError(
            f"the table of orthologs {table} does not exist; name one in corpus.orthologs or leave it out"
        )
    try:
        frame = pd.read_csv(table, header=None, dtype=str, keep_default_na=False, sep="[,\t]", engine="python")
    except (OSError, EOFError, ValueError) as error:
        said = " ".join(str(error).split())
        raise CellmillError(
            f"the table of orthologs {table} cannot be read ({said}); it must be a CSV or TSV file of two columns, "
            "plain or gzipped"
        ) from error
    if frame.shape[1] != 2:
        raise CellmillError(
            f"the table of orthologs {table} has {frame.shape[1]} columns; it needs two, the genes of two organisms"
        )
    frame = frame.map(lambda cell: cell.strip().strip('"'))
    first = frame.iloc[0].tolist()
    header = first if all(named_organism(cell) or HEADER.search(cell) for cell in first) else []
    pairs = frame.iloc[1:] if header else frame
    return header, pairs[(pairs != "").all(axis=1)].drop_duplicates(ignore_index=True)


def named_organism(cell: str) -> str | None:
    """The organism whose name, label, taxon or common name stands in a cell of a header, as in "Mouse gene name"."""
    text = f" {re.sub(r'[_.]+', ' ', cell).lower()} "
    for name, words in ORGANISMS.items():
        if any(f" {word.lower()} " in text for word in (name.replace("_", " "), *words)):
            return name
    return None


def gene_ids(names: pd.Series, vocabulary: Vocabulary) -> pd.Series:
    """Vocabulary rows [P] of genes by Ensembl id (any version) or symbol (of one gene only); -1 where there is none."""
    ids = pd.Series(range(len(vocabulary)), index=vocabulary.feature_ids)
    symbols = names_to_ids(pd.Series(vocabulary.feature_names, index=vocabulary.feature_ids))
    by_id = names.str.extract(f"^{ID_PATTERN}$", expand=False)
    found = by_id.where(by_id.isin(ids.index), names.map(symbols.get))
    return found.map(ids).fillna(-1).astype("int32")


def choose_organisms(
    table: Path, header: list[str], pairs: pd.DataFrame, vocabularies: dict[str, Vocabulary]
) -> tuple[str, str]:
    """Which organism's genes stand in the first column and which in the second.

    Both are the header's, if it names two; otherwise those by which most pairs have both their genes, if no other
    reading has nearly as many.
    """
    said = [named_organism(cell) for cell in header]
    if len(set(said) - {None}) == 2:
        if unknown := [name for name in said if name not in vocabularies]:
            raise CellmillError(
                f"the table of orthologs {table} is of {said[0]} and {said[1]}, but the run has no {unknown[0]}; "
                "add it to corpus.organisms or name another table in corpus.orthologs"
            )
        return tuple(said)
    found = {
        (column, name): gene_ids(pairs[column], vocabulary) >= 0
        for column in (0, 1)
        for name, vocabulary in vocabularies.items()
    }
    mapped = {(a, b): (found[0, a] & found[1, b]).sum() for a, b in itertools.permutations(vocabularies, 2)}
    best, other = sorted(mapped, key=mapped.get, reverse=True)[:2]
    if mapped[best] == 0:
        example = ", ".join(pairs.iloc[0]) if len(pairs) else "no pair"
        raise CellmillError(
            f"no pair of the table of orthologs {table} ({example}, ...) is of genes of two of the run's organisms "
            f"({', '.join(vocabularies)}); it must hold their Ensembl ids or symbols"
        )
    if mapped[other] > mapped[best] / 2:
        raise CellmillError(
            f"the columns of the table of orthologs {table} may be {' and '.join(best)}, or {' and '.join(other)}: "
            "their symbols are alike; write a first line that names both organisms, or use Ensembl ids"
        )
    return best


def build_orthologs(table: Path, vocabularies: dict[str, Path], out: Path) -> dict:
    """Write the pairs of a table of orthologs whose genes are both in the run's vocabularies.

    Parameters
    ----------
    table
        CSV or TSV of two columns, plain or gzipped: Ensembl ids or symbols of genes of two organisms, with or without a
        header. A header that names both organisms says which column is which; otherwise the genes do.
    vocabularies
        Vocabulary files by organism, of two organisms or more.
    out
        Parquet to write (`SCHEMA`), sorted by ``gene_a, gene_b``: vocabulary rows and Ensembl ids of both genes, and
        whether the pair is the only one of either gene, in the whole table as well as among the pairs kept.

    Returns
    -------
    dict
        ``organism_a``, ``organism_b`` and the numbers of ``pairs`` in the table, ``mapped`` and ``one_to_one`` ones.

    Raises
    ------
    CellmillError
        The table is missing, unreadable, of other than two columns or of other organisms, or there is one vocabulary.
    """
    if len(vocabularies) < 2:
        raise CellmillError(
            f"orthologs need two organisms, but the run has {', '.join(vocabularies) or 'none'}; name more in "
            "corpus.organisms, or leave corpus.orthologs out"
        )
    known = {name: Vocabulary.read(path) for name, path in vocabularies.items()}
    header, pairs = read_pairs(table)
    a, b = choose_organisms(table, header, pairs, known)
    frame = pd.DataFrame({"gene_a": gene_ids(pairs[0], known[a]), "gene_b": gene_ids(pairs[1], known[b])})
    frame["one_to_one"] = ~(pairs[0].duplicated(keep=False) | pairs[1].duplicated(keep=False))
    frame = frame[(frame["gene_a"] >= 0) & (frame["gene_b"] >= 0)]
    # an id and a symbol of one pair may both stand in the table
    frame = frame.groupby(["gene_a", "gene_b"], as_index=False)["one_to_one"].all()
    frame["one_to_one"] &= ~(frame["gene_a"].duplicated(keep=False) | frame["gene_b"].duplicated(keep=False))
    for side, organism in (("a", a), ("b", b)):
        frame[f"organism_{side}"] = organism
        frame[f"feature_id_{side}"] = [known[organism].feature_ids[gene] for gene in frame[f"gene_{side}"]]
    with atomic(out) as temporary:
        pq.write_table(pa.Table.from_pandas(frame[SCHEMA.names], schema=SCHEMA, preserve_index=False), temporary)
    counts = {"pairs": len(pairs), "mapped": len(frame), "one_to_one": int(frame["one_to_one"].sum())}
    Progress("orthologs", total=len(pairs)).say(
        f"{a} and {b}: {counts['pairs']:,} pairs, {counts['mapped']:,} of genes in both vocabularies, "
        f"{counts['one_to_one']:,} of these one to one"
    )
    return {"organism_a": a, "organism_b": b, **counts}
