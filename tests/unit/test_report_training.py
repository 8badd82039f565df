"""The report's table of how fast models trained."""

import pyarrow.parquet as pq
from cellmill.report.training import speeds
from cellmill.training.log import Log


def write(folder, model: str, seed: int, steps: list[dict]) -> object:
    log = Log()
    for step, values in enumerate(steps, start=1):
        log.add(step, "train", {"loss": 1.0}, seconds=1.0)
        log.add(step, "machine", values, seconds=1.0)
    path = folder / "pretrain" / model / f"seed{seed}" / "log.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(log.table(), path)
    return path


def test_medians_of_seeds_and_their_mean(tmp_path):
    """The first step, which compiles, does not count, nor does one that the machine disturbed."""
    first = [
        {"cells_per_second": speed, "memory_mb": memory, "mfu": 0.4} for speed, memory in ((1, 5), (90, 7), (100, 9))
    ]
    first[0]["peak_flops_per_second"] = 989e12
    other = [{"cells_per_second": speed, "memory_mb": 11, "mfu": 0.5} for speed in (2, 2000, 2100)]
    other[0]["peak_flops_per_second"] = 989e12
    paths = [write(tmp_path, "a", 0, first), write(tmp_path, "a", 1, other), write(tmp_path, "b", 0, [{}])]
    table = speeds(paths)
    assert table["columns"] == ["cells/s", "MFU", "memory"]
    assert table["models"] == [{"model": "a", "seeds": [0, 1], "cells": ["1,045", "45.0 %", "10 MB"]}]
    assert table["peaks"] == ["989 TFLOP/s"]
    assert "2 N a token" in table["formula"]


def test_what_one_model_lacks_is_a_dash(tmp_path):
    paths = [
        write(tmp_path, "a", 0, [{"cells_per_second": 10.0}]),
        write(tmp_path, "b", 0, [{"cells_per_second": 20.0, "mfu": 0.1}]),
    ]
    assert [row["cells"] for row in speeds(paths)["models"]] == [["10", "–"], ["20", "10.0 %"]]


def test_logs_without_measurements_have_no_table(tmp_path):
    assert speeds([]) is None
    assert speeds([write(tmp_path, "a", 0, [{}])]) is None
