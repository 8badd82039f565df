"""The report: one self-contained HTML page, written from the files of a run."""

import hashlib
import json
import re
from pathlib import Path

import jinja2
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import yaml

from cellmill import scores as score_table
from cellmill.census.genes import HOW, mapped_shares
from cellmill.files import atomic
from cellmill.report import charts, inputs, summary
from cellmill.shards.dataset import Shards
from cellmill.vocabulary import Vocabulary

TEMPLATES = Path(__file__).resolve().parents[2] / "report"
TASK_TITLES = {"annotation": "Cell-type annotation", "integration": "Batch integration"}
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
    qc, qc_cells
        ``selections/{cells}/qc.parquet`` and ``qc_cells.parquet``.
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
        ``commit, config_hash, versions`` (package to version), ``command`` (how the workflow is called, such as ``snakemake --cores 2
        --configfile config/demo.yaml``).
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
    page = _Page()
    context = {
        "run": config["run"],
        "organism": config["corpus"]["organism"].replace("_", " "),
        "headlines": _headlines(results),
        "facts": _facts(results, opened),
        "kinds": _kinds(results),
        "rankings": _rankings(page, results),
        "seeds": sorted(table.column("seed").unique().to_pylist()),
        "losses": _losses(page, results),
        "curves": _curves(page, inputs.read_logs(logs), results),
        "umaps": _umaps(page, embeddings, opened, config),
        "splits": _splits(page, opened),
        "quality": _quality(page, qc, qc_cells, config),
        "genes": _genes(vocabulary, genes_mapping),
        "times": _times(page, inputs.read_timings(timings)),
        "provenance": _provenance(opened, config, provenance),
    }
    context["missing"] = _missing(results, context)
    page.payload["table"] = _table(results, scores.parent, provenance["command"])
    page.payload["csv"] = _csv(table)
    page.payload["run"] = config["run"]
    with atomic(out) as temporary:
        temporary.write_text(_render(context, page.payload), encoding="utf-8")


class _Page:
    """What the page's script draws: specs, shared data, figures."""

    def __init__(self):
        self.payload = {"specs": {}, "data": {}}

    def figure(self, spec: str, template: dict, source: str, rows, *, height: int | None = None, **signals) -> dict:
        """Register a figure; `rows` is a list of records, or None where `source` is there already; `height` (px) overrides the spec's."""
        self.payload["specs"].setdefault(spec, template)
        if rows is not None:
            self.payload["data"][source] = _columns(rows)
        return {
            "spec": spec,
            "source": source,
            "signals": signals,
            "id": f"{spec}-{source}",
            "height": height or template["height"],
        }


