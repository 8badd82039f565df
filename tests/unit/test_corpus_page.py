"""The corpus page on the demo's cells, curated for real: what it says, what it counts, that it stays small."""

import json
import re

import corpus_runs
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cellmill.config import DEMO, Quality
from cellmill.doublets import score_doublets
from cellmill.duplicates import COMPARED, DUPLICATES_SCHEMA, LEAKS_SCHEMA, audit_leaks, find_duplicates
from cellmill.errors import CellmillError
from cellmill.qc import RULES
from cellmill.report import composition, corpus, quality, twins
from cellmill.report.corpus import write_corpus_page
from cellmill.report.render import Figures
from cellmill.shards.curate import QC_SCHEMA
from cellmill.shards.dataset import Shards
from report_pages import Page, assert_all_is_drawn, browse, chromium

BENCHMARK = "baron_pancreas"
SELECTION = corpus_runs.corpus(
    blocks=2, quality=Quality(max_mito_fraction=0.1, max_doublet_score=0.15, min_counts=2000, max_mads=3)
)


@pytest.fixture(scope="module")
def run(demo_census, tmp_path_factory):
    """The corpus phase of the demo with every rule at work; the arguments of `write_corpus_page` and its page."""
    root, soma = tmp_path_factory.mktemp("corpus"), demo_census.soma
    folders = {"corpus": root / "corpus", BENCHMARK: root / BENCHMARK}
    genes = folders["corpus"] / "vocabulary.parquet"
    corpus_runs.plan(soma, folders["corpus"], SELECTION, benchmarks={BENCHMARK: corpus_runs.PANCREAS})
    corpus_runs.vocabulary(soma, folders["corpus"], SELECTION)
    scores = folders["corpus"] / "doublets.parquet"
    score_doublets(
        corpus_runs.census_of(soma),
        soma,
        plan=folders["corpus"] / "plan.parquet",
        block=0,
        blocks=1,
        organism=corpus_runs.ORGANISM,
        seed=0,
        out=scores,
    )
    for block in range(SELECTION.blocks):
        corpus_runs.curate(soma, folders["corpus"], block, SELECTION, genes, doublets=(scores,))
    corpus_runs.mill_benchmark(soma, folders[BENCHMARK], BENCHMARK, corpus_runs.PANCREAS, genes)
    prints = [folders["corpus"] / f"{block}.prints.parquet" for block in range(SELECTION.blocks)]
    duplicates, leaks = folders["corpus"] / "duplicates.parquet", folders["corpus"] / "leaks.parquet"
    find_duplicates(prints, out=duplicates)
    benchmark = {BENCHMARK: [folders[BENCHMARK] / "0.prints.parquet"]}
    audit_leaks({"corpus": prints}, benchmark, action="fail", out=leaks)
    corpus_runs.shuffle_and_join(folders["corpus"], SELECTION.blocks, genes)
    config = DEMO.model_copy(update={"run": "test", "corpus": SELECTION})
    arguments = {
        "summaries": [folder / "plan.json" for folder in folders.values()],
        "qcs": {name: folder / "qc.parquet" for name, folder in folders.items()},
        "qc_cells": {name: folder / "qc_cells.parquet" for name, folder in folders.items()},
        "shards": {name: folder / "shards" for name, folder in folders.items()},
        "vocabularies": {corpus_runs.ORGANISM: genes},
        "mapping": demo_census.mapping,
        "duplicates": {"corpus": duplicates},
        "leaks": {"corpus": leaks},
        "orthologs": None,
        "config": config.model_dump(mode="json"),
        "provenance": {"commit": "0123456789abcdef", "config_hash": "c0ff", "command": "snakemake --cores 2"},
        "out": root / "report" / "corpus.html",
    }
    return arguments, written(arguments)


def written(arguments: dict) -> Page:
    write_corpus_page(**arguments)
    return Page(arguments["out"].read_text())


def test_headline_follows_the_shards(run):
    arguments, page = run
    totals = json.loads((arguments["shards"]["corpus"] / "manifest.json").read_text())["totals"]
    selected = sum(json.loads(arguments["summaries"][0].read_text())["datasets"].values())
    qc = pq.read_table(arguments["qcs"]["corpus"]).to_pylist()
    selected = sum(row["remaining"] for row in qc if row["rule"] == "selected")
    assert selected == 3057
    per_nonzero = totals["bytes"] / totals["nonzeros"]
    assert f"The corpus keeps {totals['cells']:,} of 3,057 selected cells" in page.text
    assert f"{totals['nonzeros'] / 1e6:.1f} million nonzeros, {per_nonzero:.2f} bytes each on disk." in page.text
    assert f"{selected - totals['cells']:,} cells were removed: held out (1,937)" in page.text
    assert "The plan predicted" in page.text
    assert "of homo sapiens" in page.text


