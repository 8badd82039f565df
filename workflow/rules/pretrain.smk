# One training run per model and seed. State to go on from after a kill lies in a folder that is not declared here,
# since Snakemake deletes the outputs of a failed job. Published weights are read instead of trained. Where a recipe asks
# for several processes, the script starts them (cellmill.training.launch): the job is one, with the threads of all.


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
    threads: flow.training_threads
    resources:
        mem_mb=flow.training_memory,
        runtime=2880,
        nodes=flow.nodes,
        tasks=flow.nodes,
        mpi=flow.step_starter,
    params:
        recipe=flow.recipe,
        code=flow.pretrain_code,
    script:
        "../scripts/pretrain.py"


rule import_released:
    input:
        flow.released_files,
    output:
        weights="results/{run}/released/{model}/checkpoint.safetensors",
        meta="results/{run}/released/{model}/checkpoint.json",
    log:
        "results/{run}/logs/import_released/{model}.log",
    benchmark:
        "results/{run}/benchmarks/import_released/{model}.tsv"
    conda:
        "../../envs/train.yaml"
    resources:
        mem_mb=8000,
    params:
        architecture=flow.architecture,
        released=flow.released_weights,
        code=flow.import_released_code,
    script:
        "../scripts/import_released.py"
