"""How a training run starts: in this process, or in as many as its recipe asks for.

Several ranks are started by torchrun (``torch.distributed.run``), one a machine, which SLURM's ``srun`` starts where
there are several. Each rank is this module with the job's file as its argument. Whatever ends one of them ends all:
torchrun ends the other ranks when one fails, srun the other machines, and the kernel a process whose parent dies.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cellmill
from cellmill.errors import CellmillError
from cellmill.pretrain import pretrain
from cellmill.recipes import ModelRecipe, Training
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import load_statistics
from cellmill.training.parallel import Ranks
from cellmill.vocabulary import Vocabulary

JOB = "job.json"
FIRST_PORT, N_PORTS = 20000, 10000
"""Where the machines of a SLURM job meet: a port by the job's number, below those that systems give out themselves."""
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def train(job: dict) -> None:
    """Pretrain one model, or go on with it, on the ranks that its recipe asks for.

    Parameters
    ----------
    job
        Plain data: ``shards``, ``statistics``, ``vocabulary`` and ``out`` (paths), ``recipe`` (a `ModelRecipe` as a
        dict), ``name``, ``seed`` and ``code`` (the code version).

    Raises
    ------
    CellmillError
        What a rank ended with, or that one was killed.
    """
    training = ModelRecipe.from_dict(job["recipe"]).training
    if training.ranks * training.nodes == 1:
        train_here(job)
    else:
        start(job, training)


def train_here(job: dict) -> None:
    """The run, or one rank of it, in this process; see `train`."""
    vocabulary, out = Vocabulary.read(Path(job["vocabulary"])), Path(job["out"])
    pretrain(
        Shards(job["shards"]),
        load_statistics(job["statistics"], vocabulary.hash),
        ModelRecipe.from_dict(job["recipe"]),
        name=job["name"],
        seed=job["seed"],
        out=out,
        state=out.with_name(f"{out.name}.state"),
        meta={"feature_ids": vocabulary.feature_ids, "code_version": job["code"]},
    )


def start(job: dict, training: Training) -> None:
    """Start all ranks, pass on what the run says to standard error, all else to standard output, and wait for the end.

    The job's file, and the sentence of a rank that fails, lie in ``{out}.ranks`` until then.
    """
    out = Path(job["out"])
    room = out.with_name(f"{out.name}.ranks")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    (room / JOB).write_text(json.dumps(job))
    libraries = [str(Path(cellmill.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, libraries)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(training.threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch's remarks on parameters that the first step does not use
    }
    try:
        process = subprocess.Popen(
            command(room / JOB, training),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal's signals come here, and are passed on once
            preexec_fn=_end_with_parent,
        )
        codes = []
        with _signals_passed_to(process), process.stdout:
            for line in process.stdout:
                print(line, end="", file=sys.stderr if line.startswith(f"{job['name']} seed ") else sys.stdout)
                codes += [int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", line)]
            code = process.wait()
        if code:
            # torchrun may name ranks first that only lost the one that was killed
            killed = [code for code in codes if code < 0 and code != -signal.SIGTERM]
            raise CellmillError(_reason(room, training, [*killed, *codes, code][0]))
    finally:
        shutil.rmtree(room, ignore_errors=True)


def command(job: Path, training: Training) -> list[str]:
    """The command that starts all ranks of a job's file.

    Raises
    ------
    CellmillError
        If there are to be several machines and this is no job of SLURM.
    """
    runner = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={training.ranks}"]
    rank = ["-m", "cellmill.training.launch", str(job)]
    nodes = training.nodes
    if nodes == 1:
        return [*runner, "--standalone", *rank]
    number = os.environ.get("SLURM_JOB_ID")
    if number is None or shutil.which("srun") is None:
        raise CellmillError(
            f"training.nodes is {nodes}, and several machines train together only as a job of SLURM; run the workflow "
            "with --workflow-profile workflow/profiles/slurm, or set training.nodes to 1"
        )
    cpus = training.ranks * training.threads
    # without --nodes and --ntasks srun would start on one machine, which would wait for the others
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    meet = f"{socket.gethostname()}:{FIRST_PORT + int(number) % N_PORTS}"
    together = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={meet}", f"--rdzv-id={number}"]
    return [*step, "--kill-on-bad-exit=1", *runner, *together, *rank]


def _reason(room: Path, training: Training, status: int) -> str:
    """Why the ranks ended: the sentence of the first that had one to say, or how the first one died."""
    said = sorted(room.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if said:
        return said[0].read_text()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return (
        f"one of the {training.ranks * training.nodes} processes that trained together {how}, and the others were "
        "ended; the log of this job holds what they said, and the same command goes on from the last saved state"
    )


@contextmanager
def _signals_passed_to(process: subprocess.Popen) -> Iterator[None]:
    """End the process when this one is told to end, and then this one by the same signal."""
    told = []

    def pass_on(number, _):
        told.append(number)
        process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if told:
            signal.raise_signal(told[0])


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no rank trains on behind another run's back."""
    if _LIBC is not None:
        _LIBC.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main(job: Path) -> None:
    """One rank of a job's file; a `CellmillError` is left beside the file for the process that started all."""
    _end_with_parent()
    try:
        train_here(json.loads(job.read_text()))
    except BaseException as error:
        if isinstance(error, CellmillError):
            (job.parent / f"error-{Ranks.from_environment().rank}.txt").write_text(str(error))
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without waiting for threads that may wait for the other ranks


if __name__ == "__main__":
    main(Path(sys.argv[1]))
