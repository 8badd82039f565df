"""The report: one self-contained HTML page, written from the files of a run."""

import hashlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import yaml

from cellmill import scores as score_table
from cellmill.report import genes, inputs, sections, summary, training
from cellmill.report.render import Figures, columns, write_page
from cellmill.shards.dataset import Shards

KEY_PACKAGES = [
    "python",
    "cellmill",
    "torch",
    "numpy",
    "pyarrow",
    "scanpy",
    "anndata",
    "tiledbsoma",
    "cellxgene-census",
    "scib-metrics",
    "snakemake",
]


def write_report(
    *,
    scores: Path,
    logs: list[Path],
    qc: list[Path],
    plans: list[Path],
    qc_cells: list[Path],
    embeddings: list[Path],
    shards: dict[str, Path],
    vocabulary: Path | None,
    genes_mapping: Path | None,
    timings: list[Path],
    config: dict,
    provenance: dict,
    out: Path,
) -> None:
    """Write the report of a run; pieces that are missing are named on the page.

    Parameters
    ----------
    scores
        ``scores.parquet``; ``scores.csv`` is expected beside it, for the page's link.
    logs
        ``pretrain/{model}/seed{seed}/log.parquet``.
    qc, plans, qc_cells
        ``selections/{cells}/qc.parquet``, ``plan.json`` and ``qc_cells.parquet``.
    embeddings
        ``embed/{cells}/{embedder}/seed{seed}.npy``, each with its ``.json``.
    shards
        Folders of shards by name: ``corpus`` and every benchmark data set.
    vocabulary, genes_mapping
        ``vocabulary.parquet``; ``census/genes_mapping.parquet`` of a private Census, None for the public one.
    timings
        Snakemake's benchmark files ``benchmarks/{rule}/{job}.tsv``, a name without a folder standing for its rule.
    config
        The run's validated config as plain data (`cellmill.config.Config.model_dump(mode="json")`).
    provenance
        ``commit, config_hash, versions`` (package to version), ``command`` (how the workflow is called, such as
        ``snakemake --cores 2 --configfile config/demo.yaml``).
    out
        The page, such as ``results/demo/report/index.html``.

    Raises
    ------
    CellmillError
        If the score table is empty, an input cannot be read, or inputs contradict each other.
    """
    table = score_table.read(scores)
    results = summary.summarise(table.to_pandas())
    opened = {name: Shards(folder) for name, folder in shards.items()}
    page = Figures()
    context = {
        "run": config["run"],
        "organism": ", ".join(config["corpus"]["organisms"]).replace("_", " "),
        "headlines": sections.headlines(results),
        "facts": sections.facts(results, opened),
        "kinds": sections.kinds(results),
        "rankings": sections.rankings(page, results),
        "yardstick": sections.yardstick(page, results),
        "seeds": sorted(table.column("seed").unique().to_pylist()),
        "losses": sections.losses(page, results),
        "curves": sections.curves(page, inputs.read_logs(logs), results),
        "speeds": training.speeds(logs),
        "umaps": sections.umaps(page, embeddings, opened, config),
        "splits": sections.splits(page, opened),
        "quality": sections.qc(page, qc, plans, qc_cells),
        "vocabulary": genes.vocabulary_section(vocabulary) if vocabulary is not None else None,
        "mapping": genes.mapping_section(page, genes_mapping),
        "times": sections.times(page, inputs.read_timings(timings)),
        "provenance": _provenance(opened, config, provenance),
    }
    context["missing"] = _missing(results, context)
    page.payload["table"] = _table(results, scores.parent, provenance["command"])
    page.payload["csv"] = _csv(table)
    page.payload["metrics"] = {metric: summary.metric_name(metric) for metric in results["metric"].unique()}
    page.payload["run"] = config["run"]
    write_page("page.html", ["charts.js", "page.js"], context, page.payload, out)