def test_rules_and_shares_are_in_the_table(run):
    arguments, page = run
    removed = {}
    for row in pq.read_table(arguments["qcs"]["corpus"]).to_pylist():
        removed[row["rule"]] = removed.get(row["rule"], 0) + row["removed"]
    at_work = [rule for rule in RULES if removed.get(rule)]
    assert {"held_out", "min_counts", "max_mads", "max_mito_fraction", "max_doublet_score"} <= set(at_work)
    for rule in at_work:
        assert f"−{removed[rule]:,} {quality.share(removed[rule] / 3057)}" in page.text
    bars = page.payload["data"]["removed.corpus"]
    cells = dict.fromkeys({*at_work, "kept"}, 0)
    for rule, n in zip(bars["rule"], bars["cells"], strict=True):
        cells[rule.replace(" ", "_")] += n
    assert sum(cells.values()) == 3057
    assert {rule: cells[rule] for rule in at_work} == {rule: removed[rule] for rule in at_work}
    assert "No cell was removed by primary only, raw counts" in page.text
    assert "No rule removed a cell: all 1,937 selected cells are kept." in page.text  # the benchmark


def test_bins_count_every_cell_once(run):
    """Histograms of the page against numpy's, over the per-cell table and the plan."""
    arguments, page = run
    plan = quality.read_plan(arguments["summaries"][0])
    cells = pq.read_table(arguments["qc_cells"]["corpus"]).to_pandas()
    binned = quality.bin_cells(plan, arguments["qc_cells"]["corpus"])
    dataset = "li_cell_lines"
    own = cells[cells["dataset_id"] == dataset]
    for name, edges in binned.edges.items():
        for part, chosen in enumerate((own["removed_by"].isna(), own["removed_by"].notna())):
            expected = np.histogram(own[chosen][name].dropna(), edges)[0]
            if part == 1 and name in plan["histograms"]["datasets"][dataset]:
                for outcome, at in plan["histograms"]["datasets"][dataset][name].items():
                    for place, n in at.items() if outcome != "kept" else ():
                        expected[int(place)] += n
            assert binned.counts["dataset", dataset][name][part].tolist() == expected.tolist(), (name, part)
    assert binned.joint["dataset", dataset].sum() == len(own)
    for name in ("raw_sum", "nnz"):
        everything = page.payload["data"][f"qc.corpus.{name}"]
        shown = [
            kept + removed
            for group, kept, removed in zip(*(everything[key] for key in ("group", "kept", "removed")), strict=True)
            if group == 0 and kept is not None
        ]
        assert sum(shown) == 3057 - 1937  # without those that are held out
    assert ("dataset", BENCHMARK) not in binned.counts


def test_thresholds_are_drawn(run):
    arguments, page = run
    for quantity, rule, value in (
        ("raw_sum", "min counts", 2000),
        ("mito_fraction", "max mito fraction", 0.1),
        ("doublet_score", "max doublet score", 0.15),
    ):
        data = page.payload["data"][f"qc.corpus.{quantity}"]
        assert (rule, value) in set(zip(data["rule"], data["threshold"], strict=True))
    assert "threshold" not in page.payload["data"]["qc.corpus.ribo_fraction"]  # 1 removes nothing
    mads = [rule for rule in page.payload["data"]["qc.corpus.raw_sum"]["rule"] if rule and "max mads" in rule]
    assert mads


def test_thresholds_of_single_assays():
    binned = quality.Binned(np.array([1.0, 10.0, 100.0]))
    binned.assays = {"A": {"10x", "Smart-seq2"}, "B": {"Smart-seq2"}}
    plan = {
        "quality": {"min_counts": 500, "max_counts": None, "per_assay": {"Smart-seq2": {"min_counts": 10_000}}},
        "mads": {"B": {"Smart-seq2": {"log_counts": [np.log(1001), np.log(5001)]}}},
    }

    def limits(kind, name):
        found = quality._limits(quality.QUANTITIES["raw_sum"], plan, binned, [(kind, name)])
        return {(entry["rule"], entry["threshold"]) for entry in found}

    own = ("min counts of Smart-seq2", 10_000)
    assert limits("dataset", "A") == {("min counts", 500), own}
    assert limits("dataset", "B") == {own, ("max mads", 1000.0), ("max mads", 5000.0)}
    assert limits("assay", "Smart-seq2") == {own}
    assert limits("assay", "10x") == {("min counts", 500)}


