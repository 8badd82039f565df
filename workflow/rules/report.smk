# Self-contained pages: the corpus, as soon as it is there, and the whole run.


rule corpus_page:
    input:
        shards=expand("results/{{run}}/shards/{cells}", cells=flow.selections),
        plans=expand(
            "results/{{run}}/selections/{cells}/plan.json", cells=flow.selections
        ),
        qc=expand(
            "results/{{run}}/selections/{cells}/qc.parquet", cells=flow.selections
        ),
        qc_cells=expand(
            "results/{{run}}/selections/{cells}/qc_cells.parquet",
            cells=flow.selections,
        ),
        duplicates=expand(
            "results/{{run}}/selections/{corpus}/duplicates.parquet",
            corpus=flow.corpora,
        ),
        leaks=expand(
            "results/{{run}}/selections/{corpus}/leaks.parquet", corpus=flow.corpora
        ),
        vocabularies=expand(
            "results/{{run}}/vocabulary/{organism}.parquet", organism=flow.organisms
        ),
        mapping=flow.genes_mapping,
        orthologs=flow.orthologs,
        templates=flow.templates,
    output:
        report(
            "results/{run}/report/corpus.html",
            caption="../report/corpus.rst",
            category="Report",
            labels={"page": "the corpus"},
        ),
    log:
        "results/{run}/logs/corpus_page.log",
    conda:
        "../../envs/report.yaml"
    params:
        selections=flow.selections,
        corpora=flow.corpora,
        organisms=flow.organisms,
        config=flow.corpus_config,
        command=flow.command(workflow.configfiles),
        code=code_version("corpus_page"),
    script:
        "../scripts/corpus_page.py"


rule write_report:
    input:
        scores="results/{run}/scores.parquet",
        csv="results/{run}/scores.csv",
        logs=flow.logs,
        embeddings=flow.first_embeddings,
        shards=expand("results/{{run}}/shards/{cells}", cells=flow.selections),
        plans=expand(
            "results/{{run}}/selections/{cells}/plan.json", cells=flow.selections
        ),
        qc=expand(
            "results/{{run}}/selections/{cells}/qc.parquet", cells=flow.selections
        ),
        qc_cells=expand(
            "results/{{run}}/selections/{cells}/qc_cells.parquet",
            cells=flow.selections,
        ),
        vocabulary=flow.vocabulary,
        corpus_page="results/{run}/report/corpus.html",
        mapping=flow.genes_mapping,
        templates=flow.templates,
    output:
        report(
            "results/{run}/report/index.html",
            caption="../report/page.rst",
            category="Report",
            labels={"page": "the whole run"},
        ),
    log:
        "results/{run}/logs/write_report.log",
    conda:
        "../../envs/report.yaml"
    params:
        selections=flow.selections,
        benchmarks=f"{flow.results}/benchmarks",
        config=flow.resolved,
        command=flow.command(workflow.configfiles),
        code=code_version("write_report"),
    script:
        "../scripts/write_report.py"
