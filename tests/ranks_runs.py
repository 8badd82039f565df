"""Training runs of several ranks on this machine, joined by gloo, without torchrun: children share torch's import."""

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from cellmill.checkpoints import vocabulary_hash
from cellmill.errors import CellmillError
from cellmill.recipes import ModelRecipe
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import compute_statistics, save_statistics
from cellmill.vocabulary import SCHEMA
from small_runs import META, RECIPES, train

N_STEPS = 30
PLAIN = {"dropout": 0.0, "n_layers": 2}
"""Two layers, and no dropout, which is not the same with another number of ranks."""


def start_ranks(context, world: int, function, *arguments) -> list:
    """Processes that call ``function(*arguments)``, each as one rank of `world`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        variables = {name: str(value) for name, value in variables.items()} | {"MASTER_PORT": str(port)}
        processes.append(context.Process(target=_as_rank, args=(variables, function, arguments)))
        processes[-1].start()
    return processes


def _as_rank(variables: dict, function, arguments: tuple) -> None:
    os.environ.update(variables)
    function(*arguments)


def server(*modules: str):
    """A context whose children have imported torch and training already."""
    context = multiprocessing.get_context("forkserver")
    distributed = ["torch.distributed.fsdp", "torch.nn.parallel", "torch._dynamo"]
    context.set_forkserver_preload([*distributed, "pandas", "cellmill.pretrain", *modules])
    return context


def train_ranks(shards: str, name: str, folder: str, world: int, options: dict, steps: int = N_STEPS) -> None:
    """A run of `RECIPES` without dropout, as one of `world` ranks; each notes the cells of its steps in a file.

    ``{folder}/cells-{rank}-of-{world}.txt`` has a line for every step that is begun: its number and the joinids.
    """
    import cellmill.pretrain as module

    RECIPES[name] = replace(RECIPES[name], sizes=RECIPES[name].sizes | PLAIN)
    prepare, notes = module._Run.prepare, Path(folder) / f"cells-{os.environ['RANK']}-of-{world}.txt"

    def noting(run, step):
        prepared = prepare(run, step)
        with notes.open("a") as file:
            file.write(f"{step} {' '.join(map(str, prepared.cells.joinids.tolist()))}\n")
        return prepared

    module._Run.prepare = noting
    training = {"steps": steps, "micro_batch_tokens": 160, "ranks": world} | options
    train(Shards(shards), name, Path(folder) / "out", Path(folder) / "state", **training)


def stopped_ranks(shards: str, name: str, folder: str, world: int, options: dict) -> None:
    """`train_ranks` that is to be stopped: each notes the error and the files beside the state when it leaves.

    The second rank is slow to save.
    """
    import cellmill.training.offending_batch as module

    rank, save = os.environ["RANK"], module.save_batch

    def slow(*arguments):
        time.sleep(float(rank))
        return save(*arguments)

    module.save_batch = slow
    try:
        train_ranks(shards, name, folder, world, options)
    except CellmillError as error:
        left = sorted(path.name for path in Path(folder, "state").glob("*.json"))
        Path(folder, f"left-{rank}.json").write_text(json.dumps([str(error), left]))


def blind_ranks(shards: str, name: str, folder: str, world: int, options: dict) -> None:
    """`train_ranks` whose second rank cannot read the state; each notes the error."""
    import cellmill.pretrain as module

    rank = os.environ["RANK"]
    if rank == "1":
        module.load_state = lambda *_: (None, [])
    try:
        train_ranks(shards, name, folder, world, options)
    except CellmillError as error:
        Path(folder, f"left-{rank}.json").write_text(json.dumps(str(error)))


def cells_of_steps(folder: Path) -> dict[int, list[int]]:
    """The joinids of the cells of every step, those of rank 0 first; the same whoever worked on it, and how often."""
    cells = {}
    for first in sorted(folder.glob("cells-0-of-*.txt")):
        world = int(first.stem.rpartition("-")[2])
        of_ranks = [_noted(folder / f"cells-{rank}-of-{world}.txt") for rank in range(world)]
        for step in set.intersection(*(set(noted) for noted in of_ranks)):
            joinids = [joinid for noted in of_ranks for joinid in noted[step]]
            assert cells.setdefault(step, joinids) == joinids
    return cells


def _noted(path: Path) -> dict[int, list[int]]:
    """What one rank noted: the joinids of each step."""
    noted = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        step, *joinids = map(int, line.split())
        assert noted.setdefault(step, joinids) == joinids  # a step that is done again is the same
    return noted


def losses_of(folder: Path) -> dict[tuple, float]:
    """All that the log holds of losses and gradients, by step, split and metric."""
    rows = pq.read_table(folder / "out/log.parquet").to_pylist()
    return {(row["step"], row["split"], row["metric"]): row["value"] for row in rows if row["split"] != "machine"}


def ended(processes: list) -> list[int]:
    """Wait for processes; their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def kill(processes: list) -> bool:
    """SIGKILL all that still run; whether any did."""
    running = [process for process in processes if process.exitcode is None]
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
    ended(processes)
    return bool(running)


FAILING = '''"""A Geneformer of which one rank fails in its third step, in the way that FAILS names."""

import os
import signal
import threading

from cellmill.errors import CellmillError
from cellmill.models.geneformer import Geneformer


class Failing(Geneformer):
    def forward(self, inputs, *, step=None):
        if step == 3 and os.environ.get("RANK") == "1":
            if os.environ["FAILS"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ["FAILS"] == "refused":
                raise CellmillError("these cells are not fit to be learned from; take others")
            if os.environ["FAILS"] == "stuck":  # an error while a thread waits that nobody will end
                threading.Thread(target=threading.Event().wait).start()
                raise ValueError("a mistake")
        return super().forward(inputs, step=step)


MODEL = Failing
'''


def make_job(folder: Path, shards: Shards, recipe: ModelRecipe) -> dict:
    """A job of `cellmill.training.launch` with all that it reads, beside its results in `folder`."""
    ids = META["feature_ids"]
    genes = [dict.fromkeys(SCHEMA.names) | {"feature_id": feature_id} for feature_id in ids]
    pq.write_table(pa.Table.from_pylist(genes, SCHEMA), folder / "vocabulary.parquet")
    save_statistics(folder / "statistics.safetensors", compute_statistics(shards), vocabulary_hash(ids))
    return {
        "shards": str(shards.folder),
        "statistics": str(folder / "statistics.safetensors"),
        "vocabulary": str(folder / "vocabulary.parquet"),
        "recipe": {key: value for key, value in asdict(recipe).items() if key not in ("embedding", "released")},
        "name": "little",
        "seed": 0,
        "out": str(folder / "seed0"),
        "code": "tests",
    }
