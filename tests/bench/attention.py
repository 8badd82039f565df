"""Attention within packed cells, every way that a CPU can run, against torch's SDPA over a padded matrix.

One layer's attention of 12 heads of width 64 (the base presets'), of cells of one length and of real cells of mixed
lengths, on one core. CPU milliseconds a cell, the least of several turns, the ways taking turns.
"""

import json
import sys
import time
from pathlib import Path

from harness import Options, Row, at_most, child, failure, last_core

N_HEADS, WIDTH = 12, 64
LENGTHS = {"256": [256] * 4, "512": [512] * 3, "1,024": [1024] * 2}
REAL, LIMIT = "tenx_pbmc1k_v2", 1199
"""Cells whose expressed genes are the mixed lengths, cut where scGPT cuts them."""
WAYS = ("padded", "sdpa", "cells", "reference")
TURNS = 9


def milliseconds(lengths, dtype: str) -> dict[str, dict[str, float]]:
    """Of a cell, by pass and way; "chosen" is the way that `attend` takes."""
    import numpy as np
    import torch
    from cellmill.models.attention import attend, attention_backend
    from cellmill.models.packing import Packing

    torch.set_num_threads(1)
    layout = Packing().layout(np.array(lengths))
    kind = getattr(torch, dtype)
    qkv = torch.randn(layout.n_slots, 3, N_HEADS, WIDTH, dtype=kind).requires_grad_()
    gradient = torch.randn(layout.n_slots, N_HEADS * WIDTH, dtype=kind)
    best = {name: {} for name in ("forward", "forward and backward")}
    for _ in range(TURNS):
        for way in (*WAYS, "chosen"):
            for name, times in best.items():
                backward = name != "forward"
                with attention_backend(None if way == "chosen" else way), torch.set_grad_enabled(backward):
                    started = time.process_time()
                    context = attend(*qkv.unbind(1), layout)
                    if backward:
                        torch.autograd.grad(context, qkv, gradient)
                    taken = 1000 * (time.process_time() - started) / len(lengths)
                times[way] = min(times.get(way, taken), taken)
    return best


def real_lengths(data: Path) -> list[int]:
    """Expressed genes of eight cells, evenly spread."""
    import numpy as np
    from shard_cells import real_cells

    cells, _ = real_cells(data, REAL)
    lengths = np.sort(np.minimum(np.diff(cells.offsets), LIMIT))
    return lengths[np.linspace(0, len(lengths) - 1, 8).astype(int)].tolist()


def measure(options: Options) -> list[Row]:
    """Rows of each type, length, pass and way."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        try:
            found = child("attention.py", str(options.data), dtype, core=last_core())
        except RuntimeError as error:
            rows.append(failure(dtype, error))
            continue
        for lengths, passes in found.items():
            for name, times in passes.items():
                what = f"{dtype}, {lengths}, {name}"
                for way in (*WAYS[1:], "chosen"):
                    aim = at_most(1.0, "ratio") if way == "chosen" else None
                    rows.append(Row(f"{what}: {way}", times[way], "ms a cell", "padded", times["padded"], aim))
                rows.append(Row(f"{what}: chosen", times["chosen"], "ms a cell", "sdpa", times["sdpa"]))
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    cut = {**LENGTHS, "mixed": real_lengths(Path(sys.argv[1]))}
    print(json.dumps({name: milliseconds(lengths, sys.argv[2]) for name, lengths in cut.items()}))
