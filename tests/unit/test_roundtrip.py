"""Counts survive the way h5ad -> Census -> shards, cell for cell, as plain `cellxgene_census.get_anndata` sees them."""

import anndata
import cellxgene_census
import corpus_runs
import numpy as np
import pandas as pd
import pytest
from cellmill.config import Quality
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.vocabulary import Vocabulary
from corpus_runs import PANCREAS, corpus
from scipy.sparse import csr_matrix

EVERYTHING = Quality(min_counts=0, min_genes=0, max_mito_fraction=1.0, max_mads=None)


@pytest.fixture(scope="module")
def shards(demo_census, tmp_path_factory) -> list[Shards]:
    """The demo's corpus and benchmark in shards, with the vocabulary in the first folder."""
    folder = tmp_path_factory.mktemp("roundtrip")
    corpus_runs.mill_corpus(demo_census.soma, folder / "corpus", corpus(quality=EVERYTHING))
    genes = folder / "corpus" / "vocabulary.parquet"
    corpus_runs.mill_benchmark(demo_census.soma, folder / "pancreas", "pancreas", PANCREAS, genes)
    return [Shards(folder / "corpus" / "shards"), Shards(folder / "pancreas" / "shards")]


@pytest.fixture(scope="module")
def census(demo_census) -> anndata.AnnData:
    """All cells of the demo Census, by plain cellxgene_census."""
    with cellxgene_census.open_soma(uri=str(demo_census.soma)) as opened:
        return cellxgene_census.get_anndata(opened, "homo_sapiens")


@pytest.fixture(scope="module")
def genes(shards) -> Vocabulary:
    return Vocabulary.read(shards[0].folder.parent / "vocabulary.parquet")


@pytest.fixture(scope="module")
def decoded(shards, genes) -> tuple[np.ndarray, csr_matrix, pd.DataFrame]:
    """joinids, counts [cells, V] and metadata of every cell of every split."""
    parts = [(folder, split) for folder in shards for split in folder.splits]
    cells = CellBatch.concatenate([batch for folder, split in parts for batch in folder.batches(split, 64)])
    obs = pd.concat([folder.obs(split).to_pandas() for folder, split in parts])
    assert obs["soma_joinid"].tolist() == cells.joinids.tolist()
    assert obs["total_counts"].tolist() == cells.totals.tolist()
    return cells.joinids, csr_matrix((cells.counts, cells.genes, cells.offsets), shape=(len(cells), len(genes))), obs


def test_shards_hold_what_get_anndata_gives(shards, genes, decoded, census):
    assert shards[0].vocabulary_hash == shards[1].vocabulary_hash == genes.hash
    joinids, counts, obs = decoded
    assert sorted(joinids) == census.obs["soma_joinid"].tolist()  # all cells, each once

    column_of = pd.Series(np.arange(census.n_vars), index=census.var["feature_id"])
    expected = census.X[joinids][:, column_of[genes.feature_ids]]
    assert (counts != expected).nnz == 0
    source = census.obs.iloc[joinids]
    assert obs["total_counts"].tolist() == source["raw_sum"].tolist()
    assert obs["n_measured_genes"].tolist() == source["n_measured_vars"].tolist()
    for column in ("dataset_id", "cell_type", "tissue", "assay", "disease", "sex", "donor_id", "library"):
        assert obs[column].tolist() == source[column].tolist()


@pytest.mark.parametrize("name", ["baron_pancreas", "celltypist_blood", "li_cell_lines"])
def test_shards_hold_what_the_h5ad_holds(demo_census, genes, decoded, census, name):
    h5ad = anndata.read_h5ad(demo_census.h5ads / f"{name}.h5ad")
    mapping = pd.read_parquet(demo_census.mapping).query("dataset_id == @name")
    assert list(mapping["gene"]) == list(h5ad.var_names)
    ids = pd.Series(np.arange(len(genes)), index=genes.feature_ids).reindex(mapping["feature_id"])
    known = np.flatnonzero(ids.notna())
    # input genes that were mapped to one id are summed
    to_vocabulary = csr_matrix(
        (np.ones(len(known), np.int64), (known, ids.to_numpy()[known].astype(int))), shape=(h5ad.n_vars, len(genes))
    )
    expected = csr_matrix(h5ad.X).astype(np.int64) @ to_vocabulary

    joinids, counts, obs = decoded
    rows = np.flatnonzero(obs["dataset_id"] == name)
    in_h5ad = h5ad.obs_names.get_indexer(census.obs["observation_joinid"].astype(str).iloc[joinids[rows]])
    assert sorted(in_h5ad) == list(range(h5ad.n_obs))
    assert (counts[rows] != expected[in_h5ad]).nnz == 0
