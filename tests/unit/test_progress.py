"""Progress: lines where nobody looks on, a bar on a terminal."""

import os
import pty
import subprocess
import sys

import pytest
from cellmill import progress
from cellmill.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (425, "7 min 05 s"), (12_000, "3 h 20 min"), (2e5, "2 d 7 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_lines_come_now_and_then_and_at_the_end(capsys, monkeypatch):
    times = iter((100.0, 101.0, 111.0, 112.0, 120.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with Progress("a model", total=1000, done=200) as bar:
        for done in (210, 310, 320, 1000):
            bar.update(done, f"step {done // 10}", "99 tokens/s" if done < 1000 else "")
    assert capsys.readouterr().err.splitlines() == [
        "a model: 310 of 1,000 cells, step 31, 10 cells/s, 99 tokens/s, 1 min 09 s left",
        "a model: 1,000 of 1,000 cells, step 100, 40 cells/s, 0 s left",
    ]


def test_silence(capsys):
    with Progress("a model", total=10, show=False) as bar:
        bar.say("never")
        bar.update(10, "done")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    """What a name or a note holds is no markup, and lines are said above the bar."""
    code = """
from cellmill.progress import Progress
with Progress("a [b] model", total=100) as bar:
    bar.say("goes on from [step] 3")
    bar.update(50, "step 5, loss [red]1.5", "7 tokens/s, MFU 12.0 %")
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=60)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # nobody writes any more
            break
    os.close(ours)
    text = shown.decode()
    assert "a [b] model: goes on from [step] 3" in text
    assert "step 5, loss [red]1.5, " in text
    assert "cells/s, 7 tokens/s, MFU 12.0 %" in text
    assert " left" in text
    assert "━" in text
