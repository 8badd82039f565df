"""The vocabulary: the genes that models know, one row each; the row number is the gene id of shards and models.

Genes are keyed by `feature_id`, because `feature_name` is not unique. Reading a vocabulary needs pyarrow alone.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError

SCHEMA = pa.schema(
    [
        ("feature_id", pa.string()),
        ("feature_name", pa.string()),
        ("feature_type", pa.string()),
        ("feature_length", pa.int64()),
        ("is_mitochondrial", pa.bool_()),
        ("is_ribosomal", pa.bool_()),
        ("fingerprint_group", pa.int8()),
    ]
)


class Vocabulary:
    """Genes in the order of their ids.

    Attributes
    ----------
    table
        Arrow table with the columns of `SCHEMA`, V rows sorted by `feature_id`.
    feature_ids, feature_names
        list[str] [V]; Ensembl ids and symbols.
    hash
        SHA-256 (hex) of the feature ids joined by newlines: two shards or checkpoints with one hash share gene ids.
    """

    def __init__(self, table: pa.Table):
        self.table = table
        self.feature_ids: list[str] = table["feature_id"].to_pylist()
        self.feature_names: list[str] = table["feature_name"].to_pylist()
        self.hash = hashlib.sha256("\n".join(self.feature_ids).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.feature_ids)

    @property
    def group_V(self) -> np.ndarray:
        """int8 [V], the group of each gene for `cellmill.fingerprints`; -1 outside."""
        return self.table["fingerprint_group"].fill_null(-1).to_numpy()

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read a vocabulary's parquet file.

        Raises
        ------
        CellmillError
            The file is absent, unreadable, has other columns (another version of cellmill wrote it) or is not sorted by
            unique `feature_id`.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise CellmillError(f"vocabulary {path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        if table.schema.names != SCHEMA.names:
            raise CellmillError(
                f"vocabulary {path} has columns {table.schema.names}; it must have {SCHEMA.names}: build it anew"
            )
        ids = table["feature_id"].to_pylist()
        if not ids or any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
            raise CellmillError(f"vocabulary {path} is empty or not sorted by unique feature_id; build it anew")
        return cls(table)
