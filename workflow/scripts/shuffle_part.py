"""Bring the cells of one range of a selection's shards together from all blocks, in their final order."""

from pathlib import Path

from cellmill.job import job
from cellmill.shards.shuffle import shuffle_part
from cellmill.vocabulary import Vocabulary

with job(snakemake.log[0]):
    shuffle_part(
        summary=Path(snakemake.input.summary),
        blocks=[Path(path) for path in snakemake.input.blocks],
        removed=[Path(path) for path in snakemake.input.removed],
        part=int(snakemake.wildcards.part),
        parts=snakemake.params.parts,
        n_genes=len(Vocabulary.read(Path(snakemake.input.vocabulary))),
        out=Path(snakemake.output[0]),
        code=snakemake.params.code,
    )
