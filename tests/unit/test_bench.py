"""The benchmarks' own logic: aims, the table, failed parts, measured children, thinning, entropy."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Import a module of tests/bench by its name, as run.py does, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(BENCH))
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCH or name in ("broken", "sound"):
            del sys.modules[name]


def test_a_row_passes_if_its_value_or_ratio_meets_the_aim(bench):
    harness = bench("harness")
    assert harness.Row("x", 500, "cells/s", "peer", 100, harness.at_least(5, "ratio")).passes
    assert not harness.Row("x", 499, "cells/s", "peer", 100, harness.at_least(5, "ratio")).passes
    assert harness.Row("x", 1.05, "", aim=harness.at_most(1.05)).passes
    assert not harness.Row("x", math.nan, "", aim=harness.at_most(1.05)).passes
    assert not harness.Row("x", 7, "cells/s", aim=harness.at_least(5, "ratio")).passes, "nothing to compare with"
    assert harness.Row("x", 7, "cells/s").passes is None


def test_the_table_has_every_row_and_says_what_failed(bench):
    harness = bench("harness")
    rows = [
        harness.Row("read", 1234.5, "cells/s", "limit", 2469, harness.at_least(0.7, "ratio")),
        harness.failure("other", RuntimeError("no such\nfile")),
    ]
    lines = harness.as_table([row.as_dict("b") for row in rows]).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["b", "read", "1,234", "limit", "2,469", "0.50", "cells/s", ">=", "0.7", "x", "NO"]
    assert "NO  FAILED: RuntimeError: no such file" in lines[3]


def test_a_childs_figures_are_its_own(bench, tmp_path, monkeypatch):
    """Peak memory does not start from the parent's, and one core is one core."""
    harness = bench("harness")
    script = tmp_path / "script.py"
    script.write_text(
        f"import json, os, sys\nsys.path.insert(0, {str(BENCH)!r})\nfrom harness import measured\n"
        "with measured() as figures:\n    block = bytearray(int(sys.argv[1]))\n"
        "print('noise')\nprint(json.dumps(figures | {'cores': len(os.sched_getaffinity(0))}))\n"
    )
    monkeypatch.setattr(harness, "HERE", tmp_path)
    ballast = np.ones(2**24)  # 128 MB of the parent's
    small, large = (harness.child("script.py", size, core=harness.last_core()) for size in (10, 2**26))
    assert small["cores"] == 1
    assert small["peak_mb"] < ballast.nbytes / 2**20
    assert large["peak_mb"] - small["peak_mb"] == pytest.approx(64, abs=8)


def test_a_child_that_fails_says_why(bench, tmp_path, monkeypatch):
    harness = bench("harness")
    (tmp_path / "script.py").write_text("raise ValueError('the store is empty')")
    monkeypatch.setattr(harness, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match="script.py .* ended with status 1: .*the store is empty"):
        harness.child("script.py", "x")
    with pytest.raises(RuntimeError, match="does not exist; `make"):
        harness.child("script.py", python=tmp_path / "python")


def test_a_part_that_fails_is_a_row_and_the_others_go_on(bench, tmp_path, monkeypatch, capsys):
    run = bench("run")
    (tmp_path / "broken.py").write_text("def measure(options):\n    raise OSError('no disk')")
    (tmp_path / "sound.py").write_text(
        "from harness import Row\ndef measure(options):\n    return [Row('cells', options.cells, 'cells')]"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "BENCHMARKS", ("broken", "sound"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(tmp_path / "made"), "--cells", "5000"])
    assert run.main() == 1
    table = capsys.readouterr().out.splitlines()
    assert "FAILED: OSError: no disk" in table[2]
    assert table[3].split() == ["sound", "cells", "5,000", "cells"]
    broken, sound = (json.loads((tmp_path / "made" / f"{name}.json").read_text()) for name in run.BENCHMARKS)
    assert broken["rows"][0]["passes"] is False
    assert sound["rows"][0]["ours"] == 5000
    assert {"cpu", "cores", "memory_gb", "versions", "peers"} <= sound["machine"].keys()
    assert {"date", "commit", "load_before", "load_after", "seconds"} <= sound.keys()
    monkeypatch.setattr(sys, "argv", ["run.py", "sound", "--folder", str(tmp_path / "made")])
    assert run.main() == 0


def test_thinning_keeps_a_share_of_each_count_and_repeats(bench):
    million = bench("million")
    thinned = object.__new__(million.Thinned)
    rng = np.random.default_rng(0)
    thinned.counts_nV = sp.csr_matrix(rng.poisson(3.0, (700, 300)).astype(np.float32))
    thinned.obs = range(700)
    (_, first_DV), (start, rest_DV) = thinned.chunks(1000, million.CHUNK + 900)
    assert (start, rest_DV.shape[0]) == (million.CHUNK, 900)
    real_DV = thinned.counts_nV[np.arange(1000, 1000 + million.CHUNK) % 700]
    assert ((real_DV - first_DV).toarray() >= 0).all()
    kept_D = np.asarray(first_DV.sum(1) / real_DV.sum(1)).ravel()
    assert kept_D.min() > million.LEAST - 0.1
    assert kept_D.max() < million.MOST + 0.1
    assert kept_D.mean() == pytest.approx((million.LEAST + million.MOST) / 2, abs=0.01)
    assert (first_DV[:700] != first_DV[700:1400]).nnz > 0, "two copies of a cell differ"
    again_DV = next(thinned.chunks(1000, million.CHUNK))[1]
    assert (again_DV != first_DV).nnz == 0


def test_entropy_of_batches_is_that_of_their_labels(bench):
    mean_entropy = bench("peers").mean_entropy
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert mean_entropy(labels, [np.array([0, 1]), np.array([2, 3])]) == 0
    assert mean_entropy(labels, [np.array([0, 2, 4, 6])]) == pytest.approx(2)


def test_exponent_and_limits_of_curation(bench):
    curation = bench("curation")

    def jobs(cells, power):
        job = {"seconds": cells**power, "cpu": cells**power, "peak_mb": 500.0, "returned": None}
        made = {"bytes": 1.2e6, "nonzeros": 1e6, "cells": cells}
        return {"scan": [job], "curate_block": [job], "shards": [job | {"returned": made}]}

    for power, passes in ((1.0, True), (1.2, False)):
        rows = curation.rows_of({cells: jobs(cells, power) for cells in (100, 1000, 10000)})
        found = {row.what: row for row in rows if row.unit != "cells/CPU s"}
        assert found["exponent of time, all sizes"].ours == pytest.approx(power)
        assert found["exponent of time, two largest"].passes is passes
        assert found["10,000 cells: curate_block"].ratio == pytest.approx(1)
        assert found["10,000 cells: all jobs"].ratio == pytest.approx(0.5)
        assert not found["10,000 cells: all jobs"].passes
        assert found["10,000 cells: bytes per nonzero"].passes
