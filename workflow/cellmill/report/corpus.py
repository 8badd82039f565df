"""The corpus page: what was mapped, dropped, duplicated, leaked and kept, before any model is trained."""

import json
from pathlib import Path

import numpy as np

from cellmill.report import composition, genes, inputs, quality, twins
from cellmill.report.render import Figures, share, write_page
from cellmill.shards.dataset import Shards


def write_corpus_page(
    *,
    summaries: list[Path],
    qcs: dict[str, Path],
    qc_cells: dict[str, Path],
    shards: dict[str, Path],
    vocabularies: dict[str, Path],
    mapping: Path | None,
    duplicates: dict[str, Path],
    leaks: dict[str, Path],
    orthologs: Path | None,
    config: dict,
    provenance: dict,
    out: Path,
) -> None:
    """Write the page of the corpora and benchmark data sets of a run.

    Memory does not grow with the number of cells: per-cell tables are read in batches and binned.

    Parameters
    ----------
    summaries
        ``plan.json`` of every selection; corpora are those that `duplicates` names.
    qcs, qc_cells, shards
        ``selections/{cells}/qc.parquet``, ``qc_cells.parquet`` and folders of shards, by selection.
    vocabularies
        ``vocabulary/{organism}.parquet`` by organism.
    mapping
        ``census/genes_mapping.parquet`` of a Census that the run built; None for any other.
    duplicates, leaks
        ``duplicates.parquet`` and ``leaks.parquet`` by corpus.
    orthologs
        ``orthologs.parquet``, if the config names a table.
    config
        The run's validated config as plain data.
    provenance
        ``commit``, ``config_hash`` and ``command`` (how the workflow is called).
    out
        The page, such as ``results/demo/report/corpus.html``.

    Raises
    ------
    CellmillError
        An input cannot be read, or another version wrote it.
    """
    page = Figures()
    plans = {plan["selection"]: plan for plan in map(quality.read_plan, summaries)}
    opened = {name: Shards(folder) for name, folder in shards.items()}
    corpora = list(duplicates)
    removed = {name: quality.read_removed(path) for name, path in qcs.items()}
    mapped = genes.mapping_section(page, mapping)
    found = {name: twins.duplicates_section(page, name, path, config) for name, path in duplicates.items()}
    audits = {name: twins.leaks_section(path) for name, path in leaks.items()}
    selections = []
    for name, plan in plans.items():
        dropped = quality.removed_section(page, name, removed[name])
        seen = quality.distributions(page, name, plan, quality.bin_cells(plan, qc_cells[name]))
        selections.append(
            {
                "name": name,
                "cells": sum(entry.kept for entry in removed[name]),
                "organism": plan["organism"].replace("_", " "),
                "is_corpus": name in corpora,
            }
            | {"dropped": dropped, "distributions": seen, "notes": dropped_notes(plan, removed[name])}
            | {"mads": mad_rows(plan)}
        )
    context = {
        "run": config["run"],
        "headline": headline([plans[name] for name in corpora], [opened[name] for name in corpora], removed, corpora),
        "findings": findings(plans, removed, mapped, found, audits, corpora),
        "facts": facts(plans, opened, corpora),
        "mapping": mapped,
        "selections": selections,
        "duplicates": found,
        "leaks": audits,
        "vocabularies": {
            organism.replace("_", " "): genes.vocabulary_section(path) for organism, path in vocabularies.items()
        },
        "orthologs": orthologs_section(orthologs),
        "splits": split_rows(plans, opened, corpora),
        "mixing": {name: composition.mixing(opened[name]) for name in corpora},
        "compositions": {name: composition.section(page, name, opened[name]) for name in plans},
        "held_out": held_out_rows(plans, corpora),
        "plans": plan_rows(plans, opened),
        "config": json.dumps({"census": config["census"], "corpus": config["corpus"]}, indent=1, ensure_ascii=False),
        "provenance": provenance,
    }
    write_page("corpus.html", ["charts.js"], context, page.payload, out)


