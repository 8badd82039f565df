# Every embedder turns a data set's shards into one matrix: cells in the order of the shards x width.


rule embed_model:
    input:
        shards="results/{run}/shards/{cells}",
        corpus="results/{run}/shards/corpus",
        weights=flow.checkpoint,
        meta=flow.checkpoint_meta,
        vocabulary=flow.foreign_vocabulary,
    output:
        embedding="results/{run}/embed/{cells}/{model}/seed{seed}.npy",
        meta="results/{run}/embed/{cells}/{model}/seed{seed}.json",
    log:
        "results/{run}/logs/embed/{cells}-{model}-seed{seed}.log",
    benchmark:
        "results/{run}/benchmarks/embed_model/{cells}-{model}-seed{seed}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: flow.threads
    resources:
        mem_mb=4000,
    params:
        embedding=flow.embedding,
        code=flow.embed_code,
    script:
        "../scripts/embed_model.py"


rule embed_untrained:
    input:
        shards="results/{run}/shards/{cells}",
        statistics="results/{run}/statistics.safetensors",
    output:
        embedding="results/{run}/embed/{cells}/{model}.untrained/seed{seed}.npy",
        meta="results/{run}/embed/{cells}/{model}.untrained/seed{seed}.json",
    log:
        "results/{run}/logs/embed/{cells}-{model}.untrained-seed{seed}.log",
    benchmark:
        "results/{run}/benchmarks/embed_untrained/{cells}-{model}-seed{seed}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: flow.threads
    resources:
        mem_mb=4000,
    params:
        sizes=flow.sizes,
        embedding=flow.embedding,
        code=flow.embed_untrained_code,
    script:
        "../scripts/embed_untrained.py"


rule embed_baseline:
    input:
        shards="results/{run}/shards/{cells}",
        corpus="results/{run}/shards/corpus",
    output:
        embedding="results/{run}/embed/{cells}/{baseline}/seed{seed}.npy",
        meta="results/{run}/embed/{cells}/{baseline}/seed{seed}.json",
    log:
        "results/{run}/logs/embed/{cells}-{baseline}-seed{seed}.log",
    benchmark:
        "results/{run}/benchmarks/embed_baseline/{cells}-{baseline}-seed{seed}.tsv"
    conda:
        "../../envs/evaluate.yaml"
    params:
        columns=flow.batch,
        code=code_version("embed_baseline"),
    script:
        "../scripts/embed_baseline.py"
