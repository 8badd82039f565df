"""Embed the cells of a data set with a trained model."""

import time
from pathlib import Path

from cellmill.checkpoints import load_checkpoint
from cellmill.device import use_threads
from cellmill.embed import embed_shards, seen, write_embedding
from cellmill.job import job
from cellmill.recipes import Embedding
from cellmill.shards.dataset import Shards

with job(snakemake.log[0]):
    use_threads(snakemake.threads)
    shards = Shards(snakemake.input.shards)
    model, meta = load_checkpoint(Path(snakemake.input.weights).parent)
    shards.check_vocabulary(meta["vocabulary_hash"])
    settings = Embedding(**snakemake.params.embedding)
    started = time.monotonic()
    x_CE = embed_shards(model, shards, "all", settings.batch_size, settings.pooling)
    about = {
        "model": snakemake.wildcards.model,
        "kind": "model",
        "seed": int(snakemake.wildcards.seed),
        "seconds": time.monotonic() - started,
        "seen": seen(meta["datasets"], shards),
        "checkpoint": meta["weights_sha256"],
    }
    write_embedding(Path(snakemake.output.embedding), x_CE, about)