def headline(plans: list[dict], opened: list[Shards], removed: dict[str, list], corpora: list[str]) -> str:
    """The corpus in one sentence."""
    selected = sum(entry.selected for name in corpora for entry in removed[name])
    datasets = sum(len([entry for entry in removed[name] if entry.kept]) for name in corpora)
    totals = [shards.manifest["totals"] for shards in opened]
    cells, nonzeros, size = (sum(total[key] for total in totals) for key in ("cells", "nonzeros", "bytes"))
    kept = share(cells / max(selected, 1)).replace(" ", "\u00a0")
    organisms = _listed([plan["organism"].replace("_", " ") for plan in plans])
    return (
        f"The corpus keeps {cells:,} of {selected:,} selected cells ({kept}) from "
        f"{datasets:,} data set{'' if datasets == 1 else 's'} of {organisms}: {in_words(nonzeros)} nonzeros, "
        f"{size / max(nonzeros, 1):.2f} bytes each on disk."
    )


def findings(plans: dict, removed: dict, mapped: dict | None, found: dict, audits: dict, corpora: list[str]) -> list:
    """What a reader should know before training, a sentence each."""
    said = []
    by_rule: dict[str, int] = {}
    for name in corpora:
        for entry in removed[name]:
            for rule, n in entry.by_rule.items():
                by_rule[rule] = by_rule.get(rule, 0) + n
    if by_rule:
        order = sorted(by_rule, key=lambda rule: -by_rule[rule])
        parts = [f"{rule.replace('_', ' ')} ({by_rule[rule]:,})" for rule in order[:4]]
        rest = sum(by_rule[rule] for rule in order[4:])
        parts += [f"the other rules ({rest:,})"] if rest else []
        said.append(f"{sum(by_rule.values()):,} cells were removed: {_listed(parts)}.")
    else:
        said.append("No rule removed a cell.")
    said += [genes.mapping_finding(mapped)]
    said += [f"{_of(name, corpora)}{entry['finding']}" for name, entry in found.items()]
    said += [f"{_of(name, corpora)}{entry['finding']}" for name, entry in audits.items()]
    for name in corpora:
        predicted = plans[name]["predicted"]
        said.append(
            f"{_of(name, corpora)}The plan predicted {in_time(predicted['seconds'])} of work in all and at most "
            f"{predicted['memory_mb']:,.0f} MB of memory for a job."
        )
    return [sentence for sentence in said if sentence]


def _of(name: str, corpora: list[str]) -> str:
    return f"{name}: " if len(corpora) > 1 else ""


def facts(plans: dict, opened: dict[str, Shards], corpora: list[str]) -> list[tuple[str, str]]:
    """The sizes of the run: number and name."""
    found = []
    for name in corpora:
        prefix = f"{name}: " if len(corpora) > 1 else ""
        shards = opened[name]
        found += [(f"{shards.n_cells(split):,}", f"{prefix}{split} cells") for split in shards.splits]
        found.append((f"{shards.n_genes:,}", f"{prefix}genes"))
        found.append((in_bytes(shards.manifest["totals"]["bytes"]), f"{prefix}on disk"))
    for name, shards in opened.items():
        if name not in corpora:
            found.append((f"{sum(shards.n_cells(split) for split in shards.splits):,}", f"cells in {name}"))
    return found


def dropped_notes(plan: dict, removed: list[quality.Removed]) -> list[str]:
    """Sentences on the rules whose numbers need a word: non-count layers, the primary flag, held-out cells."""
    notes = []
    no_counts = [entry for entry in removed if entry.by_rule.get("raw_counts")]
    if no_counts:
        names = _listed([f"{entry.dataset} ({entry.by_rule['raw_counts']:,} cells)" for entry in no_counts[:10]])
        notes.append(f"No raw counts, since sums of a cell's counts are no whole numbers: {names}.")
    not_primary = sorted(
        (entry for entry in removed if entry.by_rule.get("primary_only")),
        key=lambda entry: -entry.by_rule["primary_only"],
    )
    if not_primary:
        n = sum(entry.by_rule["primary_only"] for entry in not_primary)
        selected = sum(entry.selected for entry in removed)
        most = not_primary[0]
        notes.append(
            f"is_primary_data removed {n:,} of {selected:,} selected cells ({share(n / selected)}), most in "
            f"{most.dataset} ({share(most.by_rule['primary_only'] / most.selected)} of its cells). Their primary copy "
            "may lie outside the selection: where a large part of a data set goes, look for it."
        )
    elif not plan["quality"]["primary_only"]:
        notes.append("The primary flag was not asked for: cells that stand in several data sets may be among these.")
    empty = [entry.dataset for entry in removed if not entry.kept and not entry.by_rule.get("held_out")]
    if empty:
        more = f" and {len(empty) - 10:,} more" if len(empty) > 10 else ""
        notes.append(f"No cell is left of these data sets: {', '.join(empty[:10])}{more}.")
    return notes


