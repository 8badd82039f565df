"""The organisms of the Census, and which of them the cells of a file are of."""

import pandas as pd

from cellmill.errors import CellmillError

ORGANISMS = {  # name: (label, taxon, common name)
    "callithrix_jacchus": ("Callithrix jacchus", "NCBITaxon:9483", "marmoset"),
    "homo_sapiens": ("Homo sapiens", "NCBITaxon:9606", "human"),
    "macaca_mulatta": ("Macaca mulatta", "NCBITaxon:9544", "rhesus macaque"),
    "mus_musculus": ("Mus musculus", "NCBITaxon:10090", "mouse"),
    "pan_troglodytes": ("Pan troglodytes", "NCBITaxon:9598", "chimpanzee"),
}
SAID_IN = ("organism", "organism_ontology_term_id", "species")
"""Where a file says its organism: keys of uns, then columns of obs."""


def find_organism(word: str) -> str | None:
    """The Census's name of an organism, from its name, label, taxon or common name in any case; None if unknown."""
    wanted = word.strip().lower().replace("_", " ")
    for name, words in ORGANISMS.items():
        if wanted in (name.replace("_", " "), *(known.lower() for known in words)):
            return name
    return None


def check_organism(word: str, where: str) -> str:
    """The Census's name of an organism that `where` names; an unknown one is a `CellmillError`."""
    name = find_organism(word)
    if name is None:
        raise CellmillError(
            f"{where} '{word}' is not an organism of the Census; it may be {', '.join(ORGANISMS)}, the label, the "
            "NCBITaxon id or the common name of one"
        )
    return name


def said_organism(uns: dict, obs: pd.DataFrame, where: str) -> str | None:
    """The organism that a file says its cells are of.

    Parameters
    ----------
    uns, obs
        The file's; the first of the keys of uns, then of the columns of obs, that `SAID_IN` names and that says
        anything counts.
    where
        The file, for errors.

    Returns
    -------
    str or None
        Such as ``mus_musculus``; None where the file does not say.

    Raises
    ------
    CellmillError
        The cells are of several organisms, or of one that the Census does not have.
    """
    said = [(f"uns['{key}']", pd.Series([uns[key]]).explode()) for key in SAID_IN if key in uns]
    said += [(f"obs['{key}']", obs[key]) for key in SAID_IN if key in obs]
    for place, values in said:
        words = [word for word in values.dropna().astype(str).unique() if word.lower() not in ("", "na", "unknown")]
        if len(words) > 1:
            raise CellmillError(
                f"{where}: {place} names several organisms ({', '.join(words[:3])}); write the cells of each into a "
                "file of its own"
            )
        if words:
            return check_organism(words[0], f"{where}: {place}")
    return None
