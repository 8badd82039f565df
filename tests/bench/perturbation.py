"""In-silico perturbations per second: in batches over cells and genes, against one forward pass for each.

A Geneformer of V1-10M's size with random weights, on real cells of the demo; one core, or the GPU where there is one.
Both sides give the same shifts, of the same genes.
"""

import json
import sys
from pathlib import Path

from harness import ROOT, Options, Row, at_least, child, last_core, measured

CELLS = ROOT / "results" / "demo" / "shards" / "baron_pancreas"
N_CELLS = {"cpu": 6, "cuda": 64}
N_RANDOM = {"cpu": 4, "cuda": 32}
ROUNDS = 3


def measure(options: Options) -> list[Row]:
    """Perturbations per second, the best of `ROUNDS`."""
    found = child("perturbation.py", str(CELLS), core=last_core())
    rows = []
    for peer in ("as released", "layers that are read"):
        one = found[peer]
        note = f"{found['perturbations']} deletions, {found['tokens']:,.0f} tokens a cell, {found['device']}; CPU "
        note += f"seconds {found['batched']['cpu']:.1f} against {one['cpu']:.1f}; shifts differ by {one['differs']:.1e}"
        aim = at_least(1.3, "ratio") if peer == "as released" else None  # on a CPU, batches alone bring little
        rates = (found["perturbations"] / part["seconds"] for part in (found["batched"], one))
        rows.append(Row("perturbations", next(rates), "per second", f"one by one, {peer}", next(rates), aim, note))
    return rows


def compare(folder: Path) -> dict:
    """Seconds of both sides, in turns, and how far their shifts lie apart."""
    import numpy as np
    import torch
    from cellmill.abilities.perturbation import perturb
    from cellmill.device import best_device, use_threads
    from cellmill.models.geneformer import Geneformer
    from cellmill.shards.dataset import Shards
    from cellmill.shards.statistics import compute_statistics

    use_threads(1)
    device, shards = best_device(), Shards(folder)
    torch.manual_seed(0)
    model = Geneformer(Geneformer.presets["v1-10m"], shards.n_genes, compute_statistics(shards, "all"))
    model.to(device).eval()
    cells = next(shards.batches("all", N_CELLS[device.type]))
    best = {}
    for _ in range(ROUNDS):
        with measured() as batched:
            table = perturb(model, cells, "delete", np.array([]), n_random=N_RANDOM[device.type], progress=False)
        _keep(best, "batched", batched)
        for name in ("as released", "layers that are read"):
            with measured() as single:
                shifts = _one_by_one(model, cells, table, whole=name == "as released")
            differs = float(np.abs(shifts - table["cell_shift"].to_numpy()).max())
            _keep(best, name, single | {"differs": differs})
    about = {"perturbations": len(table), "tokens": float(cells.lengths.mean()), "device": str(device)}
    return best | about


def _one_by_one(model, cells, table, whole: bool):
    """Cosine shifts, one forward pass each; `whole`: of all layers and of the head that names genes, as released."""
    import numpy as np
    import torch
    from cellmill.models.packing import PACKED

    device = next(model.parameters()).device
    depth, shifts, before = model.sizes.n_layers - 1, [], {}

    def states(tokens_L):
        layout = PACKED.layout([len(tokens_L)]).to(device)
        x_LD = model.encode(tokens_L.to(device), layout, depth)
        if whole:
            model.name(model.layers[-1](x_LD, layout))
        return x_LD

    with torch.inference_mode():
        for joinid, gene in zip(table["joinid"].to_pylist(), table["gene"].to_pylist(), strict=True):
            if joinid not in before:
                tokens_L = model.embed_inputs(cells.take(np.flatnonzero(cells.joinids == joinid)))["tokens"]
                before[joinid] = tokens_L, states(tokens_L)
            tokens_L, before_LD = before[joinid]
            kept_L = tokens_L != gene + model.n_specials
            after_D, before_D = states(tokens_L[kept_L]).mean(0), before_LD[kept_L.to(device)].mean(0)
            shifts.append(1 - torch.cosine_similarity(after_D, before_D, dim=0).item())
    return np.array(shifts)


def _keep(best: dict, name: str, figures: dict) -> None:
    if name not in best or figures["seconds"] < best[name]["seconds"]:
        best[name] = figures


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
