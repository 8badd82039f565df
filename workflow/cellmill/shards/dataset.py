"""A folder of shards, read in order."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import corrupt
from cellmill.shards.manifest import read_manifest
from cellmill.shards.reader import decode_cells, read_obs, read_packed


class RowGroup(NamedTuple):
    """Where a row group lies, and how many cells it holds."""

    path: Path
    index: int
    cells: int


class Shards:
    """A folder of shards and its manifest.

    Parameters
    ----------
    folder
        Where ``manifest.json`` lies.

    Attributes
    ----------
    manifest : dict
        See ``docs/shards.md``.
    splits : tuple of str
        Such as ("train", "validation") for a corpus, ("all",) for a benchmark.
    n_genes : int
        Genes in the vocabulary.
    vocabulary_hash : str
        Hash of the vocabulary that gene ids refer to.
    primary_only : bool
        Whether it is known that all cells are primary data.

    Raises
    ------
    CellmillError
        If the manifest or a shard is missing, or a shard has another size than the manifest says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.splits = tuple(self.manifest["splits"])
        self.n_genes: int = self.manifest["vocabulary"]["n_genes"]
        self.vocabulary_hash: str = self.manifest["vocabulary"]["hash"]
        self.primary_only: bool = self.manifest["selection"].get("quality", {}).get("primary_only", False)

    def _shards(self, split: str) -> list[dict]:
        if split not in self.splits:
            raise CellmillError(f"{self.folder} has no split '{split}'; it has {', '.join(self.splits) or 'none'}")
        return self.manifest["splits"][split]

    def n_cells(self, split: str) -> int:
        """Number of cells of a split."""
        return sum(shard["cells"] for shard in self._shards(split))

    def check_vocabulary(self, expected_hash: str) -> None:
        """Raise `CellmillError` unless the shards were written with the vocabulary of `expected_hash`."""
        if self.vocabulary_hash != expected_hash:
            raise CellmillError(
                f"{self.folder} was written with the vocabulary {self.vocabulary_hash}, but {expected_hash} is"
                " expected; take a checkpoint and shards that were made with one vocabulary"
            )

    def obs(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """The metadata columns of a split (all, or those named), one row per cell in shard order."""
        tables = [read_obs(self.folder / shard["file"], columns) for shard in self._shards(split)]
        if not tables:
            raise CellmillError(f"split '{split}' of {self.folder} has no shards; choose cells for it")
        return pa.concat_tables(tables).unify_dictionaries()

    def datasets(self, split: str) -> set[str]:
        """The dataset_id of every cell of a split."""
        return self.values(split, ["dataset_id"])["dataset_id"]

    def values(self, split: str, columns: list[str]) -> dict[str, set[str]]:
        """The values of each of the metadata columns over the cells of a split, without null; a shard at a time."""
        values = {column: set() for column in columns}
        for shard in self._shards(split):
            obs = read_obs(self.folder / shard["file"], columns)
            for column in columns:
                values[column].update(obs[column].unique().drop_null().to_pylist())
        return values

    def row_groups(self, split: str) -> list[RowGroup]:
        """Every row group of a split, in shard order."""
        return [
            RowGroup(self.folder / shard["file"], index, cells)
            for shard in self._shards(split)
            for index, cells in enumerate(shard["row_groups"])
        ]

    def read_packed(self, group: RowGroup, categories: dict[str, list[str]] | None = None) -> pa.Table:
        """One row group as it is stored: see `cellmill.shards.reader.read_packed`."""
        packed = read_packed(group.path, group.index, categories)
        if len(packed) != group.cells:
            raise corrupt(
                group.path, f"row group {group.index} has {len(packed)} cells, the manifest says {group.cells}"
            )
        return packed

    def read(self, group: RowGroup) -> CellBatch:
        """The cells of one row group."""
        return decode_cells(self.read_packed(group), str(group.path), self.n_genes)

    def batches(
        self, split: str, batch_size: int, start: int = 0, categories: dict[str, list[str]] | None = None
    ) -> Iterator[CellBatch]:
        """Cells in shard order, `batch_size` at a time (the last batch may be smaller).

        Holds no more cells than a row group and a batch.

        Parameters
        ----------
        split
            One of `splits`.
        batch_size
            Cells per batch.
        start
            Cell to start at; row groups before it are not read.
        categories
            Metadata columns whose codes the batches carry, and the values that are coded: see `CellBatch.codes`.
        """
        if batch_size < 1:
            raise CellmillError(f"a batch of {batch_size} cells is not possible; choose at least 1")
        waiting: list[CellBatch] = []
        n_waiting = 0
        for group in self.row_groups(split):
            if start >= group.cells:
                start -= group.cells
                continue
            packed = self.read_packed(group, categories)
            position, start = start, 0
            while position < group.cells:
                taken = min(batch_size - n_waiting, group.cells - position)
                some = packed.slice(position, taken)
                waiting.append(decode_cells(some, str(group.path), self.n_genes, tuple(categories or ())))
                position += taken
                n_waiting += taken
                if n_waiting == batch_size:
                    yield waiting[0] if len(waiting) == 1 else CellBatch.concatenate(waiting)
                    waiting, n_waiting = [], 0
        if waiting:
            yield CellBatch.concatenate(waiting)
