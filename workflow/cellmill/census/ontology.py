"""Terms of the CELLxGENE ontologies, from the cellxgene-ontology-guide wheel: labels, ids, general tissues."""

import json
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa

from cellmill.census.wheels import wheel_file
from cellmill.errors import CellmillError

PROJECT = "cellxgene-ontology-guide"
DATA = "cellxgene_ontology_guide/data/"
SCHEMA = "7.0.0"
"""CELLxGENE schema whose ontology versions are used: that of Census schema 2.4."""


class Ontologies:
    """The terms of the ontologies that the CELLxGENE schema pins.

    Parameters
    ----------
    wheels
        Folder that holds the cellxgene-ontology-guide wheel.
    """

    def __init__(self, wheels: Path):
        self._wheels = wheels

    def _read(self, name: str) -> bytes:
        with wheel_file(self._wheels, PROJECT, DATA + name) as file:
            return file.read()

    @cached_property
    def _versions(self) -> dict:
        return json.loads(self._read("ontology_info.json"))[SCHEMA]["ontologies"]

    @lru_cache  # noqa: B019 - an Ontologies object lives as long as the job
    def terms(self, prefix: str) -> dict[str, dict]:
        """All terms of one ontology, such as CL, by id."""
        if prefix not in self._versions:
            raise CellmillError(
                f"'{prefix}' is not an ontology of CELLxGENE schema {SCHEMA}: {', '.join(self._versions)}"
            )
        packed = self._read(f"{prefix}-ontology-{self._versions[prefix]['version']}.json.zst")
        return json.loads(pa.input_stream(pa.BufferReader(packed), compression="zstd").read())

    def label(self, term: str) -> str:
        """Label of a term id such as ``CL:0000169`` or ``CVCL_0023``; an obsolete or unknown id is an error."""
        found = self.terms(term.replace("_", ":").partition(":")[0]).get(term)
        if found is None or found["deprecated"]:
            raise CellmillError(f"'{term}' is not a current ontology term of CELLxGENE schema {SCHEMA}")
        return found["label"]

    def term(self, prefix: str, label: str) -> str:
        """Id of the current term of an ontology that bears `label`."""
        found = [
            term for term, about in self.terms(prefix).items() if about["label"] == label and not about["deprecated"]
        ]
        if len(found) != 1:
            raise CellmillError(f"'{label}' is the label of {len(found)} current terms of {prefix}; it must be of one")
        return found[0]

    @cached_property
    def _general(self) -> list[str]:
        return json.loads(self._read("tissue_general_list.json"))

    def tissue_general(self, term: str) -> str:
        """The general tissue of a tissue, as the Census maps it.

        The first of CELLxGENE's ranked list of general tissues that is the tissue itself or an ancestor of it; a
        tissue below none of them, or outside UBERON (a cell line), stands for itself.
        """
        if not term.startswith("UBERON:") or term in self._general:
            return term
        ancestors = self.terms("UBERON").get(term, {"ancestors": {}})["ancestors"]
        return next((general for general in self._general if general in ancestors), term)
