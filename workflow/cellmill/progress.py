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
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, note="", left="")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "", speed: str = "") -> None:
        """Say that `done` cells are done.

        Parameters
        ----------
        done
            Cells so far, those of earlier processes included.
        note
            A short text such as the loss.
        speed
            More about the speed than cells per second, such as tokens per second.
        """
        now = time.monotonic()
        due = now - self._said >= SECONDS_BETWEEN_LINES or done >= self.total
        if not self._bar and not (self.show and due):
            return
        rate = (done - self.start) / max(now - self._began, 1e-9)
        left = duration((self.total - done) / rate) if rate else "?"
        said = ", ".join(filter(None, (note, f"{rate:,.0f} cells/s", speed)))
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, note=said, left=f"{left} left")
        else:
            self._said = now
            self.say(f"{done:,} of {self.total:,} cells, {said}, {left} left")

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(f"{self.title}: {line}", highlight=False, markup=False)
        elif self.show:
            print(f"{self.title}: {line}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 7 min 05 s, 3 h 20 min, 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _rich_bar():
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    texts = [TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]", "fields[left]")]
    return Progress(texts[0], BarColumn(bar_width=20), texts[1], texts[2], console=Console(stderr=True))
