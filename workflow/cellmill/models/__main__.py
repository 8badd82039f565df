"""``python -m cellmill.models [--json]``: every architecture and preset, with its number of parameters.

Models are built on torch's meta device, without memory. Published presets are counted at their published vocabulary,
the others at ``--genes`` genes.
"""

import argparse
import json

import torch

from cellmill.models import architectures, load_architecture
from cellmill.models.base import parameter_counts


def catalogue(n_genes: int) -> list[dict]:
    """One row for each preset: architecture, preset, genes, parameters (total and without_embeddings)."""
    rows = []
    for name in architectures():
        model_class = load_architecture(name)
        for preset, sizes in model_class.presets.items():
            genes = model_class.published_genes.get(preset, n_genes)
            with torch.device("meta"):
                categories = model_class.published_categories.get(preset)
                counts = parameter_counts(model_class(sizes, genes, categories=categories))
            rows.append({"architecture": name, "preset": preset, "genes": genes, **counts})
    return rows


def main() -> None:
    """Print the catalogue as a table, or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m cellmill.models", description="List architectures and presets.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--genes", type=int, default=20_000, help="vocabulary of presets that are not published ones")
    options = parser.parse_args()
    rows = catalogue(options.genes)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'architecture':14}{'preset':14}{'genes':>8}{'parameters':>14}{'without embeddings':>20}")
    for row in rows:
        print(
            f"{row['architecture']:14}{row['preset']:14}{row['genes']:8,}{row['total']:14,}{row['without_embeddings']:20,}"
        )


if __name__ == "__main__":
    main()
