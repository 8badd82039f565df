"""The logs of a run's trainings as TensorBoard's event files."""

import importlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.training.log import LOG, LOG_SCHEMA


def export(run_folder: Path, out: Path) -> list[Path]:
    """Write the training logs of all models and seeds, of trainings that still run too, for TensorBoard.

    Parameters
    ----------
    run_folder
        The run's results, such as ``results/demo``.
    out
        Gets a folder ``MODEL/SEED/SPLIT`` of each log and split; one of an earlier export is replaced.

    Returns
    -------
    list
        The logs that were read.

    Raises
    ------
    CellmillError
        If tensorboard is not installed, there is no log, or one cannot be read.
    """
    try:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise CellmillError("export-tensorboard needs a package: pip install tensorboard") from error
    logs = find_logs(run_folder)
    if not logs:
        raise CellmillError(f"{run_folder} holds no training log; name the folder of a run, such as results/demo")
    for (model, seed), path in logs.items():
        try:
            log = pq.read_table(path, schema=LOG_SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            text = " ".join(str(error).split())
            raise CellmillError(f"{path} cannot be read as a training log ({text}); train {model} again") from error
        _write(log, out / model / seed, writer, path.stat().st_mtime)
    return list(logs.values())


def find_logs(run_folder: Path) -> dict[tuple[str, str], Path]:
    """The log of each model and seed, or that of the last saved state where training goes on."""
    trainings = Path(run_folder) / "pretrain"
    logs = {}
    for path in sorted(trainings.glob(f"*/seed*.state/step-*/{LOG}")):
        logs[path.parents[2].name, path.parents[1].name.removesuffix(".state")] = path
    logs |= {(path.parents[1].name, path.parent.name): path for path in trainings.glob(f"*/seed*/{LOG}")}
    return dict(sorted(logs.items()))


def _write(log: pa.Table, folder: Path, writer: type, finished: float) -> None:
    """Event files of one log, a folder a split; `finished` is when its last row was written (seconds since 1970)."""
    shutil.rmtree(folder, ignore_errors=True)
    rows = log.to_pylist()
    began = finished - max((row["seconds"] for row in rows), default=0.0)
    for split in dict.fromkeys(row["split"] for row in rows):
        with writer(folder / split) as events:
            for row in rows:
                if row["split"] == split:
                    events.add_scalar(row["metric"], row["value"], row["step"], walltime=began + row["seconds"])
