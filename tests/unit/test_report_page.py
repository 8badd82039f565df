"""The report on a small run made of real Baron cells: what it says, what it holds, that it loads nothing."""

import json
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from cellmill import scores
from cellmill.census.scan import EDGES
from cellmill.config import DEMO
from cellmill.errors import CellmillError
from cellmill.qc import TABLE_SCHEMA
from cellmill.report.page import write_report
from cellmill.report.quality import bin_cells, read_plan
from cellmill.shards.batch import CellBatch
from cellmill.shards.format import OBS_STRINGS
from cellmill.shards.manifest import write_manifest
from cellmill.shards.writer import ShardWriter
from cellmill.vocabulary import Vocabulary
from report_pages import Page, assert_all_is_drawn, browse, chromium

METHODS = {  # name: kind, level of its scores, spread over seeds
    "hvg_pca": ("baseline", 0.95, 0.0),
    "harmony": ("baseline", 0.91, 0.0),
    "scgpt-demo": ("model", 0.60, 0.015),
    "geneformer-demo": ("model", 0.52, 0.02),
    "scgpt-demo.untrained": ("untrained", 0.55, 0.03),
    "geneformer-demo.untrained": ("untrained", 0.53, 0.02),
    "labels": ("control", 1.0, 0.0),
    "shuffled": ("control", 0.07, 0.004),
}

YARDSTICK = {  # name: kind, level of its scores
    "gene_means": ("baseline", 0.63),
    "pca_imputation": ("baseline", 0.72),
    "scgpt-demo": ("model", 0.68),
    "geneformer-demo": ("model", 0.60),
    "scgpt-demo.untrained": ("untrained", 0.30),
    "geneformer-demo.untrained": ("untrained", 0.61),
}


def cell_batch(adata) -> CellBatch:
    x = sp.csr_matrix(adata.X).astype(np.int64)
    x.sort_indices()
    totals = np.asarray(x.sum(axis=1)).ravel()
    return CellBatch(np.arange(len(totals)), x.indptr.astype(np.int64), x.indices.astype(np.int64), x.data, totals)


def write_shards(folder: Path, splits: dict[str, anndata.AnnData], vocabulary: Vocabulary) -> None:
    folder.mkdir(parents=True)
    written = {}
    for split, adata in splits.items():
        constant = {name: pa.array(["unknown"] * adata.n_obs) for name in OBS_STRINGS}
        own = {
            "dataset_id": adata.obs["dataset_id"],
            "cell_type": adata.obs["cell_type"],
            "author_cell_type": adata.obs["cell_type"],
            "library": adata.obs["batch"],
        }
        columns = constant | {name: pa.array(values.astype(str)) for name, values in own.items()}
        obs = pa.table(columns | {"n_measured_genes": pa.array(np.full(adata.n_obs, adata.n_vars, np.int32))})
        writer = ShardWriter(folder / f"{split}-00000.parquet")
        writer.write(cell_batch(adata), obs)
        written[split] = [writer.close()]
    census = {"source": "demo", "version": "test"}
    n_genes = len(vocabulary)
    write_manifest(
        folder,
        organism="homo_sapiens",
        census=census,
        selection={},
        vocabulary_hash=vocabulary.hash,
        n_genes=n_genes,
        splits=written,
    )