def mad_rows(plan: dict) -> list[dict]:
    """The limits of `max_mads` by data set and assay, as counts, genes and their ratio."""
    rows = []
    for dataset, assays in (plan.get("mads") or {}).items():
        for assay, limits in assays.items():
            row = {"dataset": dataset, "assay": assay}
            for key in ("log_counts", "log_genes", "complexity"):
                low, high = limits.get(key, (None, None))
                if low is None:
                    row[key] = "–"
                elif key == "complexity":
                    row[key] = f"{low:.3f} to {high:.3f}"
                else:
                    row[key] = f"{max(np.expm1(low), 0):,.0f} to {np.expm1(high):,.0f}"
            rows.append(row)
    return rows


def held_out_rows(plans: dict, corpora: list[str]) -> list[dict]:
    """What never enters a corpus, and for whose sake."""
    return [
        {"corpus": name, "benchmark": benchmark, "datasets": len(datasets), "cells": sum(datasets.values())}
        | {"names": ", ".join(list(datasets)[:6]) + (", ..." if len(datasets) > 6 else "")}
        for name in corpora
        for benchmark, datasets in plans[name]["held_out"].items()
        if datasets
    ]


def split_rows(plans: dict, opened: dict[str, Shards], corpora: list[str]) -> list[dict]:
    """Cells, donors, data sets and shards of every split of the corpora."""
    rows = []
    for name in corpora:
        for split in opened[name].splits:
            files = opened[name].manifest["splits"][split]
            rows.append(
                {"corpus": name, "split": split, "cells": opened[name].n_cells(split)}
                | {"donors": plans[name]["splits"][split]["donors"], "datasets": len(opened[name].datasets(split))}
                | {"shards": len(files), "nonzeros": sum(file["nonzeros"] for file in files)}
            )
    return rows


def plan_rows(plans: dict, opened: dict[str, Shards]) -> list[dict]:
    """What the plan of each selection predicted, and what its shards hold."""
    rows = []
    for name, plan in plans.items():
        totals, predicted = opened[name].manifest["totals"], plan["predicted"]
        rows.append(
            {"name": name, "planned": plan["cells"], "cells": totals["cells"], "nonzeros": totals["nonzeros"]}
            | {"predicted_bytes": in_bytes(predicted["bytes"]), "bytes": in_bytes(totals["bytes"])}
            | {"per_nonzero": f"{totals['bytes'] / max(totals['nonzeros'], 1):.2f}"}
            | {"seconds": in_time(predicted["seconds"]), "memory": f"{predicted['memory_mb']:,.0f} MB"}
            | {"blocks": len(plan["blocks"]), "filter": plan["filter"] or "none"}
        )
    return rows


def orthologs_section(path: Path | None) -> dict | None:
    """How many genes of two vocabularies are orthologs of each other."""
    if path is None:
        return None
    table = inputs.read_table(path, ["organism_a", "gene_a", "organism_b", "gene_b", "one_to_one"])
    organisms = [str(table[f"organism_{side}"].iloc[0]).replace("_", " ") for side in "ab"] if len(table) else ["", ""]
    return {
        "pairs": len(table),
        "one_to_one": int(table["one_to_one"].sum()),
        "organisms": organisms,
        "genes": [int(table[f"gene_{side}"].nunique()) for side in "ab"],
    }


def in_words(n: float) -> str:
    """A large number as it is said: 27.1 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.1f} {word}"
    return f"{n:,.0f}"


def in_bytes(n: float) -> str:
    """A size as it is said: 31.9 MB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:,.0f} bytes"


def in_time(seconds: float) -> str:
    """A time as it is said: 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
