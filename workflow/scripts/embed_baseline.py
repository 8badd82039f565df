"""Embed the cells of a data set with a baseline or a control."""

from functools import partial
from pathlib import Path

from cellmill.embed import embed_and_write
from cellmill.job import job
from cellmill.methods import CONTROLS
from cellmill.shards.dataset import Shards
from cellmill.tasks.baselines import embed_baseline
from cellmill.tasks.controls import embed_control

with job(snakemake.log[0]):
    name, seed, columns = snakemake.wildcards.baseline, int(snakemake.wildcards.seed), snakemake.params.columns
    target, corpus = Shards(snakemake.input.shards), Shards(snakemake.input.corpus)
    if name in CONTROLS:
        of = {"label": columns["label"], "batch": columns["batch"]}
        kind, embed = "control", partial(embed_control, name, target, **of, seed=seed)
    else:
        kind, embed = "baseline", partial(embed_baseline, name, target, corpus, batch=columns["batch"], seed=seed)
    embed_and_write(
        Path(snakemake.output.embedding),
        embed,
        target,
        model=name,
        kind=kind,
        seed=seed,
        trained_on=sorted(corpus.datasets("train")),
        primary_only=corpus.primary_only,
        corpus=corpus,
    )