def score_rows(seeds, methods=METHODS, datasets=("baron_pancreas",)) -> list[dict]:
    rows = []
    rng = np.random.default_rng(0)

    def add(task, dataset, split, model, kind, regime, seed, metric, value, higher=True, reason=None):
        rows.append(
            scores.row(
                run="test",
                task=task,
                dataset=dataset,
                split=split,
                model=model,
                kind=kind,
                regime=regime,
                seed=seed,
                metric=metric,
                value=value,
                higher_is_better=higher,
                n=1937,
                seconds=1.5,
                reason=reason,
                seen="no",
                code_version="c0de",
                commit="abc",
                config_hash="c0ff",
                checkpoint="f00d" if kind == "model" else None,
            )
        )

    for seed in seeds:
        for dataset in datasets:
            for model, (kind, level, spread) in methods.items():
                for regime in ("zero_shot", "linear_probe"):
                    for split in ("leave_out:human1_lib1", "leave_out:human1_lib2", "leave_out:human1_lib3", "mean"):
                        for metric, shift in (
                            ("macro_f1", 0),
                            ("accuracy", 0.02),
                            ("balanced_accuracy", -0.01),
                            ("weighted_f1", 0.015),
                        ):
                            value = (
                                level
                                + (shift + 0.03 * (regime == "linear_probe")) * (level < 0.96)
                                + spread * rng.normal()
                            )
                            add("annotation", dataset, split, model, kind, regime, seed, metric, value)
                for metric in (
                    "total",
                    "bio",
                    "batch",
                    "kbet",
                    "nmi",
                    "ari",
                    "avg_bio",
                    "avg_batch",
                ):
                    failed = metric == "kbet" and kind == "untrained"
                    value = None if failed else level * 0.7 + spread * rng.normal()
                    reason = "kBET needs two batches per label & <3>" if failed else None
                    add("integration", dataset, "all", model, kind, "zero_shot", seed, metric, value, reason=reason)
        for model in ("scgpt-demo", "geneformer-demo"):
            for kind, name, level in (
                ("model", model, 5.1),
                ("untrained", model, 9.2),
                ("baseline", f"{model}.trivial", 6.0),
            ):
                for metric, scale in (("loss", 1), ("mlm", 0.7), ("contrast", 0.3)):
                    value = level * scale + 0.02 * rng.normal() * (kind != "baseline")
                    add("pretraining", "corpus", "validation", name, kind, "none", seed, metric, value, higher=False)
        for model, (kind, level) in YARDSTICK.items():
            for metric, shift, higher in (("pearson", 0, True), ("mse", 0.1, False), ("pearson_residual", -0.2, True)):
                unknown = metric == "pearson_residual" and model == "gene_means"
                value = None if unknown else level + shift + 0.001 * rng.normal() * (kind != "baseline")
                reason = "it follows from the gene's mean" if unknown else None
                add("yardstick", "corpus", "validation", model, kind, "none", seed, metric, value, higher, reason)
    return rows


