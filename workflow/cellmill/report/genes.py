"""Genes as pages show them: what the genes of a private Census were mapped to, vocabularies, orthologs."""

from pathlib import Path

import pandas as pd

from cellmill.census.genes import HOW, mapped_shares
from cellmill.report import charts, inputs
from cellmill.report.render import Figures, share
from cellmill.vocabulary import Vocabulary

LOST = ("ambiguous", "none")
WAYS = {
    "id": "Ensembl id",
    "symbol": "symbol",
    "alias": "alias",
    "ambiguous": "ambiguous: several ids, so none",
    "none": "not mapped",
}
_COLOURS = ["var(--bar-deep)", "var(--bar)", "var(--bar-pale)", charts.CATEGORIES[1], "var(--removed)"]
MAX_GENES = 12


def mapping_section(page: Figures, path: Path | None) -> dict | None:
    """How the genes of every input file found their ids, the files that lost most counts first."""
    if path is None:
        return None
    mapping = inputs.read_table(path, ["dataset_id", "gene", "how", "counts"])
    shares = mapped_shares(mapping)
    files = []
    for dataset, part in shares.groupby("dataset_id", sort=True):
        by_way = part.set_index("how")
        lost = by_way.loc[list(LOST)]
        files.append(
            {
                "dataset": dataset,
                "total": int(part["genes"].sum()),
                "ways": [(int(by_way.loc[way, "genes"]), float(by_way.loc[way, "count_share"])) for way in HOW],
                "gene_shares": by_way["gene_share"].to_dict(),
                "lost_genes": float(lost["gene_share"].sum()),
                "lost": float(lost["count_share"].sum()),
            }
        )
    files.sort(key=lambda entry: (-entry["lost"], -entry["lost_genes"]))
    bars = [
        {"dataset": entry["dataset"], "place": place, "how": way, "order": order, "genes": genes}
        | {"gene_share": round(entry["gene_shares"][way], 6), "count_share": round(count_share, 6)}
        for place, entry in enumerate(files)
        for order, (way, (genes, count_share)) in enumerate(zip(HOW, entry["ways"], strict=True))
        if genes
    ]
    colours = dict(zip(HOW, _COLOURS, strict=True))
    figure = page.figure("mapping", charts.mapping_bars(colours), "mapping", bars, height=22 * len(files))
    unmapped = mapping[mapping["how"].isin(LOST) & (mapping["counts"] > 0)].copy()
    totals = mapping.groupby("dataset_id", observed=True)["counts"].sum()
    unmapped["share"] = unmapped["counts"] / unmapped["dataset_id"].map(totals).astype(float)
    worst = unmapped.sort_values("share", ascending=False, kind="stable").head(MAX_GENES)
    return {
        "files": files,
        "ways": [(way, WAYS[way]) for way in HOW],
        "legend": [(WAYS[way], colours[way]) for way in HOW],
        "figure": figure,
        "worst_genes": [
            {"gene": row.gene, "dataset": row.dataset_id, "how": WAYS[row.how], "share": float(row.share)}
            for row in worst.itertuples()
        ],
    }


def mapping_finding(mapping: dict | None) -> str | None:
    """The mapping in one sentence."""
    if mapping is None:
        return None
    files, worst = mapping["files"], mapping["files"][0]
    genes = sum(entry["total"] for entry in files)
    lost = sum(entry["ways"][i][0] for entry in files for i, (way, _) in enumerate(mapping["ways"]) if way in LOST)
    plural = "s" if len(files) > 1 else ""
    said = (
        f"Of {genes:,} input genes of {len(files)} file{plural}, {lost:,} ({share(lost / genes)}) found no Ensembl id"
    )
    if worst["lost"] == 0:
        return f"{said}; they held no count."
    where = f"; {worst['dataset']} lost most with them," if len(files) > 1 else ", which held"
    return f"{said}{where} {share(worst['lost'])} of its counts."


def vocabulary_section(path: Path) -> dict:
    """Number of genes of a vocabulary, by biotype and of special kinds, and its hash."""
    words = Vocabulary.read(path)
    biotypes = pd.Series(words.table["feature_type"].to_pylist()).value_counts()
    kinds = {}
    for column, kind in (("is_mitochondrial", "mitochondrial"), ("is_ribosomal", "of ribosomal proteins")):
        kinds[kind] = int(sum(filter(None, words.table[column].to_pylist())))
    return {"n": len(words), "hash": words.hash, "biotypes": list(biotypes.items()), "kinds": list(kinds.items())}
