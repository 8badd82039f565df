"""Embed the cells of a data set with a baseline or a control."""

import time
from pathlib import Path

from cellmill.embed import seen, write_embedding
from cellmill.job import job
from cellmill.shards.dataset import Shards
from cellmill.tasks.baselines import embed_baseline
from cellmill.tasks.controls import CONTROLS, embed_control

with job(snakemake.log[0]):
    name, seed = snakemake.wildcards.baseline, int(snakemake.wildcards.seed)
    target, corpus = Shards(snakemake.input.shards), Shards(snakemake.input.corpus)
    started = time.monotonic()
    if name in CONTROLS:
        x_CE = embed_control(name, target, label=snakemake.params.columns["label"], seed=seed)
    else:
        x_CE = embed_baseline(name, target, corpus, batch=snakemake.params.columns["batch"], seed=seed)
    about = {
        "model": name,
        "kind": "control" if name in CONTROLS else "baseline",
        "seed": seed,
        "seconds": time.monotonic() - started,
        "seen": seen(sorted(corpus.datasets("train")), target),
        "checkpoint": None,
    }
    write_embedding(Path(snakemake.output.embedding), x_CE, about)