def training_log(seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(200):
        loss = 5 + 4.2 * np.exp(-step / 40)
        rows.append((step, "train", "loss", loss + 0.15 * rng.normal()))
        rows.append((step, "train", "learning_rate", 1e-3 * min(1, step / 20)))
        rows.append((step, "machine", "mfu", 0.25 + 0.01 * rng.normal()))
        rows.append((step, "machine", "cells_per_second", 2000 + 10 * rng.normal()))
        if step % 25 == 0 or step == 199:
            rows.append((step, "validation", "loss", loss + 0.1 + 0.02 * rng.normal()))
    frame = pd.DataFrame(rows, columns=["step", "split", "metric", "value"]).assign(seconds=1.0)
    return pa.Table.from_pandas(frame, preserve_index=False)


def make_run(root: Path, data: Path, *, seeds=(0, 1, 2), n_cells=300, methods=METHODS) -> dict:
    """Fabricate the files of a run around real Baron cells; returns the arguments of `write_report`."""
    import scanpy as sc

    baron = anndata.read_h5ad(data / "cells" / "baron_h1.h5ad")
    baron = baron[np.sort(np.random.default_rng(0).permutation(baron.n_obs)[:n_cells]), :2000].copy()
    baron.obs["dataset_id"] = "baron_pancreas"
    corpus = baron.copy()
    corpus.obs["dataset_id"] = np.where(np.arange(n_cells) % 3 == 0, "li_cell_lines", "blood")
    table = pa.table(
        {
            "feature_id": [f"ENSG{i:011d}" for i in range(baron.n_vars)],
            "feature_name": list(baron.var_names),
            "feature_type": ["protein_coding"] * baron.n_vars,
            "feature_length": [1000] * baron.n_vars,
            "is_mitochondrial": [name.startswith("MT-") for name in baron.var_names],
            "is_ribosomal": [name.startswith(("RPL", "RPS")) for name in baron.var_names],
            "fingerprint_group": pa.nulls(baron.n_vars, pa.int8()),
        }
    )
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "vocabulary.parquet")
    vocabulary = Vocabulary.read(root / "vocabulary.parquet")
    write_shards(
        root / "shards/corpus", {"train": corpus[: n_cells // 2], "validation": corpus[n_cells // 2 :]}, vocabulary
    )
    write_shards(root / "shards/baron_pancreas", {"all": baron}, vocabulary)

    sc.pp.normalize_total(baron, target_sum=1e4)
    sc.pp.log1p(baron)
    sc.pp.pca(baron, n_comps=30, random_state=0)
    embeddings = []
    for i, (model, (kind, _, _)) in enumerate(methods.items()):
        for seed in seeds:
            path = root / "embed/baron_pancreas" / model / f"seed{seed}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).normal(size=baron.obsm["X_pca"].shape) * i * 0.6
            np.save(path, (baron.obsm["X_pca"] + noise).astype(np.float32))
            path.with_suffix(".json").write_text(
                json.dumps({"embedder": model, "kind": kind, "seed": seed, "seconds": 3.0})
            )
            embeddings.append(path)
    logs = []
    for model in ("scgpt-demo", "geneformer-demo"):
        for seed in seeds:
            path = root / "pretrain" / model / f"seed{seed}" / "log.parquet"
            path.parent.mkdir(parents=True)
            pq.write_table(training_log(seed), path)
            logs.append(path)
    qc, plans, qc_cells = [], [], []
    rng = np.random.default_rng(0)
    for name, datasets in {"corpus": ("li_cell_lines", "blood"), "baron_pancreas": ("baron_pancreas",)}.items():
        folder = root / "selections" / name
        folder.mkdir(parents=True)
        rows, remaining = [], {}
        for dataset in datasets:
            remaining = n_cells
            for rule, removed in (
                ("selected", 0),
                ("held_out", 0),
                ("primary_only", 0),
                ("min_counts", 12),
                ("min_genes", 0),
                ("max_mito_fraction", 3),
            ):
                remaining -= removed
                rows.append({"dataset_id": dataset, "rule": rule, "removed": removed, "remaining": remaining})
        pq.write_table(pa.Table.from_pylist(rows, TABLE_SCHEMA), folder / "qc.parquet")
        counts = np.exp(rng.normal(8.3, 0.8, 1500))
        cells = {
            "soma_joinid": np.arange(1500),
            "dataset_id": ["blood"] * 1500,
            "assay": ["10x 3' v3"] * 1500,
            "raw_sum": counts.astype(int),
            "nnz": (counts**0.85).astype(int),
            "ribo_fraction": rng.beta(8, 20, 1500),
            "doublet_score": pa.nulls(1500, pa.float64()),
        }
        mito = rng.beta(2, 40, 1500) if name == "corpus" else np.full(1500, np.nan)  # Baron has no mitochondrial genes
        table = pa.table(
            cells | {"mito_fraction": mito, "removed_by": pa.array(np.where(mito > 0.1, "max_mito_fraction", None))}
        )
        passes = cells["raw_sum"] >= 500
        pq.write_table(table.filter(passes), folder / "qc_cells.parquet")
        histograms = {
            quantity: {
                outcome: {str(i): int(n) for i, n in enumerate(np.histogram(cells[quantity][mask], EDGES)[0]) if n}
                for outcome, mask in (("min_counts", ~passes), ("kept", passes))
            }
            for quantity in ("raw_sum", "nnz")
        }
        planned = {
            "selection": name,
            "quality": DEMO.corpus.quality.model_dump(),
            "mads": {},
            "histograms": {"edges": EDGES.tolist(), "datasets": {"blood": histograms}},
        }
        (folder / "plan.json").write_text(json.dumps(planned))
        qc.append(folder / "qc.parquet")
        plans.append(folder / "plan.json")
        qc_cells.append(folder / "qc_cells.parquet")
    mapping = {"dataset_id": ["blood"] * 4, "gene": list("ABCD"), "feature_id": ["ENSG1", "ENSG2", None, None]}
    pq.write_table(
        pa.table(
            mapping
            | {"how": ["id", "symbol", "none", "ambiguous"], "n_merged": [1, 1, 0, 0], "counts": [50, 30, 15, 5]}
        ),
        root / "mapping.parquet",
    )
    timings = []
    for rule, jobs in {
        "pretrain": ["scgpt-demo-seed0", "geneformer-demo-seed0"],
        "score": ["annotation-baron_pancreas-baselines"],
        "build_census": [None],
    }.items():
        for i, job in enumerate(jobs):
            path = root / "benchmarks" / (f"{rule}/{job}.tsv" if job else f"{rule}.tsv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f"s\th:m:s\tmax_rss\tcpu_time\n{30.5 * (i + 1)}\t0:00:30\t{'NA' if job is None else 812.5}\t29.1\n"
            )
            timings.append(path)
    rows = score_rows(seeds, methods)
    scores.write(rows, root / "scores.parquet")
    (root / "scores.csv").write_text("run\n")
    config = DEMO.model_copy(update={"run": "test", "seeds": list(seeds)})
    return {
        "scores": root / "scores.parquet",
        "logs": logs,
        "qc": qc,
        "plans": plans,
        "qc_cells": qc_cells,
        "embeddings": embeddings,
        "shards": {"corpus": root / "shards/corpus", "baron_pancreas": root / "shards/baron_pancreas"},
        "vocabulary": root / "vocabulary.parquet",
        "genes_mapping": root / "mapping.parquet",
        "timings": timings,
        "config": config.model_dump(mode="json"),
        "provenance": {
            "commit": "0123456789abcdef",
            "config_hash": "c0ff",
            "versions": {"python": "3.11", "torch": "2.13.0", "snakemake": "9.27.1"},
            "command": "snakemake --cores 2 --configfile config/demo.yaml",
        },
        "out": root / "report" / "index.html",
    }


def written(arguments: dict) -> Page:
    write_report(**arguments)
    return Page(arguments["out"].read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    arguments = make_run(tmp_path_factory.mktemp("run") / "results" / "test", data)
    return arguments, written(arguments)


@pytest.fixture
def bare(run, tmp_path):
    """The same run with its scores alone; returns a function that writes other rows and gives the page."""

    def page(rows: list[dict], **changes) -> Page:
        scores.write(rows, tmp_path / "scores.parquet")
        nothing = {name: [] for name in ("logs", "qc", "plans", "qc_cells", "embeddings", "timings")}
        rest = {
            "scores": tmp_path / "scores.parquet",
            "out": tmp_path / "index.html",
            "shards": {},
            "vocabulary": None,
            "genes_mapping": None,
        }
        return written(run[0] | nothing | rest | changes)

    return page


def test_histograms_show_removed_cells(run):
    """Below the threshold stand the cells that the plan removed; those of the mitochondrial rule have moved."""
    arguments, _ = run
    plan, path = arguments["plans"][0], arguments["qc_cells"][0]
    binned = bin_cells(read_plan(plan), path)
    counts = binned.counts["dataset", "blood"]
    mito = pq.read_table(path).to_pandas()["removed_by"].notna().sum()
    planned = json.loads(plan.read_text())["histograms"]["datasets"]["blood"]
    low = sum(planned["raw_sum"]["min_counts"].values())
    assert min(low, mito) > 0
    for quantity in ("raw_sum", "nnz"):
        assert counts[quantity].sum(axis=1).tolist() == [1500 - low - mito, low + mito]
    below = counts["raw_sum"][:, np.flatnonzero(binned.edges["raw_sum"][1:] < 500)].sum(axis=1)
    assert below[0] == 0
    assert below[1] > 0
    assert counts["mito_fraction"].sum(axis=1).tolist() == [1500 - low - mito, mito]
    assert counts["doublet_score"].sum() == 0
    plan.with_name("old.json").write_text("{}")
    with pytest.raises(CellmillError, match=r"old.json holds no histograms"):
        read_plan(plan.with_name("old.json"))


def test_page_loads_nothing(run):
    page = run[1]
    assert page.loads, "the page has links"
    for tag, value in page.loads:
        assert tag in ("a", "link"), f"<{tag}> loads {value[:80]}"
        assert value.startswith("#") or value in ("../scores.csv", "corpus.html", "data:,")
    for style in page.styles:
        assert "url(" not in style
        assert "@import" not in style
    assert page.html.count("Content-Security-Policy") >= 1
    for _, own in page.scripts[2:]:
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", own)
    specs = json.dumps(page.payload["specs"])
    assert '"url"' not in specs
    assert [kind for kind, _ in page.scripts] == ["application/json", None, None, None], (
        "the charts' library stands there once"
    )


def test_every_figure_has_its_spec_and_data(run):
    arguments, page = run
    figures = re.findall(r'class="chart" id="([^"]+)" data-spec="([^"]+)" data-source="([^"]+)"', page.html)
    assert len(figures) > 15
    assert len({name for name, _, _ in figures}) == len(figures)
    payload = page.payload
    for _, spec, source in figures:
        columns = payload["data"][source]
        lengths = {len(column) for name, column in columns.items() if name != "join"}
        assert len(lengths) == 1
        assert spec in payload["specs"]
        if "join" in columns:
            assert {len(column) for column in payload["data"][columns["join"]].values()} == lengths
    umaps = {source for _, spec, source in figures if spec.startswith("umap-label")}
    assert umaps == {f"umap.baron_pancreas.{name}" for name, (kind, _, _) in METHODS.items() if kind != "control"}


def test_every_score_is_in_the_page(run):
    arguments, page = run
    table = pq.read_table(arguments["scores"])
    lines = page.payload["csv"].splitlines()
    assert len(lines) == table.num_rows + 1
    assert lines[0].replace('"', "").split(",") == table.column_names
    shown = page.payload["table"]
    assert sum(len(values) for values in shown["values"]) == table.num_rows - table["value"].null_count
    nulls = [reason for mean, reason in zip(shown["mean"], shown["reason"], strict=True) if mean is None]
    assert set(nulls) == {"kBET needs two batches per label & <3>", "it follows from the gene's mean"}
    assert set(shown["seen"]) == {"no"}


def test_each_row_names_the_file_that_holds_it(run):
    shown = run[1].payload["table"]
    targets = {
        (task, kind): target.split("/scores/")[1]
        for task, kind, target in zip(shown["task"], shown["kind"], shown["target"], strict=True)
    }
    assert targets["annotation", "baseline"] == "annotation/baron_pancreas/baselines.parquet"
    assert targets["integration", "control"] == "integration/baron_pancreas/controls.parquet"
    assert targets["annotation", "untrained"] in (
        "annotation/baron_pancreas/geneformer-demo.parquet",
        "annotation/baron_pancreas/scgpt-demo.parquet",
    )
    assert targets["pretraining", "baseline"] in (
        "pretraining/corpus/geneformer-demo.parquet",
        "pretraining/corpus/scgpt-demo.parquet",
    )
    assert shown["command"].endswith("--configfile config/demo.yaml --force")


def test_page_says_what_the_run_was(run):
    text = run[1].text
    for said in (
        "cells in baron_pancreas 300",
        "0123456789abcdef",
        "2,000 genes",
        "torch 2.13.0",
        "not mapped",
        "pretrain",
        "max mito fraction",
        "Its genes were not measured",
        "No score was computed",
    ):
        assert said in text, said
    assert "min_counts: 500" in run[1].html


def test_headline_follows_the_numbers(bare):
    swapped = METHODS | {"scgpt-demo": ("model", 0.97, 0.001), "hvg_pca": ("baseline", 0.60, 0.0)}
    one, other = bare(score_rows((0, 1, 2))), bare(score_rows((0, 1, 2), swapped))
    assert "the baseline hvg_pca ranks first of 6" in one.text
    assert "the pretrained model scgpt-demo ranks first of 6" in other.text
    assert "The best pretrained model, scgpt-demo, ranks 3" in one.text
    assert "Pretraining improves it over its untrained twin" in other.text


def test_yardstick_has_a_section_of_its_own(run):
    page = run[1]
    section = page.html.split('<section id="yardstick">')[1].split("</section>")[0]
    table = re.findall(r"<tr><td>.*?</tr>", section, re.DOTALL)
    cells = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row)] for row in table]
    assert [row[0] for row in cells] == [
        "pca_imputation",
        "scgpt-demo",
        "gene_means",
        "geneformer-demo, untrained",
        "geneformer-demo",
        "scgpt-demo, untrained",
    ]
    assert cells[0] == ["pca_imputation", "0.720", "0.520", "0.820"]
    assert cells[2] == ["gene_means", "0.630", "–", "0.730"]
    assert 'title="it follows from the gene' in table[2]
    assert re.fullmatch(r"0\.68\d \[0\.6[78]\d, 0\.68\d\]", cells[1][1])
    assert section.count('class="chart" id="dots-yardstick.corpus"') == 1
    assert len(page.payload["data"]["yardstick.corpus"]["label"]) == 17, "a dot for each method and metric with a value"
    assert page.text.count("ranks first of 6 (Pearson 0.720, the same over 3 seeds)") == 2, "headline and section"
    assert "No pretrained model beats pca_imputation." in page.text
    assert "No pretrained model beats gene_means" not in page.text
    assert "Better than the same network untrained: scgpt-demo." in page.text
    assert "Not better than the same network untrained: geneformer-demo." in page.text
    ranking = page.html.split('<section id="ranking">')[1].split("</section>")[0]
    assert "yardstick" not in ranking.lower()


