"""How many tokens of a micro batch fit in memory: what is read of the system, what trials leave, and what is chosen."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.pretrain import _Run
from cellmill.recipes import ModelRecipe
from cellmill.shards.statistics import compute_statistics
from cellmill.training import memory
from cellmill.training.memory import Limit, control_group, halved, ran_out, rounded, slurm_job
from small_runs import RECIPES, TRAINING, make_corpus

AUTO = replace(TRAINING, micro_batch_tokens="auto")
MORE = {name: ModelRecipe(architecture=name) for name in ("exceiver", "scmulan")}


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def statistics(corpus):
    return compute_statistics(corpus)


def start(corpus, statistics, name="geneformer", training=AUTO) -> _Run:
    return _Run(corpus, statistics, replace((RECIPES | MORE)[name], training=training), 0)


def choose(run, cells, known=None) -> memory.Choice:
    return memory.choose_tokens(
        *(run.wrapped, run.optimizer, cells, run.training, run.ranks),
        **{"seed": 0, "step": 11, "autocast": run.autocast, "known": known},
    )


def steps(run, tried: bool) -> dict:
    """All tensors after two steps, with trials before the first and before the second, or without."""
    with run.loader:
        for _ in range(2):
            now = run.prepare(run.step)
            if tried:
                choose(run, now.cells)
                assert all(parameter.grad is None for parameter in run.model.parameters())
            run.model.train()
            run.update(now)
            run.step += 1
        tensors = run.state(run.loader.state_dict()).tensors | {"place": torch.tensor(now.after["position"])}
        return {name: tensor.nan_to_num(-1.0) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", [*RECIPES, *MORE])
def test_trials_leave_the_run_as_it_was(corpus, statistics, name):
    plain, tried = (steps(start(corpus, statistics, name), tried) for tried in (False, True))
    assert plain.keys() == tried.keys()
    assert [key for key in plain if not plain[key].equal(tried[key])] == []


def test_less_memory_means_fewer_tokens(corpus, statistics, monkeypatch):
    run = start(corpus, statistics)
    now, chosen = run.prepare(0), {}
    whole = int(run.model.token_lengths(now.cells).sum())
    monkeypatch.setattr(memory.Peak, "read", lambda self: 1000 * sum(taken))
    taken, within = [], memory._Trial._pass
    monkeypatch.setattr(
        memory._Trial,
        "_pass",
        lambda self, rows: (taken.__setitem__(slice(None), [int(self.lengths_B[rows].sum())]), within(self, rows)),
    )
    monkeypatch.setattr(memory, "SPARE_BYTES", 0)
    later = memory.later_bytes(run.model, run.optimizer, run.device)
    for tokens in (70, 200, 10**6):  # a token is said to take 1,000 bytes
        monkeypatch.setattr(
            memory, "limits", lambda *_, t=tokens: [Limit(int((later + 1000 * t) / 0.9) + 1, 0, "test")]
        )
        chosen[tokens] = choose(run, now.cells).tokens
    longest = int(run.model.token_lengths(now.cells).max())
    assert chosen == {70: max(64, longest), 200: 128, 10**6: 1024}
    assert whole * 5 / 4 < 1024
    assert choose(run, now.cells, known=256).tokens == 256  # an earlier process's, which fits
    monkeypatch.setattr(memory, "limits", lambda *_: [Limit(later + 200_000, 0, "test")])
    assert choose(run, now.cells, known=256).tokens == longest  # nothing is left to spare
    monkeypatch.setattr(memory, "limits", lambda *_: [Limit(later, 0, "the smallest")])
    with pytest.raises(CellmillError, match=r"does not fit in memory \(the smallest\).*max_length.*checkpoint_act"):
        choose(run, now.cells)
    run.loader.__exit__(None, None, None)


def test_limits_of_this_machine(corpus):
    cpu = torch.device("cpu")
    given = memory.limits(replace(AUTO, memory_gb=2.5), cpu)
    assert [(limit.total, limit.source) for limit in given] == [(2_500_000_000, "training.memory_gb")]
    assert 10**8 < given[0].used < 10**11
    alone, four = (memory.limits(replace(AUTO, ranks=n), cpu) for n in (1, 4))
    available = [limits[0].total - limits[0].used for limits in (alone, four)]
    assert available[0] == pytest.approx(4 * available[1], rel=0.2)  # others compute meanwhile


def test_control_groups_of_both_versions(tmp_path):
    of, root = tmp_path / "cgroup", tmp_path / "fs"
    inner, v1 = root / "job" / "step", root / "memory" / "slurm"
    for folder, files in (
        (
            root / "job",
            {"memory.max": "1000", "memory.current": "900", "memory.stat": "active_file 50\ninactive_file 8"},
        ),
        (inner, {"memory.max": "max", "memory.current": "700", "memory.stat": "active_file 50\n"}),
        (
            v1,
            {
                "memory.limit_in_bytes": "5000",
                "memory.usage_in_bytes": "4000",
                "memory.stat": "total_active_file 10\ntotal_inactive_file 5",
            },
        ),
    ):
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    of.write_text("0::/job/step\n")
    assert control_group(of, root) == 158  # the group above has a limit
    of.write_text("7:cpu,memory:/slurm\n3:cpuset:/\n")
    assert control_group(of, root) == 1015
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert control_group(of, root) is None
    assert control_group(tmp_path / "absent", root) is None


def test_slurm_says_megabytes():
    assert slurm_job({"SLURM_MEM_PER_NODE": "4096"}) == 4 * 2**30
    assert slurm_job({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "3"}) == 6 * 2**30
    assert slurm_job({"SLURM_MEM_PER_NODE": "0"}) is None  # all there is
    assert slurm_job({}) is None


def test_rounded_and_halved():
    assert [rounded(n) for n in (1, 3, 1000, 1024, 5000)] == [1, 2, 512, 1024, 4096]
    assert halved(10**6, np.array([300, 200, 100])) == 256
    with pytest.raises(CellmillError, match="a cell of 300 tokens does not fit"):
        halved(300, np.array([300, 20, 10]))


def test_what_says_that_memory_ran_out():
    for take in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            take()
        assert ran_out(found.value)
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out(ValueError("can't allocate memory"))


def test_a_peak_is_that_of_what_was_taken():
    kept = torch.ones(10**6)
    peak = memory.Peak(torch.device("cpu"))
    del kept
    torch.ones(25 * 10**6)
    assert 90e6 < peak.read() < 120e6
    assert memory.Peak(torch.device("cpu")).read() < 10e6
