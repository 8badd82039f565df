"""The vocabulary: the genes that models know, one row each; the row number is the gene id of shards and models.

Genes are keyed by `feature_id`, because `feature_name` is not unique. Reading a vocabulary needs pyarrow alone.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import atomic

SCHEMA = pa.schema(
    [
        ("feature_id", pa.string()),
        ("feature_name", pa.string()),
        ("feature_type", pa.string()),
        ("feature_length", pa.int64()),
        ("is_mitochondrial", pa.bool_()),
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

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read a vocabulary's parquet file.

        Raises
        ------
        CellmillError
            The file is absent, unreadable, has other columns or is not sorted by unique `feature_id`.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise CellmillError(f"vocabulary {path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        if table.schema.names != SCHEMA.names:
            raise CellmillError(f"vocabulary {path} has columns {table.schema.names}; it must have {SCHEMA.names}")
        ids = table["feature_id"].to_pylist()
        if not ids or any(a >= b for a, b in zip(ids, ids[1:], strict=False)):
            raise CellmillError(f"vocabulary {path} is empty or not sorted by unique feature_id; build it anew")
        return cls(table)


def is_mitochondrial(feature_names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Bool [V]: is the symbol that of a mitochondrially encoded gene (MT-ND1 in human, mt-Nd1 in mouse).

    Other organisms of the Census name theirs without the prefix; nothing is found for them.
    """
    names = feature_names.cast(pa.large_string())
    return pc.starts_with(names, "MT-", ignore_case=True).fill_null(False).to_numpy(zero_copy_only=False)


def choose_genes(var: pa.Table, datasets_per_gene: np.ndarray, biotypes: list[str], min_datasets: int) -> Vocabulary:
    """Choose the genes that enter, and order them by `feature_id`.

    Parameters
    ----------
    var
        V_all rows of a Census's var, with the columns of `SCHEMA` but `is_mitochondrial`.
    datasets_per_gene
        int64 [V_all], how many of the corpus's data sets measured the gene (presence matrix of the Census).
    biotypes
        Values of `feature_type` to keep; empty keeps all.
    min_datasets
        Smallest number of data sets.

    Raises
    ------
    CellmillError
        A biotype does not occur, or no gene is left.
    """
    types = var["feature_type"].cast(pa.string())
    unknown = sorted(set(biotypes) - set(pc.unique(types).to_pylist()))
    if unknown:
        raise CellmillError(
            f"corpus.genes.biotypes names '{unknown[0]}', which no gene of the Census has; it has "
            f"{', '.join(sorted(pc.unique(types).to_pylist()))}"
        )
    keep = datasets_per_gene >= min_datasets
    if biotypes:
        keep &= pc.is_in(types, value_set=pa.array(biotypes, pa.string())).to_numpy()
    if not keep.any():
        raise CellmillError(
            f"no gene is left for the vocabulary: none of {len(var):,} genes of biotypes {biotypes or 'any'} was "
            f"measured in at least {min_datasets} data sets of the corpus; lower corpus.genes.min_datasets or add "
            "biotypes"
        )
    table = var.select([name for name in SCHEMA.names if name != "is_mitochondrial"])
    table = table.append_column("is_mitochondrial", pa.array(is_mitochondrial(var["feature_name"])))
    table = table.filter(pa.array(keep)).cast(SCHEMA)
    return Vocabulary(table.sort_by("feature_id").combine_chunks())


def build_vocabulary(census, path: Path | None, *, organism: str, genes, plan: Path, out: Path) -> Vocabulary:
    """Build the corpus's vocabulary from a Census's var and presence matrix, and write it to `out` (parquet).

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    organism
        Organism of the Census.
    genes
        `cellmill.config.Genes`: biotypes and smallest number of data sets.
    plan
        ``plan.parquet`` of the corpus: its data sets are those that count for `min_datasets`.
    out
        Where to write.

    Raises
    ------
    CellmillError
        As `choose_genes`.
    """
    from cellmill.census.read import open_census  # heavy, and only this function reads the Census

    datasets = pc.unique(pq.read_table(plan, columns=["dataset_id"])["dataset_id"].cast(pa.string()))
    with open_census(census, path) as collection:
        rna = collection["census_data"][organism].ms["RNA"]
        columns = ["soma_joinid", "feature_id", "feature_name", "feature_type", "feature_length"]
        var = rna.var.read(column_names=columns, result_order="row-major").concat()
        table = collection["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat()
        rows = table.filter(pc.is_in(table["dataset_id"].cast(pa.string()), value_set=datasets))
        per_joinid = np.zeros(int(var["soma_joinid"].to_numpy().max()) + 1, np.int64)
        presence = rna["feature_dataset_presence_matrix"]
        for part in presence.read((rows["soma_joinid"].combine_chunks(),)).tables():
            present = part["soma_data"].to_numpy().astype(bool)
            np.add.at(per_joinid, part["soma_dim_1"].to_numpy()[present], 1)
    vocabulary = choose_genes(var, per_joinid[var["soma_joinid"].to_numpy()], genes.biotypes, genes.min_datasets)
    with atomic(out) as temporary:
        pq.write_table(vocabulary.table, temporary, compression="zstd")
    return vocabulary
