"""The one order of a selection's cells, and how it is cut into shards: fixed by the plan, before any count is read.

A corpus is ordered by a hash of (seed, joinid), so that any run of neighbours is a random sample; a benchmark by its
joinids. Every cell has a key, and a shard holds the keys from its edge up to the next shard's. So the shard of a cell
depends on the cell alone: whatever blocks the cells are read in, each goes straight to its place.

Legend: B cells.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from cellmill.randomness import hash64


@dataclass(frozen=True)
class Order:
    """The order of a selection.

    Attributes
    ----------
    by
        What a cell's key is: a `hash` of its joinid, or its `joinid`.
    seed
        Key of the hash.
    edges
        For each split the smallest key of each of its shards, ascending; the first is 0.
    """

    by: Literal["hash", "joinid"]
    seed: int
    edges: dict[str, list[int]]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Split and number of every shard; the position in this list is the shard's index."""
        return [(split, number) for split in sorted(self.edges) for number in range(len(self.edges[split]))]

    def keys(self, joinids_B: np.ndarray) -> np.ndarray:
        """uint64 [B], by which cells are ordered (equal ones by joinid)."""
        if self.by == "joinid":
            return joinids_B.astype(np.uint64)
        return hash64(self.seed, "shuffle", joinids_B)

    def shard_of(self, split: str, keys_B: np.ndarray) -> np.ndarray:
        """int64 [B], the index in `shards` of cells of one split."""
        before = sum(len(edges) for name, edges in self.edges.items() if name < split)
        return before + np.searchsorted(np.array(self.edges[split], np.uint64), keys_B, side="right") - 1

    def as_dict(self) -> dict:
        """Plain data for ``plan.json``; ``Order(**...)`` reads it."""
        return asdict(self)


def hash_edges(n: int) -> list[int]:
    """Edges of `n` shards of equal shares of all hashes."""
    return [number * 2**64 // n for number in range(n)]
