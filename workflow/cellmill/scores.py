"""The one table: every score of every task is a row, made and checked here (docs/scores.md); `collect` joins them."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import atomic

KINDS = ("model", "untrained", "baseline", "control", "ceiling")
REGIMES = ("zero_shot", "linear_probe", "fine_tune", "supervised", "none")
SEEN = ("yes", "no", "unknown")

_KEY = ("run", "task", "dataset", "split", "model", "kind", "regime", "seed", "metric")
SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("regime", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("higher_is_better", pa.bool_(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("seen", pa.string(), nullable=False),
        pa.field("code_version", pa.string(), nullable=False),
        pa.field("commit", pa.string(), nullable=False),
        pa.field("config_hash", pa.string(), nullable=False),
        pa.field("checkpoint", pa.string()),
    ]
)
"""Columns of the rows that a task writes."""
COLLECTED = SCHEMA.insert(SCHEMA.get_field_index("value") + 1, pa.field("scaled", pa.float64()))
"""Columns of the collected table: `scaled` needs the controls, which are scored by other jobs."""


def row(
    *,
    run: str,
    task: str,
    dataset: str,
    split: str,
    model: str,
    kind: str,
    regime: str,
    seed: int,
    metric: str,
    value: float | None,
    higher_is_better: bool,
    n: int,
    seconds: float,
    reason: str | None,
    seen: str,
    code_version: str,
    commit: str,
    config_hash: str,
    checkpoint: str | None,
) -> dict:
    """One checked row of the table; the columns are those of docs/scores.md.

    Raises
    ------
    CellmillError
        If a word is outside its vocabulary, a value is not finite, or `value` is null without a `reason` (or the other
        way round).
    """
    where = f"score {task}/{dataset}/{split}/{model}/{metric}"
    for name, word, vocabulary in (("kind", kind, KINDS), ("regime", regime, REGIMES), ("seen", seen, SEEN)):
        if word not in vocabulary:
            raise CellmillError(f"{where}: {name} is {word!r}; it must be one of {', '.join(vocabulary)}")
    if (value is None) != bool(reason):
        raise CellmillError(
            f"{where}: value is {value!r} and reason {reason!r}; give a value or a reason, not both or none"
        )
    if value is not None and not math.isfinite(value):
        raise CellmillError(f"{where}: value is {value}; give a null value and the reason instead")
    return {
        "run": run,
        "task": task,
        "dataset": dataset,
        "split": split,
        "model": model,
        "kind": kind,
        "regime": regime,
        "seed": int(seed),
        "metric": metric,
        "value": None if value is None else float(value),
        "higher_is_better": bool(higher_is_better),
        "n": int(n),
        "seconds": float(seconds),
        "reason": reason or None,
        "seen": seen,
        "code_version": code_version,
        "commit": commit,
        "config_hash": config_hash,
        "checkpoint": checkpoint,
    }


def sort(table: pa.Table, where: str) -> pa.Table:
    """`table` sorted by its key columns, which must be unique; `where` is named in the error if they are not."""
    table = table.sort_by([(name, "ascending") for name in _KEY])
    counts = table.group_by(list(_KEY)).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        key = "/".join(str(repeated[name][0].as_py()) for name in _KEY)
        raise CellmillError(f"{where}: the score {key} is there {repeated['count_all'][0]} times; keep one of them")
    return table


def write(rows: list[dict], path: Path) -> None:
    """Write `rows` (each from `row`) as parquet, sorted by key; the same rows give the same bytes.

    Raises
    ------
    CellmillError
        If two rows have the same key.
    """
    table = sort(pa.Table.from_pylist(rows, schema=SCHEMA), str(path))
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read(path: Path) -> pa.Table:
    """The rows of one file of scores, or the collected table.

    Raises
    ------
    CellmillError
        If the file is missing, is not parquet, or holds neither the columns of `SCHEMA` nor those of `COLLECTED`.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CellmillError(f"{path} cannot be read as a table of scores; delete it and run again ({error})") from error
    if not table.schema.equals(SCHEMA) and not table.schema.equals(COLLECTED):
        raise CellmillError(f"{path} is not a table of scores of this version of cellmill; delete it and run again")
    return table
