"""Open a Census, public or private, by one way only, and check filter terms against what it holds."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cellxgene_census
import pyarrow as pa
import tiledbsoma as soma

from cellmill.config import Census
from cellmill.errors import CellmillError
from cellmill.memory import keep_freed_memory

SEPARATOR = " || "
"""Joins the values of a cell that has several (disease, self_reported_ethnicity), since Census schema 2.4."""

TILE = 2048
"""Rows of a tile of X in the Census: reads that end at tile edges decompress no tile twice."""

TILE_BUDGET = 128 * 1024**2
"""Bytes of tiles that TileDB may hold at once, at least. Its own budget is 10 GB: it then takes in all tiles of a read
before it gives any count, and new memory for them costs more than to decompress them (docs/log.md)."""


@contextmanager
def open_census(census: Census, path: Path | None, buffer_mb: int | None = None) -> Iterator[soma.Collection]:
    """Open a Census through `cellxgene_census.open_soma`.

    Parameters
    ----------
    census
        The config's section: the version of the public Census and the size of the read buffers.
    path
        Folder of a Census on disk; None opens the public one. Never fork after opening.
    buffer_mb
        Size of each column's read buffer, where it shall not be the config's.

    Yields
    ------
    tiledbsoma.Collection

    Raises
    ------
    CellmillError
        If the folder is missing or no Census, the version is unknown, the network is away, or the Census cannot be
        read while it is open.
    """
    buffer = (buffer_mb or census.buffer_mb) * 1024**2
    config = {
        "soma.init_buffer_bytes": buffer,
        "py.init_buffer_bytes": buffer,
        "sm.mem.total_budget": max(TILE_BUDGET, 8 * buffer),
        # or else each query that ends gives all free memory back, to be taken anew by the next one
        "sm.mem.malloc_trim": "false",
    }
    keep_freed_memory()
    if path is None:
        opened = _open_public(census.version, config)
    else:
        if not Path(path).is_dir():
            raise CellmillError(f"there is no Census at {path}; build one, or name its folder in census.path")
        try:
            opened = cellxgene_census.open_soma(uri=str(path), tiledb_config=config)
        except (soma.SOMAError, ValueError, TypeError) as error:
            raise CellmillError(
                f"{path} is no Census: it holds no SOMA collection; name the Census's own folder"
            ) from error
    with opened:
        if "census_data" not in opened or "census_info" not in opened:
            raise CellmillError(f"{path} is a SOMA object but no Census: it lacks census_info or census_data")
        try:
            yield opened
        except soma.SOMAError as error:
            name = f"the Census at {path}" if path else f"the public Census {census.version}"
            raise CellmillError(
                f"{name} could not be read to the end ({' '.join(str(error).split())}); see that it is whole and "
                "within reach, then run again: what is finished is kept"
            ) from error


def _open_public(version: str, config: dict) -> soma.Collection:
    try:
        return cellxgene_census.open_soma(census_version=version, tiledb_config=config)
    except ValueError as error:
        raise CellmillError(
            f"the public Census has no release '{version}'; set census.version to one that "
            "cellxgene_census.get_census_version_directory lists, such as 2025-11-08"
        ) from error
    except (OSError, soma.SOMAError) as error:
        # requests' errors are OSErrors.
        raise CellmillError(
            f"the public Census {version} cannot be reached; check the network, or use a local Census (census.source)"
        ) from error


def organism_obs(census: soma.Collection, organism: str) -> soma.DataFrame:
    """The obs of an organism; an organism that the Census lacks is a `CellmillError`."""
    if organism not in census["census_data"]:
        known = ", ".join(sorted(census["census_data"]))
        raise CellmillError(f"the Census holds no organism '{organism}'; corpus.organisms may be {known}")
    return census["census_data"][organism].obs


def known_values(obs: soma.DataFrame, column: str) -> list:
    """All values of a text or boolean column; its dictionary, where it has one, spares a scan."""
    kind = obs.schema.field(column).type
    if pa.types.is_dictionary(kind):
        return sorted(obs.get_enumeration_values([column])[column].to_pylist())
    if pa.types.is_boolean(kind):
        return [False, True]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = set()
        for table in obs.read(column_names=[column]):
            values.update(table[column].unique().to_pylist())
        return sorted(values)
    raise CellmillError(
        f"obs column '{column}' holds numbers ({kind}); filter on text or booleans, depth is a quality rule"
    )


def check_terms(census: soma.Collection, organism: str, terms: dict[str, list]) -> dict[str, list]:
    """Check that every column and value of a filter occurs in the Census.

    Parameters
    ----------
    census
        From `open_census`.
    organism
        Such as ``homo_sapiens``.
    terms
        obs columns and values, such as ``{"tissue_general": ["blood", "lung"]}``.

    Returns
    -------
    dict
        The same columns with all values that the terms stand for: where cells may have several values joined by
        ` || `, a value stands for every combination that it is part of. A value that only another organism of the
        Census has stays as it is: here it stands for no cell.

    Raises
    ------
    CellmillError
        If the organism, a column or a value is unknown (the closest known ones are named), or a column has no value.
    """
    obs = organism_obs(census, organism)
    checked = {}
    for column, wanted in terms.items():
        if column not in obs.schema.names:
            close = suggest(column, obs.schema.names)
            raise CellmillError(f"the Census has no obs column '{column}'{close}")
        if not wanted:
            raise CellmillError(f"the filter on '{column}' names no value; give at least one or leave the column out")
        known = known_values(obs, column)
        for value in wanted:
            if isinstance(value, bool) != (known == [False, True]):
                kind = "text; put it in quotes" if isinstance(value, bool) else "true or false, without quotes"
                raise CellmillError(f"the filter on '{column}' has {value!r}, but the column holds {kind}")
        parts = {value: _parts(value) for value in known}
        here = {part for split in parts.values() for part in split}
        absent = [value for value in wanted if value not in here]
        elsewhere = values_elsewhere(census, organism, column) if absent else set()
        for value in absent:
            if value not in elsewhere:
                close = suggest(str(value), [str(name) for name in here | elsewhere])
                raise CellmillError(f"no cell of the Census has {column} '{value}'{close}")
        chosen = set(wanted)
        checked[column] = [value for value, split in parts.items() if chosen & split] + absent
    return checked


def values_elsewhere(census: soma.Collection, organism: str, column: str) -> set:
    """What the other organisms of the Census have in a column of obs: values, and parts of joined ones."""
    values = set()
    for other, experiment in census["census_data"].items():
        if other != organism and column in experiment.obs.schema.names:
            values.update(part for value in known_values(experiment.obs, column) for part in _parts(value))
    return values


def _parts(value: str | bool) -> set:
    """A value and, where it is several joined ones, each of them."""
    return {value, *value.split(SEPARATOR)} if isinstance(value, str) else {value}


def suggest(word: str, known: list[str]) -> str:
    """The words most like a wrong one, as the end of a sentence."""
    lower = {name.lower(): name for name in known}
    close = [lower[name] for name in difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.5)]
    if close:
        return f"; did you mean {' or '.join(repr(name) for name in close)}?"
    shown = sorted(known)[:8]
    return f"; it knows {', '.join(shown)}{', ...' if len(known) > len(shown) else ''}"


def value_filter(include: dict[str, list], exclude: dict[str, list]) -> str | None:
    """Terms as the value filter of a SOMA query on obs.

    Parameters
    ----------
    include, exclude
        Columns and values to keep and to drop, checked and spelt out by `check_terms`.

    Returns
    -------
    str or None
        Such as ``tissue in ['lung'] and disease not in ['normal']``; None if there is no term.
    """
    clauses = []
    for terms, is_kept in ((include, True), (exclude, False)):
        for column, values in terms.items():
            words = [value for value in values if isinstance(value, str)]
            tests = [f"{column} {'in' if is_kept else 'not in'} {words!r}"] if words else []
            # TileDB's filters take booleans in comparisons only.
            flags = [value for value in values if isinstance(value, bool)]
            tests += [f"{column} {'==' if is_kept else '!='} {flag}" for flag in flags]
            clauses.append(f"({(' or ' if is_kept else ' and ').join(tests)})" if len(tests) > 1 else tests[0])
    return " and ".join(clauses) or None
