"""Pretrain one model with one seed, or go on where a killed job stopped."""

from pathlib import Path

from cellmill.job import job
from cellmill.pretrain import pretrain
from cellmill.recipes import ModelRecipe
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import load_statistics
from cellmill.vocabulary import Vocabulary

with job(snakemake.log[0]):
    vocabulary = Vocabulary.read(Path(snakemake.input.vocabulary))
    out = Path(snakemake.output.weights).parent
    pretrain(
        Shards(snakemake.input.shards),
        load_statistics(snakemake.input.statistics, vocabulary.hash),
        ModelRecipe.from_dict(snakemake.params.recipe),
        name=snakemake.wildcards.model,
        seed=int(snakemake.wildcards.seed),
        out=out,
        state=out.with_name(f"{out.name}.state"),
        meta={"feature_ids": vocabulary.feature_ids, "code_version": snakemake.params.code},
    )
