"""What every script of the workflow does around its one call into the library."""

import errno
import logging
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from cellmill.errors import CellmillError

ERROR_PREFIX = "cellmill: "


class _Tee:
    """A text stream that writes to a log file and to the terminal."""

    def __init__(self, log, terminal):
        self.log, self.terminal = log, terminal

    def write(self, text: str) -> int:
        with suppress(OSError):  # the disk may be full
            self.log.write(text)
        return self.terminal.write(text)

    def flush(self) -> None:
        self.terminal.flush()
        with suppress(OSError):
            self.log.flush()

    def isatty(self) -> bool:
        return False  # several jobs share the terminal: lines, not a moving bar


@contextmanager
def job(log: str):
    """Run a job's body with its messages in `log` and, but for warnings, on the terminal.

    A `CellmillError` or a full disk ends the job with status 1 and one sentence as the last line; any other exception
    is a defect and keeps its traceback.

    Parameters
    ----------
    log
        Path of the rule's log file.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    file = Path(log).open("w", buffering=1)  # noqa: SIM115 (closed below, also on a full disk)
    logging.basicConfig(stream=file, level=logging.INFO, force=True)
    logging.captureWarnings(True)
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = file, _Tee(file, stderr)
    try:
        yield
    except CellmillError as error:
        _end(error)
    except OSError as error:
        # libraries in C may say it in words alone
        if error.errno != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        where = error.filename or "the disk of the results folder"
        _end(f"no space is left on {where}; free some and run the same command again: what is finished is kept")
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        with suppress(OSError):  # what a full disk did not take is still waiting to be written
            file.close()


def _end(sentence) -> None:
    print(f"{ERROR_PREFIX}{sentence}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def said_errors(logs: Path, since: float) -> list[str]:
    """The sentences with which jobs ended since a time (seconds since the epoch), read from their log files."""
    sentences = []
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime >= since:
            lines = path.read_text(errors="replace").splitlines()
            sentences += [line for line in lines[-1:] if line.startswith(ERROR_PREFIX)]
    return sentences