def test_mapping_worst_first(run):
    arguments, page = run
    mapping = pq.read_table(arguments["mapping"]).to_pandas()
    unmapped = mapping[mapping["how"].isin(["none", "ambiguous"])]
    lost = unmapped.groupby("dataset_id")["counts"].sum() / mapping.groupby("dataset_id")["counts"].sum()
    worst = lost.idxmax()
    assert f"{len(mapping):,} input genes of 3 files, {len(unmapped):,}" in page.text
    assert f"{worst} lost most with them, {quality.share(lost[worst])} of its counts" in page.text
    bars = page.payload["data"]["mapping"]
    assert bars["dataset"][0] == worst
    assert sum(bars["genes"]) == len(mapping)


def test_copies_and_composition(run):
    arguments, page = run
    for said in (
        "No cell has the profile of another one",
        "No benchmark cell is in the corpus, by the profiles of",
        "protein coding",
        "of ribosomal proteins",
        "Selected cells that may never enter a corpus.",
        "Entropy in bits within batches of 64 cells",
        "snakemake --cores 2 corpus",
    ):
        assert said in page.text, said
    cells = composition.count_values(Shards(arguments["shards"]["corpus"]), ("dataset_id", "cell_type"))
    obs = pa.concat_tables(
        [Shards(arguments["shards"]["corpus"]).obs(split, ["dataset_id"]) for split in ("train", "validation")]
    )
    expected = {row["values"]: row["counts"] for row in pc.value_counts(obs["dataset_id"].cast("string")).to_pylist()}
    assert cells["dataset_id"] == expected
    assert sum(cells["cell_type"].values()) == len(obs)


def test_the_shuffle_mixes_as_well_as_chance(run):
    dataset, cell_type = composition.mixing(Shards(run[0]["shards"]["corpus"]))
    assert dataset["column"] == "dataset_id"
    for row in (dataset, cell_type):
        assert row["values"] > 1
        assert row["stored"] == pytest.approx(row["drawn"], rel=0.05)
        assert row["drawn"] <= row["whole"]


def test_entropy_and_quantiles_by_hand():
    assert composition.entropy(np.array([4, 4, 0])) == 1
    assert composition.entropy(np.array([7])) == 0
    edges = np.array([0.0, 10.0, 20.0])
    assert quality._quantiles(np.array([50, 50]), edges) == {"q05": 1, "q25": 5, "q50": 10, "q75": 15, "q95": 19}


def test_duplicates_of_several_data_sets(tmp_path):
    pairs = [("A", "A", 2), ("B", "A", 5), ("C", "A", 1), ("C", "B", 3)]
    rows = [
        {"soma_joinid": i, "dataset_id": a, "kept_joinid": 0, "kept_dataset_id": b, "groups_equal": 8}
        | {"groups_compared": 8}
        for a, b, n in pairs
        for i in range(n)
    ]
    schema = DUPLICATES_SCHEMA.with_metadata({COMPARED: json.dumps({"cells": 200, "not_comparable": 9})})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "duplicates.parquet")
    page = Figures()
    found = twins.duplicates_section(
        page, "corpus", tmp_path / "duplicates.parquet", {"corpus": {"duplicates": "drop"}}
    )
    assert (found["cells"], found["within"], found["across"]) == (11, 2, 9)
    assert found["finding"] == (
        "11 cells are copies of another cell (one of each profile is kept): 2 within a data set, 9 across data sets, "
        "most of them cells of B that are in A; 4.5 % of the cells are too shallow to tell."
    )
    assert page.payload["data"]["duplicates.corpus"]["cells"] == [5, 3, 2, 1]
    kept = twins.duplicates_section(page, "corpus", tmp_path / "duplicates.parquet", {"corpus": {"duplicates": "keep"}})
    assert "all of them are kept" in kept["finding"]


def test_leaks_are_named(tmp_path):
    row = {"soma_joinid": 7, "dataset_id": "thief", "observation_joinid": "x7", "selection": "corpus"}
    row |= {"benchmark": "pancreas", "benchmark_joinid": 1, "benchmark_dataset_id": "baron"}
    compared = {"corpus": {"cells": 90, "not_comparable": 1}, "pancreas": {"cells": 10, "not_comparable": 0}}
    schema = LEAKS_SCHEMA.with_metadata({COMPARED: json.dumps(compared)})
    table = pa.Table.from_pylist([row | {"benchmark_observation_joinid": "b1"}], schema)
    pq.write_table(table, tmp_path / "leaks.parquet")
    found = twins.leaks_section(tmp_path / "leaks.parquet")
    assert found["finding"] == (
        "Cells of the corpus that had the profile of a benchmark's cell, and were left out: 1; 1.0 % of the cells "
        "are too shallow to tell."
    )
    assert found["pairs"][0]["dataset_id"] == "thief"
    assert found["named"][0]["benchmark_observation_joinid"] == "b1"