def test_without_a_yardstick_the_page_says_so(bare):
    page = bare([row for row in score_rows((0, 1)) if row["task"] != "yardstick"])
    assert "there is no common yardstick" in page.text
    assert 'class="chart" id="dots-yardstick' not in page.html


def test_one_seed_has_no_intervals_and_says_so(bare):
    page = bare(score_rows((0,)))
    assert "single seed" in page.text
    assert set(page.payload["table"]["low"]) == {None}
    assert set(page.payload["table"]["standing"]) <= {None, "first", "not tested"}


def test_missing_pieces_are_named(bare):
    text = bare(score_rows((0, 1))).text
    for piece in (
        "no training curves",
        "no UMAPs",
        "No quality-control counts",
        "No vocabulary",
        "run times and memory are unknown",
    ):
        assert piece in text


def test_only_pretraining_scored(bare):
    rows = [row for row in score_rows((0, 1, 2)) if row["task"] == "pretraining"]
    page = bare(rows)
    assert "No task was scored" in page.text
    assert "scgpt-demo: held-out loss" in page.text


def test_nothing_but_nulls(bare):
    rows = [row | {"value": None, "reason": "one <b>label</b>"} for row in score_rows((0, 1))]
    page = bare(rows)
    assert "has no macro-F1 to rank: one <b>label</b>" in page.text


