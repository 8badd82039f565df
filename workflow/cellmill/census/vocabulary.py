"""Choosing the genes of a corpus's vocabulary from a Census, and what kinds of genes they are.

Legend: V_all genes of the Census, V genes in the vocabulary.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.census.read import open_census
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.fingerprints import choose_groups
from cellmill.vocabulary import SCHEMA, Vocabulary

_RIBOSOMAL = r"^RP(SA2?|LP[012]|[LS]\d+(A1?|AL|L[12]?|RT|X|Y[12])?)$"


def is_mitochondrial(feature_names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Bool [V]: is the symbol that of a mitochondrially encoded gene (MT-ND1 in human, mt-Nd1 in mouse).

    Other organisms of the Census name theirs without the prefix; nothing is found for them.
    """
    names = feature_names.cast(pa.large_string())
    return pc.starts_with(names, "MT-", ignore_case=True).fill_null(False).to_numpy(zero_copy_only=False)


def is_ribosomal(feature_names: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Bool [V]: is the symbol that of a protein of the cytosolic ribosome (RPL13A, RPS4X, RPSA, RPLP0; mouse Rpl13a).

    Neither kinases (RPS6KA1), nor the ribosome of mitochondria (MRPL1), pseudogenes (RPL10P1, Rpl10-ps1) or
    read-through genes (RPS10-NUDT3). Organisms with other symbols have none.
    """
    names = feature_names.cast(pa.large_string())
    return pc.match_substring_regex(names, _RIBOSOMAL, ignore_case=True).fill_null(False).to_numpy(zero_copy_only=False)


def choose_genes(
    var: pa.Table, corpus_datasets: np.ndarray, census_datasets: np.ndarray, biotypes: list[str], min_datasets: int
) -> Vocabulary:
    """Choose the genes that enter, order them by `feature_id`, and deal some of them to the fingerprints' groups.

    Parameters
    ----------
    var
        V_all rows of a Census's var: ``feature_id, feature_name, feature_type, feature_length`` and ``nnz``, the number
        of cells with a count.
    corpus_datasets, census_datasets
        int64 [V_all], how many data sets of the corpus, and of the whole Census, measured the gene (presence matrix).
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
    keep = corpus_datasets >= min_datasets
    if biotypes:
        keep &= pc.is_in(types, value_set=pa.array(biotypes, pa.string())).to_numpy()
    if not keep.any():
        raise CellmillError(
            f"no gene is left for the vocabulary: none of {len(var):,} genes of biotypes {biotypes or 'any'} was "
            f"measured in at least {min_datasets} data sets of the corpus; lower corpus.genes.min_datasets or add "
            "biotypes"
        )
    rows = np.flatnonzero(keep)
    rows = rows[pc.sort_indices(var["feature_id"].take(rows)).to_numpy()]
    chosen = var.take(rows)
    group_V = choose_groups(chosen["nnz"].to_numpy(), census_datasets[rows])
    columns = {name: chosen[name] for name in ("feature_id", "feature_name", "feature_type", "feature_length")}
    columns["is_mitochondrial"] = is_mitochondrial(chosen["feature_name"])
    columns["is_ribosomal"] = is_ribosomal(chosen["feature_name"])
    columns["fingerprint_group"] = pa.array(group_V, mask=group_V < 0)
    return Vocabulary(pa.table(columns).cast(SCHEMA).combine_chunks())


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
    batches = pq.ParquetFile(plan, pre_buffer=False).iter_batches(columns=["dataset_id"])
    datasets = pa.array(sorted({name for batch in batches for name in batch["dataset_id"].unique().to_pylist()}))
    with open_census(census, path) as collection:
        rna = collection["census_data"][organism].ms["RNA"]
        columns = ["soma_joinid", "feature_id", "feature_name", "feature_type", "feature_length", "nnz"]
        var = rna.var.read(column_names=columns, result_order="row-major").concat()
        table = collection["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat()
        in_corpus = np.zeros(int(table["soma_joinid"].to_numpy().max()) + 1, bool)
        in_corpus[table["soma_joinid"].to_numpy()] = pc.is_in(table["dataset_id"].cast(pa.string()), value_set=datasets)
        n_var = int(var["soma_joinid"].to_numpy().max()) + 1
        corpus_datasets, census_datasets = np.zeros(n_var, np.int64), np.zeros(n_var, np.int64)
        for part in rna["feature_dataset_presence_matrix"].read((slice(None),)).tables():
            dataset_N, gene_N, present_N = (column.to_numpy() for column in part.columns)
            dataset_N, gene_N = dataset_N[present_N.astype(bool)], gene_N[present_N.astype(bool)]
            census_datasets += np.bincount(gene_N, minlength=n_var)
            corpus_datasets += np.bincount(gene_N[in_corpus[dataset_N]], minlength=n_var)
    joinid_V = var["soma_joinid"].to_numpy()
    vocabulary = choose_genes(
        var, corpus_datasets[joinid_V], census_datasets[joinid_V], genes.biotypes, genes.min_datasets
    )
    with atomic(out) as temporary:
        pq.write_table(vocabulary.table, temporary, compression="zstd")
    return vocabulary