def test_page_loads_nothing_and_has_all_it_draws(run):
    page = run[1]
    assert all(value.startswith("#") or value == "data:," for _, value in page.loads)
    figures = re.findall(r'class="chart" id="([^"]+)" data-spec="([^"]+)" data-source="([^"]+)"', page.html)
    assert len(figures) > 15
    assert len({name for name, _, _ in figures}) == len(figures)
    for _, spec, source in figures:
        assert spec in page.payload["specs"]
        assert len({len(column) for column in page.payload["data"][source].values()}) == 1
    for _, own in page.scripts[2:]:
        assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(", own)


def many_cells(path, n_datasets: int, cells_each: int) -> dict:
    """A ``qc_cells.parquet`` of made-up cells of many data sets and assays; the plan that it goes with."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, QC_SCHEMA) as writer:
        for number in range(n_datasets):
            counts = np.exp(rng.normal(8 + rng.normal(), 1, cells_each)).astype(np.int64) + 1
            columns = [
                np.arange(cells_each) + number * cells_each,
                pa.array([f"<b>data set {number}"] * cells_each).dictionary_encode(),
                pa.array([f"assay {number % 12}"] * cells_each).dictionary_encode(),
                counts,
                (counts**0.8).astype(np.int64),
                rng.beta(2, 30, cells_each),
                rng.beta(8, 20, cells_each),
                rng.beta(2, 20, cells_each),
                pa.array(np.where(rng.random(cells_each) < 0.1, "max_mito_fraction", None)),
            ]
            writer.write_table(pa.table(columns, schema=QC_SCHEMA))
    edges = (10 ** (np.arange(85) / 12)).tolist()
    return {"quality": Quality().model_dump(), "mads": {}, "histograms": {"edges": edges, "datasets": {}}}


def test_size_does_not_grow_with_cells(tmp_path):
    plan = many_cells(tmp_path / "cells.parquet", 40, 10_000)
    page = Figures()
    shown = quality.distributions(page, "corpus", plan, quality.bin_cells(plan, tmp_path / "cells.parquet"))
    assert (shown["n_shown"], shown["n_datasets"]) == (quality.MAX_DATASETS, 40)
    assert [len(options) for _, options in shown["choices"]] == [1, quality.MAX_DATASETS, quality.MAX_ASSAYS]
    first = page.payload["data"]["qc.corpus.raw_sum"]
    groups = np.array([group for group, kept in zip(first["group"], first["kept"], strict=True) if kept is not None])
    cells = np.array([k + r for k, r in zip(first["kept"], first["removed"], strict=True) if k is not None])
    assert cells[groups == 0].sum() == 400_000
    assert cells[groups == 1].sum() == 10_000
    assert len(json.dumps(page.payload)) < 1_500_000


def test_tables_of_another_version(run, tmp_path):
    arguments, _ = run
    table = pq.read_table(arguments["qc_cells"]["corpus"]).drop_columns(["assay"])
    pq.write_table(table, tmp_path / "old.parquet")
    plan = quality.read_plan(arguments["summaries"][0])
    with pytest.raises(CellmillError, match=r"old.parquet has no column assay; another version wrote it"):
        quality.bin_cells(plan, tmp_path / "old.parquet")
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(CellmillError, match="half.parquet cannot be read for the QC plots"):
        quality.bin_cells(plan, tmp_path / "half.parquet")


def test_notes_on_what_needs_a_word():
    plan = {"quality": {"primary_only": True}}
    removed = [
        quality.Removed("floats", 50, {"raw_counts": 50}, 0),
        quality.Removed("copies", 100, {"primary_only": 80}, 20),
    ]
    counts, primary, empty = corpus.dropped_notes(plan, removed)
    assert "floats (50 cells)" in counts
    assert primary.startswith("is_primary_data removed 80 of 150 selected cells (53.3 %), most in copies (80.0 %")
    assert empty == "No cell is left of these data sets: floats."


CHOOSE = """
<script>
  const timer = setInterval(() => {
    if (document.documentElement.dataset.state !== "ready") return;
    clearInterval(timer);
    const chart = () => document.querySelector('[data-source="qc.corpus.raw_sum"]').innerHTML;
    const before = chart();
    const select = document.querySelector('select[data-signal="group"]');
    select.value = "1";
    select.dispatchEvent(new Event("change"));
    setTimeout(() => { document.documentElement.dataset.chosen = String(chart() !== before); }, 500);
  }, 50);
</script>
"""


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine (apt-get install chromium)")
def test_browser_draws_every_chart_and_chooses(run, tmp_path):
    page = run[1]
    (tmp_path / "corpus.html").write_text(page.html + CHOOSE)
    shown = browse(tmp_path / "corpus.html", tmp_path)
    assert_all_is_drawn(shown, page)
    assert 'data-chosen="true"' in shown
