"""Compute what architectures may know of the training cells before training: medians, means, deviations of genes."""

from cellmill.job import job
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import compute_statistics, save_statistics

with job(snakemake.log[0]):
    shards = Shards(snakemake.input.shards)
    save_statistics(snakemake.output[0], compute_statistics(shards), shards.vocabulary_hash)