def test_names_are_escaped(bare):
    evil = '<img src=x onerror="alert(1)"></script><script>'
    page = bare(score_rows((0, 1), {evil: ("baseline", 0.5, 0.1)}, datasets=("</title><b>",)))
    assert not [load for load in page.loads if load[0] == "img"]
    assert evil not in page.html
    assert evil in page.payload["table"]["label"]


def test_empty_scores_are_an_error(bare):
    with pytest.raises(CellmillError, match="the score table is empty"):
        bare([])


def test_embedding_of_other_cells_is_an_error(run, tmp_path, bare):
    path = tmp_path / "embed/baron_pancreas/hvg_pca/seed0.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.zeros((7, 4), np.float32))
    path.with_suffix(".json").write_text('{"kind": "baseline"}')
    with pytest.raises(CellmillError, match="holds 7 cells where the shards of baron_pancreas hold 300"):
        bare(score_rows((0,)), embeddings=[path], shards=run[0]["shards"])


def test_failed_write_leaves_the_old_page(run, tmp_path, bare):
    old = tmp_path / "index.html"
    old.write_text("old")
    (tmp_path / "log.parquet").write_bytes(b"half")
    with pytest.raises(CellmillError, match="cannot be read as parquet"):
        bare(score_rows((0,)), logs=[tmp_path / "log.parquet"])
    assert old.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "log.parquet", "scores.parquet"}


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine (apt-get install chromium)")
def test_browser_draws_every_chart_without_an_error(run, tmp_path):
    arguments, page = run
    shown = browse(arguments["out"], tmp_path)
    assert_all_is_drawn(shown, page)
    drawn = Page(shown)
    assert shown.count("<canvas") == sum(
        spec.startswith("umap") for spec in re.findall(r'data-spec="([^"]+)"', page.html)
    )
    assert "0.950 (3 equal)" in drawn.text, "the ranking writes its means"
    assert shown.count('class="row"') == 30, "the table shows its first rows"
