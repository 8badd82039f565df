"""Writing shards: row group by row group, under a temporary name until the file is whole."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import sha256, sync, unwritable
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import (
    FROM_CELLS,
    MAX_ROW_GROUP,
    OBS_STRINGS,
    PACKED,
    ROW_GROUP,
    STRING,
    encode_cells,
    shard_schema,
)


class ShardWriter:
    """Writes one shard, row group by row group, under a temporary name until it is complete.

    The bytes depend on the cells alone, not on how they were cut into calls of `write`.

    Parameters
    ----------
    path
        The file, such as ``train-00000.parquet``; it appears when `close` returns.
    row_group
        Cells per row group, at most 8,192.

    Examples
    --------
    >>> with ShardWriter("train-00000.parquet") as writer:  # doctest: +SKIP
    ...     writer.write(cells, obs)
    >>> writer.close()["cells"]  # doctest: +SKIP
    1937
    """

    def __init__(self, path: str | Path, *, row_group: int = ROW_GROUP):
        if not 1 <= row_group <= MAX_ROW_GROUP:
            raise CellmillError(f"a row group of {row_group} cells is not possible; choose 1 to {MAX_ROW_GROUP:,}")
        self.path = Path(path)
        self.row_group = row_group
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._cells: list[CellBatch] = []
        self._obs: list[pa.Table] = []
        self._waiting = 0
        self._nonzeros = 0
        self._row_groups: list[int] = []
        self._info: dict | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def write(self, cells: CellBatch, obs: pa.Table) -> None:
        """Append cells.

        Parameters
        ----------
        cells
            B cells.
        obs
            B rows: the columns of `OBS_STRINGS` and any further ones as strings (plain or dictionary-coded), and
            `n_measured_genes` (integers). `soma_joinid`, `total_counts` and `n_genes` are taken from `cells`; where
            `obs` has them, they must agree.

        Raises
        ------
        CellmillError
            If a column is missing, of another type or contradicts `cells`, or a value does not fit the format.
        """
        obs = self._check(cells, obs)
        self._cells.append(cells)
        self._obs.append(obs)
        self._waiting += len(cells)
        if self._waiting < self.row_group:
            return
        cells, obs = CellBatch.concatenate(self._cells), pa.concat_tables(self._obs)
        whole = self._waiting // self.row_group * self.row_group
        for start in range(0, whole, self.row_group):
            self._write_row_group(cells.slice(start, start + self.row_group), obs.slice(start, self.row_group))
        self._cells, self._obs = [cells.slice(whole, len(cells))], [obs.slice(whole)]
        self._waiting -= whole

    def close(self) -> dict:
        """Write the last cells and give the file its name.

        Returns
        -------
        dict
            `file` (name without folder), `cells`, `nonzeros`, `bytes`, `sha256`, `row_groups` (cells of each).
        """
        if self._info is not None:
            return self._info
        try:
            if self._waiting:
                self._write_row_group(CellBatch.concatenate(self._cells), pa.concat_tables(self._obs))
            self._open().close()
            sync(self._temporary)
            self._info = {
                "file": self.path.name,
                "cells": sum(self._row_groups),
                "nonzeros": self._nonzeros,
                "bytes": self._temporary.stat().st_size,
                "sha256": sha256(self._temporary),
                "row_groups": self._row_groups,
            }
            os.replace(self._temporary, self.path)
        except OSError as error:
            self._abort()
            raise unwritable(self.path, error) from error
        except BaseException:
            self._abort()
            raise
        return self._info

    def _check(self, cells: CellBatch, obs: pa.Table) -> pa.Table:
        """The columns of `obs` as they are stored, or a `CellmillError`."""
        if obs.num_rows != len(cells):
            raise CellmillError(f"{self.path.name}: {len(cells)} cells came with {obs.num_rows} rows of metadata")
        missing = [name for name in (*OBS_STRINGS, "n_measured_genes") if name not in obs.column_names]
        if missing:
            raise CellmillError(f"{self.path.name}: the cells' metadata lacks {', '.join(missing)}; add these columns")
        from_cells = {"soma_joinid": cells.joinids, "total_counts": cells.totals, "n_genes": cells.lengths}
        for name, values_B in from_cells.items():
            if name in obs.column_names and not np.array_equal(obs[name].to_numpy(), values_B):
                raise CellmillError(f"{self.path.name}: column {name} of the metadata contradicts the cells; drop it")
        measured = obs["n_measured_genes"]
        if not pa.types.is_integer(measured.type) or measured.null_count:
            raise CellmillError(f"{self.path.name}: column n_measured_genes must hold integers and no nulls")
        sums_B = np.diff(np.concatenate([[0], np.cumsum(cells.counts)])[cells.offsets])
        if (sums_B > cells.totals).any() or (cells.lengths > measured.to_numpy()).any():
            raise CellmillError(
                f"{self.path.name}: a cell has more counts or genes in the vocabulary than in all measured genes"
                " (total_counts, n_measured_genes); these two must be taken before genes are left out"
            )
        names = [*OBS_STRINGS, *(n for n in obs.column_names if n not in (*OBS_STRINGS, *FROM_CELLS))]
        columns = {}
        for name in names:
            if name == "n_measured_genes":
                continue
            kind = obs.schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            # A column without any value, or of no rows, has the type null.
            strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            if name in PACKED or not strings:
                raise CellmillError(f"{self.path.name}: column {name} of the metadata must hold strings, not {kind}")
            columns[name] = obs[name].cast(pa.string())
        columns["n_measured_genes"] = measured.cast(pa.int32())
        checked = pa.table(columns)
        if self._schema is None:
            self._schema = shard_schema([n for n in columns if n not in (*OBS_STRINGS, "n_measured_genes")])
        elif not set(checked.column_names) <= set(self._schema.names) or len(columns) + 6 != len(self._schema):
            raise CellmillError(f"{self.path.name}: columns of the metadata changed from one write to the next")
        return checked

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            schema = self._schema or shard_schema([])
            strings = [field.name for field in schema if field.type == STRING]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._temporary,
                schema,
                compression="zstd",
                use_dictionary=strings,
                write_statistics=[name for name in schema.names if name not in PACKED],
                write_page_checksum=True,
            )
        return self._writer

    def _write_row_group(self, cells: CellBatch, obs: pa.Table) -> None:
        columns = {
            "soma_joinid": pa.array(cells.joinids, pa.int64()),
            "total_counts": pa.array(cells.totals, pa.int64()),
            "n_genes": pa.array(cells.lengths.astype(np.int32)),
            **encode_cells(cells),
        }
        for name in obs.column_names:
            # Dictionaries are made anew for each row group, so that their order depends on its cells alone.
            values = obs[name].combine_chunks()
            columns[name] = values.dictionary_encode() if pa.types.is_string(values.type) else values
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        try:
            self._open().write_table(table, row_group_size=self.row_group)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._row_groups.append(len(cells))
        self._nonzeros += len(cells.genes)

    def _abort(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk is still full; the file goes now
                self._writer.close()
        self._temporary.unlink(missing_ok=True)
