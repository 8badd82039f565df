"""Embed the cells of a data set with a model's untrained twin: the same architecture and seed, no step of training."""

from pathlib import Path

from cellmill.checkpoints import build_model
from cellmill.device import use_threads
from cellmill.embed import embed_and_write, embed_shards
from cellmill.job import job
from cellmill.recipes import Embedding, ModelRecipe
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import load_statistics

with job(snakemake.log[0]):
    use_threads(snakemake.threads)
    shards = Shards(snakemake.input.shards)
    statistics = load_statistics(snakemake.input.statistics, shards.vocabulary_hash)
    seed = int(snakemake.wildcards.seed)
    model = build_model(ModelRecipe.from_dict(snakemake.params.sizes), shards.n_genes, statistics, seed)
    settings = Embedding(**snakemake.params.embedding)
    how = {"pooling": settings.pooling, "precision": settings.precision}
    embed_and_write(
        Path(snakemake.output.embedding),
        lambda: embed_shards(model, shards, "all", settings.batch_size, **how),
        shards,
        model=f"{snakemake.wildcards.model}.untrained",
        kind="untrained",
        seed=seed,
        trained_on=[],
    )
