# One self-contained page.


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
        vocabulary="results/{run}/vocabulary.parquet",
        mapping=flow.genes_mapping,
        templates=expand(
            f"{PROJECT}/workflow/report/page.{{part}}",
            part=["html", "css", "js"],
        ),
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
