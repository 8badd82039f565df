"""What every benchmark shares: rows, one table, JSON files, measured child processes, and the machine they ran on."""

import datetime
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PINS = ROOT / "envs" / "bench.txt"
HANGS = 3600
"""Seconds after which a child is taken to hang."""
COLD = "cold: posix_fadvise(DONTNEED) on every file of the data"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes
    ----------
    cells
        Cells of the large Census.
    seconds
        How long each measurement of a rate goes on.
    peers
        Python of the environment with the peers.
    folder
        Where JSON files and cached data go.
    data
        CELLMILL_DATA.
    """

    cells: int
    seconds: float
    peers: Path
    folder: Path
    data: Path


@dataclass(frozen=True)
class Aim:
    """What a row should reach: its value or its ratio, at least or at most so much."""

    of: Literal["value", "ratio"]
    sign: Literal[">=", "<="]
    bound: float

    def met(self, value: float | None, ratio: float | None) -> bool:
        """Whether the row reaches it; what could not be computed does not."""
        number = value if self.of == "value" else ratio
        if number is None or not math.isfinite(number):
            return False
        return number >= self.bound if self.sign == ">=" else number <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:,g}{' x' if self.of == 'ratio' else ''}"


@dataclass(frozen=True)
class Row:
    """One figure, and what it is held against.

    Attributes
    ----------
    what
        What was measured.
    ours
        Its value; None where the part failed.
    unit
        Of `ours` and `theirs`.
    peer, theirs
        Name and value of the peer or of the limit.
    aim
        What should hold; None where nothing was promised.
    note
        Settings, or why the part failed.
    """

    what: str
    ours: float | None
    unit: str
    peer: str | None = None
    theirs: float | None = None
    aim: Aim | None = None
    note: str = ""
    failed: bool = False

    @property
    def ratio(self) -> float | None:
        """`ours` over `theirs`."""
        return self.ours / self.theirs if self.ours is not None and self.theirs else None

    @property
    def passes(self) -> bool | None:
        """Whether the aim is met; False for a part that failed, None without an aim."""
        if self.failed:
            return False
        return None if self.aim is None else self.aim.met(self.ours, self.ratio)

    def as_dict(self, benchmark: str) -> dict:
        """Plain data for the JSON file."""
        made = {"aim": None if self.aim is None else str(self.aim), "ratio": self.ratio, "passes": self.passes}
        return {"benchmark": benchmark, **asdict(self), **made}


def at_least(bound: float, of: Literal["value", "ratio"] = "value") -> Aim:
    return Aim(of, ">=", bound)


def at_most(bound: float, of: Literal["value", "ratio"] = "value") -> Aim:
    return Aim(of, "<=", bound)


def failure(what: str, error: BaseException) -> Row:
    """The row of a part that failed."""
    said = " ".join(str(error).split()) or type(error).__name__
    return Row(what, None, "", note=f"FAILED: {type(error).__name__}: {said}"[:500], failed=True)


def as_table(rows: list[dict]) -> str:
    """Rows of `Row.as_dict` as one table of text."""
    head = ("benchmark", "what", "ours", "peer or limit", "ratio", "unit", "aim", "passes")
    lines = [head]
    for row in rows:
        theirs = "" if row["theirs"] is None else f"{row['peer']} {_number(row['theirs'])}"
        passes = {True: "yes", False: "NO", None: ""}[row["passes"]]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            (row["benchmark"], row["what"], _number(row["ours"]), theirs, ratio, row["unit"], row["aim"] or "", passes)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * len(text[0]))
    for line, row in enumerate(rows):
        text[line + 2] += f"  {row['note']}" if row["failed"] else ""
    return "\n".join(text)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def machine(peers: Path) -> dict:
    """Processor, memory and versions, ours and the peers'."""
    import importlib.metadata

    packages = ("torch", "numpy", "pyarrow", "tiledbsoma", "anndata", "zarr", "numba", "scipy", "pandas")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    pinned = [line.split("#")[0].strip() for line in PINS.read_text().splitlines()]
    return {
        "cpu": _first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
        "peers": [pin for pin in pinned if pin] if peers.exists() else f"not installed: {peers}",
    }


def _first_line(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def write(path: Path, benchmark: str, rows: list[Row], about: dict) -> list[dict]:
    """Write ``results/bench/BENCHMARK.json``; returns the rows as plain data."""
    plain = [row.as_dict(benchmark) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"benchmark": benchmark, **about, "rows": plain}, indent=1) + "\n")
    temporary.replace(path)
    return plain


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def child(script: str, *given, python: Path | str = sys.executable, core: int | None = None) -> dict:
    """Run a script of this folder as a process of its own, and read the JSON of its last line.

    Parameters
    ----------
    script
        Such as ``peers.py``.
    *given
        Its arguments; what is no string becomes JSON.
    python
        Which environment's.
    core
        The one core that it may use, with one thread in every library; None leaves it free.

    Raises
    ------
    RuntimeError
        If it takes longer than `HANGS`, or fails, with the last lines that it wrote on standard error.
    """
    if not Path(python).exists():
        raise RuntimeError(f"{python} does not exist; `make .venv-bench/.ready` makes it")
    words = [word if isinstance(word, str) else json.dumps(word, default=str) for word in given]
    try:
        done = subprocess.run(
            [str(python), str(HERE / script), *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=HANGS,
            env=os.environ | (ONE_THREAD if core is not None else {}),
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{script} {' '.join(words)[:80]} was ended after {HANGS} s") from error
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise RuntimeError(f"{script} {' '.join(words)[:80]} ended with status {done.returncode}: {' '.join(last)}")
    return json.loads(done.stdout.splitlines()[-1])


def last_core() -> int:
    """The core that measurements on one core use."""
    return max(os.sched_getaffinity(0))


@contextmanager
def measured():
    """Fill a dict with seconds by the clock, CPU seconds of all threads, and the process's peak memory (MB)."""
    figures = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield figures
    figures |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak resident memory of this process, in MB. Not rusage's: that one starts from the parent's at the fork."""
    return int(_first_line("/proc/self/status", "VmHWM").split()[0]) / 1024


def forget(*paths: Path) -> None:
    """Drop files (folders: all in them) from the page cache, so that they are next read from the disk."""
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)  # a dirty page would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def disk(path: Path) -> int:
    """Bytes that a file or folder takes."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def version_of(*sources: Path) -> str:
    """A short hash of sources, by which cached data is named."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