def _columns(rows: list[dict]) -> dict[str, list]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _to_json(content) -> str:
    """JSON that may stand inside a script element, whatever names it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _render(context: dict, payload: dict) -> str:
    import vl_convert

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["share"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["title_of"] = lambda task: TASK_TITLES.get(task, task.replace("_", " ").capitalize())
    environment.filters["metric"] = summary.metric_name
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["json"] = _to_json
    bundle = vl_convert.javascript_bundle(vl_version=".".join(charts.alt.SCHEMA_VERSION.lstrip("v").split(".")[:2]))
    return environment.get_template("page.html").render(
        **context,
        payload=_to_json(payload),
        bundle=re.sub(r"</(script)", r"<\\/\1", bundle, flags=re.IGNORECASE),
        style=(TEMPLATES / "page.css").read_text(),
        script=(TEMPLATES / "page.js").read_text(),
    )


def _headlines(results: pd.DataFrame) -> list[str]:
    pairs = results[results["task"] != "pretraining"][["task", "dataset"]].drop_duplicates().itertuples(index=False)
    said = [summary.headline(results, *pair) for pair in pairs]
    models = results[(results["task"] == "pretraining") & (results["kind"] == "model")]["model"].unique()
    return said + [line for line in (summary.loss_headline(results, model) for model in models) if line]


def _facts(results: pd.DataFrame, opened: dict[str, Shards]) -> list[tuple[str, str]]:
    facts = []
    if "corpus" in opened:
        corpus = opened["corpus"]
        cells = {split: corpus.n_cells(split) for split in corpus.splits}
        facts.append((f"{cells.pop('train', 0):,}", "cells to train on"))
        facts += [(f"{n:,}", f"{split} cells, held out") for split, n in cells.items()]
        facts.append((f"{corpus.n_genes:,}", "genes"))
    facts += [(f"{shards.n_cells('all'):,}", f"cells in {name}") for name, shards in opened.items() if name != "corpus"]
    facts.append((str(results[results["kind"] == "model"]["model"].nunique()), "pretrained models"))
    facts.append((str(len({seed for seeds in results["seeds"] for seed in seeds})), "seeds"))
    return facts


def _kinds(results: pd.DataFrame) -> list[tuple[str, str]]:
    said = {
        "model": "pretrained model",
        "untrained": "the same network, untrained",
        "baseline": "baseline",
        "control": "control",
        "ceiling": "ceiling",
    }
    return [(kind, said[kind]) for kind in charts.KINDS if kind in set(results["kind"])]


def _dot_rows(rows: pd.DataFrame, names: dict[str, str] | None = None) -> list[dict]:
    """Rows of `charts.dots`: the methods by rank, then controls and ceilings by value; a method without a value has no row."""
    dots = []
    for row in rows[rows["mean"].notna()].to_dict("records"):
        reference = row["kind"] not in summary.RANKED
        interval = summary.Interval(row["n"], row["mean"], row["low"], row["high"], row["deterministic"])
        text = summary.with_interval(interval)
        better = row["mean"] if row["higher_is_better"] else -row["mean"]
        dots.append(
            {
                name: row[name]
                for name in (
                    "kind",
                    "regime",
                    "split",
                    "metric",
                    "mean",
                    "low",
                    "high",
                    "values",
                    "rank",
                    "standing",
                    "cells",
                    "seen",
                )
            }
            | {
                "label": (names or {}).get(row["kind"], row["label"]),
                "reference": reference,
                "order": (1000 - better) if reference else row["rank"],
                "text": text
                + (f" ({row['n']} equal)" if row["deterministic"] else " (one seed)" if row["n"] == 1 else ""),
                "seeds": f"{row['n']}, all the same value" if row["deterministic"] else str(row["n"]),
            }
        )
    return [
        {name: None if value is None or value is pd.NA or value != value else value for name, value in dot.items()}
        for dot in dots
    ]


def _choices(rows: pd.DataFrame, task: str, chosen: tuple[str, str, str]) -> list[dict]:
    """Choosers of a figure: those of regime, split and metric that offer a choice."""
    written = {
        "regime": lambda value: summary.regime_name(task, value),
        "split": lambda value: value.replace("leave_out:", "left out: ").replace("mean", "mean over left-out batches"),
        "metric": summary.metric_name,
    }
    choosers = []
    for name, value in zip(written, chosen, strict=True):
        options = list(dict.fromkeys([value, *rows[name]]))
        if len(options) > 1:
            choosers.append({"name": name, "options": [(option, written[name](option)) for option in options]})
    return choosers


def _rankings(page: _Page, results: pd.DataFrame) -> list[dict]:
    rankings = []
    for (task, dataset), rows in results[results["task"] != "pretraining"].groupby(["task", "dataset"], sort=False):
        chosen = summary.primary(results, task, dataset)
        signals = dict(zip(("regime", "split", "metric"), chosen, strict=True))
        controls = bool((rows["mean"].notna() & ~rows["kind"].isin(summary.RANKED)).any())
        spec = "dots-references" if controls else "dots"
        figure = page.figure(
            spec,
            charts.dots(controls),
            f"{task}.{dataset}",
            _dot_rows(rows),
            height=27 * rows["label"].nunique(),
            **signals,
        )
        higher = rows.groupby("metric")["higher_is_better"].first().to_dict()
        rankings.append(
            {
                "task": task,
                "dataset": dataset,
                "figure": figure,
                "choosers": _choices(rows, task, chosen),
                "controls": controls,
                "higher": {metric: "higher is better" if up else "lower is better" for metric, up in higher.items()},
                "metric": chosen[2],
                "unscored": sorted(set(rows[rows["mean"].isna()]["label"])),
            }
        )
    return rankings


def _losses(page: _Page, results: pd.DataFrame) -> list[dict]:
    rows = results[results["task"] == "pretraining"]
    losses = []
    for model, group in rows.groupby(rows["model"].map(summary.base_name), sort=False):
        chosen = summary.primary(group, "pretraining", group["dataset"].iloc[0])
        names = {"model": "trained", "untrained": "untrained", "baseline": "trivial baseline"}
        signals = dict(zip(("regime", "split", "metric"), chosen, strict=True))
        figure = page.figure(
            "dots",
            charts.dots(references=False),
            f"pretraining.{model}",
            _dot_rows(group, names),
            height=27 * group["kind"].nunique(),
            **signals,
        )
        losses.append(
            {
                "model": model,
                "figure": figure,
                "choosers": _choices(group, "pretraining", chosen),
                "headline": summary.loss_headline(results, model),
            }
        )
    return losses


def _curves(page: _Page, logs: dict[str, pd.DataFrame], results: pd.DataFrame) -> list[dict]:
    curves = []
    trivial = results[(results["task"] == "pretraining") & (results["kind"] == "baseline") & results["mean"].notna()]
    for model, log in logs.items():
        own = trivial[trivial["model"].map(summary.base_name) == model]
        rows = log.to_dict("records") + [
            {"split": "trivial", "metric": row.metric, "value": row.mean} for row in own.itertuples()
        ]
        validated = log[log["split"] == "validation"]["metric"].unique()
        metrics = sorted(log["metric"].unique(), key=lambda name: (name != "loss", name not in validated))
        figure = page.figure("curves", charts.curves(), f"log.{model}", rows, metric=metrics[0])
        curves.append(
            {
                "model": model,
                "figure": figure,
                "seeds": sorted(log["seed"].unique().tolist()),
                "choosers": [{"name": "metric", "options": [(name, summary.metric_name(name)) for name in metrics]}]
                if len(metrics) > 1
                else [],
            }
        )
    return curves


def _umaps(page: _Page, embeddings: list[Path], opened: dict[str, Shards], config: dict) -> list[dict]:
    obs = {name: shards.obs("all") for name, shards in opened.items() if name != "corpus"}
    umaps = []
    for dataset, found in inputs.read_projections(embeddings, obs, config["datasets"]).items():
        page.payload["data"][f"cells.{dataset}"] = found["cells"]
        for panel in found["panels"]:
            page.payload["data"][f"umap.{dataset}.{panel['embedder']}"] = {
                "x": panel.pop("x"),
                "y": panel.pop("y"),
                "join": f"cells.{dataset}",
            }
        grids = []
        for role in ("label", "batch"):
            categories = found[f"{role}_categories"]
            template = charts.umap(categories, role)
            panels = [
                panel
                | {
                    "label": summary.label(panel["embedder"], panel["kind"]),
                    "figure": page.figure(
                        f"umap-{role}-{dataset}", template, f"umap.{dataset}.{panel['embedder']}", None
                    ),
                }
                for panel in found["panels"]
            ]
            colours = charts.CATEGORIES[: len(categories)]
            if charts.OTHER in categories:
                colours = [*charts.CATEGORIES[: len(categories) - 1], charts.REST]
            grids.append(
                {
                    "role": role,
                    "column": config["datasets"][dataset][role],
                    "panels": panels,
                    "legend": list(zip(categories, colours, strict=True)),
                }
            )
        umaps.append({"dataset": dataset, "n_cells": found["n_cells"], "n_shown": found["n_shown"], "grids": grids})
    return umaps


def _splits(page: _Page, opened: dict[str, Shards]) -> dict:
    rows = []
    for name, shards in opened.items():
        for split in shards.splits:
            if not shards.n_cells(split):
                continue
            cells = shards.obs(split, ["dataset_id"])["dataset_id"].to_pandas().value_counts()
            part = {"split": split if name == "corpus" else "benchmark", "order": shards.splits.index(split)}
            rows += [part | {"dataset": dataset, "cells": int(n)} for dataset, n in cells.items() if n]
    if not rows:
        return {"rows": [], "figure": None}
    height = 26 * len({row["dataset"] for row in rows})
    return {"rows": rows, "figure": page.figure("splits", charts.split_bars(), "splits", rows, height=height)}


def _quality(page: _Page, qc: list[Path], qc_cells: list[Path], config: dict) -> list[dict]:
    cells = {path.parent.name: path for path in qc_cells}
    selections = []
    for path in qc:
        name = path.parent.name
        quality = (config["corpus"] if name == "corpus" else config["datasets"][name])["quality"]
        rules, rows = inputs.read_qc(path)
        plots = []
        if name in cells:
            for quantity, histogram in inputs.read_histograms(cells[name], quality).items():
                title, log, _ = inputs.QUANTITIES[quantity]
                thresholds = any("threshold" in row for row in histogram)
                spec = f"histogram{'-log' * log}{'-thresholds' * thresholds}"
                figure = page.figure(spec, charts.histogram(log, thresholds), f"qc.{name}.{quantity}", histogram)
                plots.append({"title": title, "figure": figure})
        selections.append({"name": name, "rules": rules, "rows": rows, "plots": plots})
    return selections


def _genes(vocabulary: Path | None, genes_mapping: Path | None) -> dict:
    genes = {"vocabulary": None, "mapping": [], "ways": HOW}
    if vocabulary is not None:
        words = Vocabulary.read(vocabulary)
        biotypes = pd.Series(words.table["feature_type"].to_pylist()).value_counts()
        genes["vocabulary"] = {
            "n": len(words),
            "hash": words.hash,
            "biotypes": list(biotypes.items()),
            "mitochondrial": int(sum(words.table["is_mitochondrial"].to_pylist())),
        }
    if genes_mapping is not None:
        shares = mapped_shares(inputs.read_table(genes_mapping, ["dataset_id", "how", "gene", "counts"]))
        for dataset, part in shares.groupby("dataset_id", sort=False, observed=True):
            by_way = part.set_index("how")
            genes["mapping"].append(
                {
                    "dataset": dataset,
                    "total": int(part["genes"].sum()),
                    "genes": {way: int(by_way.loc[way, "genes"]) for way in HOW},
                    "lost": float(by_way.loc[["ambiguous", "none"], "count_share"].sum()),
                }
            )
    return genes


def _times(page: _Page, jobs: list[dict]) -> dict:
    rules = []
    for rule, group in pd.DataFrame(jobs, columns=["rule", "job", "seconds", "memory_mb", "cpu_seconds"]).groupby(
        "rule", sort=False
    ):
        rules.append(
            {
                "rule": rule,
                "jobs": len(group),
                "total": group["seconds"].sum(),
                "longest": group["seconds"].max(),
                "memory": group["memory_mb"].max(),
            }
        )
    rules.sort(key=lambda row: -row["total"])
    order = {row["rule"]: i for i, row in enumerate(rules)}
    figures = []
    for name, title in (("seconds", "Seconds per job"), ("memory_mb", "Peak memory per job, MB")):
        rows = [
            {"rule": job["rule"], "job": job["job"], "order": order[job["rule"]], "value": job[name]}
            | {"seconds_text": _duration(job["seconds"]), "memory_text": _megabytes(job["memory_mb"])}
            for job in jobs
            if job[name]
        ]
        if rows:
            figure = page.figure(
                "jobs", charts.jobs(), f"jobs.{name}", rows, height=20 * len({row["rule"] for row in rows})
            )
            figures.append({"title": title, "figure": figure})
    written = [
        row
        | {"total": _duration(row["total"]), "longest": _duration(row["longest"]), "memory": _megabytes(row["memory"])}
        for row in rules
    ]
    return {
        "rules": written,
        "figures": figures,
        "total": _duration(sum(job["seconds"] or 0 for job in jobs)),
        "jobs": len(jobs),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None or pd.isna(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _megabytes(value: float | None) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:,.0f} MB"


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
        "losses": "No held-out loss was scored.",
        "curves": "No training log was given, so there are no training curves.",
        "umaps": "No embeddings were given, so there are no UMAPs.",
        "quality": "No quality-control counts were given.",
    }
    missing += [sentence for key, sentence in said.items() if not context[key]]
    if not context["genes"]["vocabulary"]:
        missing.append("No vocabulary was given.")
    if not context["times"]["rules"]:
        missing.append("No benchmark files were given, so run times and memory are unknown.")
    if (results["seen"] == "yes").any():
        missing.append("Some models saw the benchmark's cells in pretraining; the table marks them.")
    return missing


def _table(results: pd.DataFrame, folder: Path, command: str) -> dict[str, list]:
    """Columns of the page's score table; each row with the file that the command makes again."""
    first = {
        pair: summary.primary(results, *pair)
        for pair in results[["task", "dataset"]].itertuples(index=False, name=None)
    }

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
    return _columns(sorted(records, key=place)) | {"command": f"{command} --force"}


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
