# From planned cells to token shards that know no model.


rule curate_block:
    input:
        census=flow.census,
        plan="results/{run}/selections/{cells}/plan.parquet",
        vocabulary="results/{run}/vocabulary.parquet",
    output:
        cells="results/{run}/selections/{cells}/blocks/{block}.parquet",
        qc="results/{run}/selections/{cells}/blocks/{block}.qc.parquet",
    log:
        "results/{run}/logs/curate_block/{cells}-{block}.log",
    benchmark:
        "results/{run}/benchmarks/curate_block/{cells}-{block}.tsv"
    conda:
        "../../envs/corpus.yaml"
    resources:
        mem_mb=4000,
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        extra_obs=flow.config.census.extra_obs,
        organism=flow.config.corpus.organism,
        quality=flow.quality,
        code=code_version("curate_block"),
    script:
        "../scripts/curate_block.py"


rule shards:
    input:
        blocks=flow.blocks,
        block_qcs=flow.block_qcs,
        plan="results/{run}/selections/{cells}/plan.parquet",
        summary="results/{run}/selections/{cells}/plan.json",
        vocabulary="results/{run}/vocabulary.parquet",
    output:
        shards=directory("results/{run}/shards/{cells}"),
        qc=report(
            "results/{run}/selections/{cells}/qc.parquet",
            caption="../report/qc.rst",
            category="Quality control",
            labels={"cells": "{cells}"},
        ),
        qc_cells="results/{run}/selections/{cells}/qc_cells.parquet",
    log:
        "results/{run}/logs/shards/{cells}.log",
    benchmark:
        "results/{run}/benchmarks/shards/{cells}.tsv"
    conda:
        "../../envs/corpus.yaml"
    resources:
        mem_mb=4000,
    params:
        cells_per_shard=flow.config.corpus.cells_per_shard,
        seed=flow.shuffle_seed,
        code=code_version("shards"),
    script:
        "../scripts/shards.py"


rule statistics:
    input:
        shards="results/{run}/shards/corpus",
    output:
        "results/{run}/statistics.safetensors",
    log:
        "results/{run}/logs/statistics.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        code=code_version("statistics"),
    script:
        "../scripts/statistics.py"
