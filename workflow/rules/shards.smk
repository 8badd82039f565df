# From planned cells to token shards that know no model: blocks of the Census, then one shuffle across them.


rule score_doublets:
    input:
        census=flow.census,
        plan="results/{run}/selections/{cells}/plan.parquet",
        shown=ancient("results/{run}/plan.txt"),
    output:
        "results/{run}/selections/{cells}/doublets/{block}.parquet",
    log:
        "results/{run}/logs/score_doublets/{cells}-{block}.log",
    benchmark:
        "results/{run}/benchmarks/score_doublets/{cells}-{block}.tsv"
    conda:
        "../../envs/corpus.yaml"
    resources:
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        organism=flow.organism,
        blocks=flow.n_blocks,
        seed=flow.shuffle_seed,
        code=code_version("score_doublets"),
    script:
        "../scripts/score_doublets.py"


rule curate_block:
    input:
        census=flow.census,
        plan="results/{run}/selections/{cells}/plan.parquet",
        summary="results/{run}/selections/{cells}/plan.json",
        vocabulary=flow.vocabulary_of,
        doublets=flow.doublets,
        shown=ancient("results/{run}/plan.txt"),
    output:
        cells="results/{run}/selections/{cells}/blocks/{block}.arrow",
        qc="results/{run}/selections/{cells}/blocks/{block}.qc.parquet",
        prints="results/{run}/selections/{cells}/blocks/{block}.prints.parquet",
    log:
        "results/{run}/logs/curate_block/{cells}-{block}.log",
    benchmark:
        "results/{run}/benchmarks/curate_block/{cells}-{block}.tsv"
    conda:
        "../../envs/corpus.yaml"
    resources:
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        extra_obs=flow.config.census.extra_obs,
        organism=flow.organism,
        quality=flow.quality,
        code=code_version("curate_block"),
    script:
        "../scripts/curate_block.py"


rule duplicates:
    input:
        flow.corpus_prints,
    output:
        "results/{run}/selections/{corpus}/duplicates.parquet",
    log:
        "results/{run}/logs/duplicates/{corpus}.log",
    benchmark:
        "results/{run}/benchmarks/duplicates/{corpus}.tsv"
    conda:
        "../../envs/corpus.yaml"
    params:
        code=code_version("duplicates"),
    script:
        "../scripts/duplicates.py"


rule audit_leaks:
    input:
        corpus=flow.corpus_prints,
        benchmarks=flow.benchmark_prints,
        duplicates="results/{run}/selections/{corpus}/duplicates.parquet",
    output:
        "results/{run}/selections/{corpus}/leaks.parquet",
    log:
        "results/{run}/logs/audit_leaks/{corpus}.log",
    benchmark:
        "results/{run}/benchmarks/audit_leaks/{corpus}.tsv"
    conda:
        "../../envs/corpus.yaml"
    params:
        benchmarks=flow.audited,
        action=flow.config.corpus.leaks,
        code=code_version("audit_leaks"),
    script:
        "../scripts/audit_leaks.py"


# A part lasts until its shards are linked into the selection's folder: a shard is one file on the disk, not two.
rule shuffle_part:
    input:
        summary="results/{run}/selections/{cells}/plan.json",
        blocks=flow.blocks,
        removed=flow.removed,
        vocabulary=flow.vocabulary_of,
    output:
        temp(directory("results/{run}/selections/{cells}/parts/{part}")),
    log:
        "results/{run}/logs/shuffle_part/{cells}-{part}.log",
    benchmark:
        "results/{run}/benchmarks/shuffle_part/{cells}-{part}.tsv"
    conda:
        "../../envs/corpus.yaml"
    params:
        parts=flow.n_blocks,
        code=code_version("shuffle_part"),
    script:
        "../scripts/shuffle_part.py"


rule shards:
    input:
        summary="results/{run}/selections/{cells}/plan.json",
        parts=flow.parts,
        block_qcs=flow.block_qcs,
        vocabulary=flow.vocabulary_of,
        duplicates=flow.duplicates,
        leaks=flow.leaks,
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
    params:
        drop_duplicates=flow.config.corpus.duplicates == "drop",
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
