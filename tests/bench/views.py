"""Tokenised cells per second and core, of each of the five views at its published length (`loader.measure`)."""

import json
import sys
from pathlib import Path

from harness import Options, Row, at_least, child, last_core

AIM = 20_000
ARCHITECTURES = ("geneformer", "scgpt", "scfoundation", "exceiver", "scmulan")


def measure(options: Options) -> list[Row]:
    """Cells and tokens per second of each view alone, and with the loader before it."""
    from corpora import real_corpus

    found = child("views.py", str(real_corpus(options, "protein_coding")), core=last_core())
    raw = next(row["cells_per_second"] for row in found if row["what"] == "loader")
    rows = [Row("loader", raw, "cells/s", note="protein-coding genes, batches of 64, one core")]
    for row in found:
        if row["what"].split(",")[0] not in ARCHITECTURES:
            continue
        cells, by_cpu = row["cells_per_second"], row["cells_per_cpu_second"]
        tokens = row["genes_per_cpu_second"] * cells / by_cpu
        both = 1 / (1 / cells + 1 / raw)
        note = f"{by_cpu:,.0f} cells/CPU s; {both:,.0f} cells/s with the loader before it"
        rows.append(Row(row["what"], cells, "cells/s", "aim", AIM, at_least(1, "ratio"), note))
        rows.append(Row(row["what"], tokens, "tokens/s"))
    return rows


if __name__ == "__main__":
    import loader
    from cellmill.shards.dataset import Shards

    print(json.dumps(loader.measure(Shards(Path(sys.argv[1])), batch_size=64)))
