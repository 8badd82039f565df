"""What never enters a corpus: what its benchmarks touch, and what `corpus.held_out` names."""

from dataclasses import dataclass

import pyarrow as pa

from cellmill.census.read import known_values, suggest, values_elsewhere
from cellmill.config import HeldOut
from cellmill.errors import CellmillError

BY_NAME = "corpus.held_out"
"""What holds cells out, where it is no benchmark."""


@dataclass(frozen=True)
class HoldOut:
    """What one benchmark, or `corpus.held_out`, keeps out of the corpus.

    Attributes
    ----------
    datasets
        Whole data sets (dataset_id).
    donors
        Donors (donor_id) in every data set.
    pairs
        Donors of one data set: (dataset_id, donor_id).
    """

    datasets: frozenset[str] = frozenset()
    donors: frozenset[str] = frozenset()
    pairs: frozenset[tuple[str, str]] = frozenset()

    def covers(self, dataset_id: str, donor_id: str) -> bool:
        """Are the cells of this donor in this data set held out?"""
        return dataset_id in self.datasets or donor_id in self.donors or (dataset_id, donor_id) in self.pairs


def held_out_by_benchmark(collection, obs, condition: str | None, unit: str) -> HoldOut:
    """What a benchmark keeps out of the corpus.

    Parameters
    ----------
    collection
        The open Census.
    obs
        The organism's obs.
    condition
        Value filter that selects the benchmark's cells.
    unit
        dataset: the data sets that they are of; collection: all data sets of the same collections, too; donor: only
        their donors, each in the data set that it was found in.
    """
    pairs: set[tuple[str, str]] = set()
    for table in obs.read(column_names=["dataset_id", "donor_id"], value_filter=condition):
        text = pa.table({name: table[name].cast(pa.string()) for name in ("dataset_id", "donor_id")})
        pairs.update(tuple(row.values()) for row in text.group_by(text.column_names).aggregate([]).to_pylist())
    if unit == "donor":
        return HoldOut(pairs=frozenset(pairs))
    datasets = {dataset_id for dataset_id, _ in pairs}
    if unit == "collection":
        rows = _datasets(collection)
        # data sets without a collection, as in a private Census, have no relatives
        touched = {row["collection_id"] for row in rows if row["dataset_id"] in datasets} - {"", None}
        datasets |= {row["dataset_id"] for row in rows if row["collection_id"] in touched}
    return HoldOut(datasets=frozenset(datasets))


def held_out_by_name(collection, organism: str, named: HeldOut) -> HoldOut:
    """What the config's `corpus.held_out` names.

    Raises
    ------
    CellmillError
        No data set, collection or donor of the Census, of any organism, bears a name.
    """
    rows = _datasets(collection)
    datasets = _found(named.datasets, {row["dataset_id"]: {row["dataset_id"]} for row in rows}, "datasets")
    of_collection: dict[str, set[str]] = {}
    for row in rows:
        names = {row["collection_id"], row["collection_name"], _bare_doi(row["collection_doi"] or "")}
        for name in names - {"", None}:
            of_collection.setdefault(name, set()).add(row["dataset_id"])
    spelt = {name: of_collection[_bare_doi(name)] for name in named.collections if _bare_doi(name) in of_collection}
    datasets |= _found(named.collections, spelt | of_collection, "collections")
    if named.donors:
        column = "donor_id"
        known = set(known_values(collection["census_data"][organism].obs, column))
        known |= values_elsewhere(collection, organism, column)
        _found(named.donors, {name: {name} for name in known}, "donors")
    return HoldOut(datasets=frozenset(datasets), donors=frozenset(named.donors))


def _datasets(collection) -> list[dict]:
    columns = ["dataset_id", "collection_id", "collection_name", "collection_doi"]
    return collection["census_info"]["datasets"].read(column_names=columns).concat().to_pylist()


def _bare_doi(doi: str) -> str:
    """A DOI without the address or the letters before its number."""
    return doi.strip().lower().removeprefix("https://doi.org/").removeprefix("doi:").strip()


def _found(names: list[str], known: dict[str, set[str]], key: str) -> set[str]:
    """What all `names` stand for; one that is not known is an error."""
    for name in names:
        if name not in known:
            close = suggest(name, list(known)) if known else "; it has none"
            raise CellmillError(
                f"{BY_NAME}.{key} names '{name}', but the Census has no such {key.removesuffix('s')}{close}"
            )
    return set().union(*(known[name] for name in names))