def _provenance(opened: dict[str, Shards], config: dict, provenance: dict) -> dict:
    versions = provenance["versions"]
    known = {name.lower().replace("_", "-"): (name, version) for name, version in versions.items()}
    manifests = []
    for name, shards in opened.items():
        digest = hashlib.sha256((shards.folder / "manifest.json").read_bytes()).hexdigest()
        totals = shards.manifest["totals"]
        manifests.append(
            {"name": name, "sha256": digest, "vocabulary": shards.vocabulary_hash, "census": shards.manifest["census"]}
            | totals
        )
    return {
        "commit": provenance["commit"],
        "config_hash": provenance["config_hash"],
        "command": provenance["command"],
        "key_versions": [known[name] for name in KEY_PACKAGES if name in known],
        "versions": list(versions.items()),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        "manifests": manifests,
    }


def _missing(results: pd.DataFrame, context: dict) -> list[str]:
    """What a reader may look for and will not find."""
    missing = []
    if not context["rankings"]:
        missing.append("No task was scored, so there is no ranking.")
    if results["n"].max() < 2:
        missing.append(
            "Every score comes from a single seed, so there are no intervals and no difference can be tested."
        )
    nulls = int(results["mean"].isna().sum())
    if nulls:
        missing.append(f"{nulls} of {len(results)} scores have no value; the table below gives each one's reason.")
    said = {
        "yardstick": "No model was asked for hidden genes, so there is no common yardstick.",
        "losses": "No held-out loss was scored.",
        "curves": "No training log was given, so there are no training curves.",
        "umaps": "No embeddings were given, so there are no UMAPs.",
        "quality": "No quality-control counts were given.",
    }
    missing += [sentence for key, sentence in said.items() if not context[key]]
    if not context["vocabulary"]:
        missing.append("No vocabulary was given.")
    if not context["times"]["rules"]:
        missing.append("No benchmark files were given, so run times and memory are unknown.")
    if (results["seen"] == "yes").any():
        missing.append("Some models saw the benchmark's cells in pretraining; the table marks them.")
    return missing


def _table(results: pd.DataFrame, folder: Path, command: str) -> dict[str, list]:
    """Columns of the page's score table; each row with the file that the command makes again."""
    pairs = results[["task", "dataset"]].drop_duplicates().itertuples(index=False, name=None)
    first = {pair: summary.primary(results, *pair) for pair in pairs}

    def place(row: dict) -> tuple:
        """Each task's first choice of regime, split and metric before the others, then by rank."""
        regime, split, metric = first[row["task"], row["dataset"]]
        others = (row["regime"] != regime, row["split"] != split, row["metric"] != metric)
        rank = float("inf") if row["rank"] is None else row["rank"]
        return (row["task"], row["dataset"], *others, row["regime"], row["split"], row["metric"], rank)

    names = [
        "task",
        "dataset",
        "regime",
        "split",
        "metric",
        "label",
        "kind",
        "mean",
        "scaled",
        "low",
        "high",
        "n",
        "deterministic",
        "rank",
        "of",
    ]
    names += ["standing", "seen", "reason", "cells", "seconds", "values", "seeds", "higher_is_better", *summary.TRACES]
    records = results[names].astype(object).where(results[names].notna(), None).to_dict("records")
    for record, model in zip(records, results["model"], strict=True):
        record["target"] = _score_file(folder, record, model)
        record["scaled"] = record["scaled"].mean if record["scaled"] else None
    return columns(sorted(records, key=place)) | {"command": f"{command} --force"}


def _score_file(folder: Path, record: dict, model: str) -> str:
    shared = {"baseline": "baselines", "control": "controls", "ceiling": "controls"}
    method = (
        summary.base_name(model)
        if record["task"] == "pretraining"
        else shared.get(record["kind"], summary.base_name(model))
    )
    return str(folder / "scores" / record["task"] / record["dataset"] / f"{method}.parquet")


def _csv(table) -> str:
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(table, sink)
    return sink.getvalue().to_pybytes().decode()
