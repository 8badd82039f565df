"""A progress bar on a terminal (where `rich` is installed), plain lines every few seconds elsewhere."""

import importlib.util
import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress through a known number of cells, with cells per second and the time left, on standard error.

    Parameters
    ----------
    title
        What is being done.
    total
        Cells in all.
    done
        Cells that an earlier process has done.
    show
        False keeps silent.
    """

    def __init__(self, title: str, total: int, done: int = 0, show: bool = True):
        self.title, self.total, self.start, self.show = title, total, done, show
        self._began = self._said = time.monotonic()
        self._bar = _rich_bar() if show and sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, note="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` cells are done; `note` is a short text such as the loss."""
        now = time.monotonic()
        rate = (done - self.start) / max(now - self._began, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=done, note=f"{note}  {rate:,.0f} cells/s")
        elif self.show and (now - self._said >= SECONDS_BETWEEN_LINES or done >= self.total):
            self._said = now
            left = (self.total - done) / max(rate, 1e-9)
            parts = (f"{done:,} of {self.total:,} cells", note, f"{rate:,.0f} cells/s", f"{left:,.0f} s left")
            self.say(", ".join(part for part in parts if part))

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(f"{self.title}: {line}")
        elif self.show:
            print(f"{self.title}: {line}", file=sys.stderr, flush=True)


def _rich_bar():
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))
