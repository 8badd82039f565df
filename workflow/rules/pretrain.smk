# One training run per model and seed. State to go on from after a kill lies in a folder that is not declared here,
# since Snakemake deletes the outputs of a failed job.


rule pretrain:
    input:
        shards="results/{run}/shards/corpus",
        statistics="results/{run}/statistics.safetensors",
        vocabulary=flow.vocabulary,
    output:
        weights="results/{run}/pretrain/{model}/seed{seed}/checkpoint.safetensors",
        meta="results/{run}/pretrain/{model}/seed{seed}/checkpoint.json",
        log="results/{run}/pretrain/{model}/seed{seed}/log.parquet",
    log:
        "results/{run}/logs/pretrain/{model}-seed{seed}.log",
    benchmark:
        "results/{run}/benchmarks/pretrain/{model}-seed{seed}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: flow.threads
    resources:
        mem_mb=4000,
        runtime=2880,
    params:
        recipe=flow.recipe,
        code=flow.pretrain_code,
    script:
        "../scripts/pretrain.py"
