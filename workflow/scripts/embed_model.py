"""Embed the cells of a data set with a trained model."""

from pathlib import Path

from cellmill.checkpoints import load_checkpoint
from cellmill.device import use_threads
from cellmill.embed import embed_and_write, embed_shards
from cellmill.gene_map import GeneMap
from cellmill.job import job
from cellmill.recipes import Embedding
from cellmill.shards.dataset import Shards
from cellmill.vocabulary import Vocabulary

with job(snakemake.log[0]):
    use_threads(snakemake.threads)
    shards = Shards(snakemake.input.shards)
    model, meta = load_checkpoint(Path(snakemake.input.weights).parent)
    gene_map = None
    if snakemake.input.vocabulary:
        vocabulary = Vocabulary.read(Path(snakemake.input.vocabulary[0]))
        gene_map = GeneMap(vocabulary.feature_ids, vocabulary.feature_names, meta["feature_ids"])
        print(f"{gene_map.n_common} of the model's {model.n_genes} genes are in the vocabulary of the cells")
    else:
        shards.check_vocabulary(meta["vocabulary_hash"])
    settings = Embedding(**snakemake.params.embedding)
    how = {"pooling": settings.pooling, "precision": settings.precision, "gene_map": gene_map}
    embed_and_write(
        Path(snakemake.output.embedding),
        lambda: embed_shards(model, shards, "all", settings.batch_size, **how),
        shards,
        model=snakemake.wildcards.model,
        kind="model",
        seed=int(snakemake.wildcards.seed),
        trained_on=meta["datasets"],
        primary_only=meta["primary_only"],
        corpus=Shards(snakemake.input.corpus),
        checkpoint=meta["weights_sha256"],
    )
