# Every score of every task is a row of one table.


rule score:
    input:
        embeddings=flow.embeddings,
        shards="results/{run}/shards/{dataset}",
    output:
        "results/{run}/scores/{task}/{dataset}/{method}.parquet",
    log:
        "results/{run}/logs/score/{task}-{dataset}-{method}.log",
    benchmark:
        "results/{run}/benchmarks/score/{task}-{dataset}-{method}.tsv"
    conda:
        "../../envs/evaluate.yaml"
    resources:
        mem_mb=4000,
    params:
        task=flow.task,
        dataset=flow.dataset,
        config_hash=flow.config_hash,
        cache="results/{run}/.jax",
        code=flow.score_code,
    script:
        "../scripts/score.py"


rule score_pretraining:
    input:
        checkpoints=flow.checkpoints,
        shards="results/{run}/shards/corpus",
        statistics="results/{run}/statistics.safetensors",
    output:
        "results/{run}/scores/pretraining/corpus/{model}.parquet",
    log:
        "results/{run}/logs/score_pretraining/{model}.log",
    benchmark:
        "results/{run}/benchmarks/score_pretraining/{model}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: flow.threads
    params:
        embedding=flow.embedding,
        config_hash=flow.config_hash,
        code=flow.score_pretraining_code,
    script:
        "../scripts/score_pretraining.py"


rule score_yardstick:
    input:
        checkpoints=flow.checkpoints,
        shards="results/{run}/shards/corpus",
        statistics="results/{run}/statistics.safetensors",
        vocabulary=flow.foreign_vocabulary,
    output:
        "results/{run}/scores/yardstick/corpus/{model}.parquet",
    log:
        "results/{run}/logs/score_yardstick/{model}.log",
    benchmark:
        "results/{run}/benchmarks/score_yardstick/{model}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: flow.threads
    resources:
        mem_mb=4000,
    params:
        embedding=flow.embedding,
        config_hash=flow.config_hash,
        code=flow.score_yardstick_code,
    script:
        "../scripts/score_yardstick.py"


rule score_yardstick_baselines:
    input:
        shards="results/{run}/shards/corpus",
    output:
        "results/{run}/scores/yardstick/corpus/baselines.parquet",
    log:
        "results/{run}/logs/score_yardstick_baselines.log",
    benchmark:
        "results/{run}/benchmarks/score_yardstick_baselines.tsv"
    conda:
        "../../envs/evaluate.yaml"
    resources:
        mem_mb=8000,
    params:
        seeds=flow.seeds,
        config_hash=flow.config_hash,
        code=code_version("score_yardstick_baselines"),
    script:
        "../scripts/score_yardstick_baselines.py"


rule collect_scores:
    input:
        flow.score_tables,
    output:
        parquet=report("results/{run}/scores.parquet", category="Scores"),
        csv=report(
            "results/{run}/scores.csv",
            caption="../report/scores.rst",
            category="Scores",
            labels={"table": "all scores"},
        ),
    log:
        "results/{run}/logs/collect_scores.log",
    conda:
        "../../envs/evaluate.yaml"
    params:
        code=code_version("collect_scores"),
    script:
        "../scripts/collect_scores.py"
