"""Counts survive the way h5ad -> Census -> shards, cell for cell, as plain `cellxgene_census.get_anndata` sees them."""

import anndata
import cellxgene_census
import corpus_runs
import numpy as np
import pandas as pd
import pytest
from cellmill.config import Quality
from cellmill.shards.dataset import Shards
from cellmill.vocabulary import Vocabulary
from corpus_runs import PANCREAS, corpus
from scipy.sparse import csr_matrix

EVERYTHING = Quality(min_counts=0, min_genes=0, max_mito_fraction=1.0)


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


def decoded(all_shards: list[Shards], n_genes: int) -> tuple[np.ndarray, csr_matrix, pd.DataFrame]:
    """joinids, counts [cells, V] and metadata of every cell of every split."""
    batches = [(s, split, list(s.batches(split, 64))) for s in all_shards for split in s.splits]
    cells = [batch for _, _, some in batches for batch in some]
    rows = [
        csr_matrix((batch.counts, batch.genes, batch.offsets), shape=(len(batch), n_genes)).toarray() for batch in cells
    ]
    obs = pd.concat([s.obs(split).to_pandas() for s, split, _ in batches])
    assert obs["total_counts"].tolist() == np.concatenate([batch.totals for batch in cells]).tolist()
    return np.concatenate([batch.joinids for batch in cells]), csr_matrix(np.concatenate(rows)), obs


def test_shards_hold_what_get_anndata_gives(shards, census):
    genes = Vocabulary.read(shards[0].folder.parent / "vocabulary.parquet")
    assert shards[0].vocabulary_hash == shards[1].vocabulary_hash == genes.hash
    joinids, counts, obs = decoded(shards, len(genes))
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
def test_shards_hold_what_the_h5ad_holds(demo_census, shards, census, name):
    h5ad = anndata.read_h5ad(demo_census.h5ads / f"{name}.h5ad")
    mapping = pd.read_parquet(demo_census.mapping).query("dataset_id == @name")
    assert list(mapping["gene"]) == list(h5ad.var_names)
    genes = Vocabulary.read(shards[0].folder.parent / "vocabulary.parquet")
    ids = pd.Series(np.arange(len(genes)), index=genes.feature_ids).reindex(mapping["feature_id"])
    known = np.flatnonzero(ids.notna())
    # input genes that were mapped to one id are summed
    to_vocabulary = csr_matrix(
        (np.ones(len(known), np.int64), (known, ids.to_numpy()[known].astype(int))), shape=(h5ad.n_vars, len(genes))
    )
    expected = csr_matrix(h5ad.X).astype(np.int64) @ to_vocabulary

    joinids, counts, obs = decoded(shards, len(genes))
    rows = np.flatnonzero(obs["dataset_id"] == name)
    in_h5ad = h5ad.obs_names.get_indexer(census.obs["observation_joinid"].astype(str).iloc[joinids[rows]])
    assert sorted(in_h5ad) == list(range(h5ad.n_obs))
    assert (counts[rows] != expected[in_h5ad]).nnz == 0
