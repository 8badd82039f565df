"""Training runs whose memory is limited, each a process of its own; prints losses, peak and what the run said."""

import contextlib
import io
import json
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import torch._dynamo  # noqa: F401  torch.optim imports it at first use
from cellmill.errors import CellmillError
from cellmill.shards.dataset import Shards
from cellmill.training import memory
from small_runs import RECIPES, train

SIZES = {"n_layers": 4, "width": 64, "n_heads": 2, "hidden": 256, "max_length": 256, "dropout": 0.0}


def run(shards: str, sizes: dict, training: dict, addresses: int | None = None, blind: bool = False) -> dict:
    """One run: its log's losses, peak resident bytes, addresses that it took, the lines that it said, and its error if
    it ended in one.

    `addresses` are bytes that the process may take from here on (RLIMIT_AS); `blind` lets ``auto`` begin with the whole
    batch, whatever fits.
    """
    if blind:
        memory.choose_tokens = lambda *_, **__: memory.Choice(10**6, "chosen blindly")
    before = memory._status("VmSize")
    if addresses:
        resource.setrlimit(resource.RLIMIT_AS, (before + addresses,) * 2)
        memory.save_addresses()
    RECIPES["geneformer"] = replace(RECIPES["geneformer"], sizes=sizes)
    said, found = io.StringIO(), {"error": None, "losses": [], "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
        out = Path(folder) / "out"
        try:
            train(Shards(shards), "geneformer", out, Path(folder) / "state", **training)
            rows = pq.read_table(out / "log.parquet").to_pylist()
            of_steps = [row for row in rows if row["split"] == "train" and row["metric"] == "loss"]
            found |= {"losses": [row["value"] for row in of_steps], "seconds": rows[-1]["seconds"]}
        except CellmillError as error:
            found["error"] = str(error)
    return found | {
        "peak": memory._status("VmHWM"),
        "addresses": memory._status("VmPeak") - before,
        "said": said.getvalue(),
    }


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
