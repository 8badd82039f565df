"""A run of 1,000 steps in 80 % of the memory that it takes by itself: ``micro_batch_tokens: auto`` finds what fits.

How much it takes is learnt from a short run with every step in one micro batch. Then the whole run goes on twice, side
by side, each on a core of its own: without a limit, and with one. Both see the same cells and must come to the same
losses.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Options, Row, at_most, child

STEPS, FEW = 1000, 20
SHARE = 0.8
"""Of the peak, which the limited run may have."""
SIZES = {"n_layers": 4, "width": 32, "n_heads": 2, "hidden": 128, "max_length": 128, "dropout": 0.0}
TRAINING = {
    "batch_size": 128,
    "learning_rate": 3e-4,
    "warmup_steps": 20,
    "validate_every": 500,
    "checkpoint_every": 500,
}
"""Small layers and large batches: what is kept for the backward pass is as much as the process itself."""
WHOLE = {"micro_batch_tokens": 10**6}
SAME = 1e-3
"""Of losses after 1,000 steps whose sums were added in another order, as a share."""


def measure(options: Options) -> list[Row]:
    """Rows of the peak, of the distance of the curves and of the time."""
    from small_runs import make_corpus

    cores = sorted(os.sched_getaffinity(0))
    with TemporaryDirectory(prefix="memory-") as folder, ThreadPoolExecutor(2) as both:
        shards = str(make_corpus(Path(folder) / "corpus", options.data).folder)
        few = {"shards": shards, "sizes": SIZES, "training": TRAINING | WHOLE | {"steps": FEW}}
        limit = SHARE * child("memory.py", few, core=cores[-1])["peak"]
        auto = {"micro_batch_tokens": "auto", "memory_gb": limit / 1e9}
        jobs = [few | {"training": TRAINING | {"steps": STEPS} | how} for how in (WHOLE, auto)]
        plain, limited = both.map(lambda job, core: child("memory.py", job, core=core), jobs, (cores[0], cores[-1]))
    for found in (plain, limited):
        if found["error"]:
            raise RuntimeError(found["error"])
    apart = max(abs(a - b) / abs(b) for a, b in zip(limited["losses"], plain["losses"], strict=True))
    chosen = re.search(r"micro batches of at most [\d,]+ tokens.*", limited["said"])[0]
    losses = f"loss {plain['losses'][0]:.4f} to {plain['losses'][-1]:.4f}, limited to {limited['losses'][-1]:.4f}"
    return [
        Row(
            f"peak of {STEPS} steps in {limit / 1e6:.0f} MB",
            limited["peak"] / 1e6,
            "MB",
            "without a limit",
            plain["peak"] / 1e6,
            at_most(SHARE, "ratio"),
            chosen,
        ),
        Row("peak within the limit", limited["peak"] / limit, "of it", aim=at_most(1.0)),
        Row("loss curves", apart, "largest share apart", aim=at_most(SAME), note=losses),
        Row("time of the run", limited["seconds"], "s", "without a limit", plain["seconds"], note="side by side"),
    ]


if __name__ == "__main__":
    from limited_runs import run

    print(json.dumps(run(**json.loads(sys.argv[1]))))
