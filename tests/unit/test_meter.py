"""What the meter counts, on real cells, and what it makes of time."""

import numpy as np
import pytest
import torch
from cellmill.checkpoints import build_model
from cellmill.models.attention import attention_backend
from cellmill.models.base import total_loss
from cellmill.models.packing import Packing
from cellmill.shards.statistics import compute_statistics
from cellmill.training import meter as meters
from cellmill.training.meter import PEAKS, Meter, cpu_peak, gpu_peak, in_flops, note
from small_runs import N_GENES, RECIPES, make_corpus
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), data)


@pytest.fixture(scope="module")
def model(corpus):
    return build_model(RECIPES["geneformer"], N_GENES, compute_statistics(corpus), 0)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(meters.time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_rates_shares_and_mfu(corpus, model, monkeypatch):
    """Two steps of 3 s after 1 s of waiting each, and 10 s of validation that do not count."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(meters, "cpu_peak", lambda *_: 1e9)
    cells = next(corpus.batches("train", 12))
    model.packing = Packing(grain=256)
    parts = [model.pretrain_inputs(cells.slice(*cut), seed=0, step=4) for cut in ((0, 5), (5, 12))]
    meter = Meter(CPU, torch.float32)
    for _ in range(2):
        clock.sleep(1)
        with meter.step():
            clock.sleep(3)
        meter.count(model, parts, len(cells), step=4)
    with meter.paused():
        clock.sleep(10)
    values = meter.read()
    tokens = sum(int((inputs["tokens"] != 0).sum()) for inputs in parts)
    slots = sum(len(inputs["tokens"]) for inputs in parts)
    assert values["cells_per_second"] == pytest.approx(24 / 8)
    assert values["tokens_per_second"] == pytest.approx(2 * tokens / 8)
    assert values["padding_share"] == pytest.approx(1 - tokens / slots)
    assert 0 < values["padding_share"] < 0.5
    assert values["waiting_share"] == pytest.approx(2 / 8)
    assert values["flops_per_second"] == pytest.approx(
        2 * 3 * sum(model.body_flops(inputs, step=4) for inputs in parts) / 8
    )
    assert values["mfu"] == pytest.approx(values["flops_per_second"] / 1e9)
    assert 50 < values["memory_mb"] < 50_000
    assert "tokens/s, MFU" in note(values)
    clock.sleep(5)
    assert meter.read()["cells_per_second"] == 0  # a new window


def product_flops(a, b, *_, out_shape=None, **__) -> int:
    """The operations of a product of two matrices, none where the vocabulary is one of its sides."""
    return 0 if max(*a, *b) >= N_GENES else 2 * a[0] * a[1] * b[1]


def test_operations_are_three_forward_passes_as_torch_counts_them(corpus, model, monkeypatch):
    """Torch counts every product of a step: ours are those without the vocabulary's logits."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(meters, "cpu_peak", lambda *_: 1e9)
    cells = next(corpus.batches("train", 8))
    model.packing = Packing("padded")
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    mapping = {
        torch.ops.aten.mm: product_flops,
        torch.ops.aten.addmm: lambda bias, *factors, **options: product_flops(*factors, **options),
    }
    with attention_backend("reference"), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        total_loss(model(inputs, step=0)).backward()
    meter = Meter(CPU, torch.float32)
    clock.sleep(1)
    meter.count(model, [inputs], len(cells), step=0)
    ours = meter.read()["flops_per_second"]
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_ranks_are_added_up(corpus, model, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(meters, "cpu_peak", lambda *_: 1e9)

    class TwoAlike:
        world = 2

        def sum(self, tensor):
            return 2 * tensor

    cells = next(corpus.batches("train", 4))
    read = []
    for ranks in (None, TwoAlike()):
        meter = Meter(CPU, torch.float32, ranks)
        clock.sleep(1)
        with meter.step():
            clock.sleep(1)
        meter.count(model, [model.pretrain_inputs(cells, seed=0, step=0)], len(cells), step=0)
        read.append(meter.read())
    one, two = read
    for name in ("cells_per_second", "tokens_per_second", "flops_per_second"):
        assert two[name] == pytest.approx(2 * one[name])
    for name in ("mfu", "padding_share", "waiting_share"):
        assert two[name] == pytest.approx(one[name])


def test_a_gpu_waits_by_its_own_clock(monkeypatch):
    """A stream of kernels that runs behind the host, played by a clock of its own."""
    clock = Clock(monkeypatch)
    stream = {"free_at": clock.now}

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            self.at = stream["free_at"] = max(stream["free_at"], clock.now)

        def synchronize(self):
            pass

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**20)
    meter = Meter(torch.device("cuda", 0), torch.bfloat16)
    assert meter.peak == 989e12

    def step(kernels: float, host: float) -> None:
        with meter.step():
            clock.sleep(0.1)  # the host only asks for the kernels
            stream["free_at"] = max(stream["free_at"], clock.now) + kernels
        clock.sleep(host)  # it makes the next cells

    step(kernels=2.0, host=1.9)  # the next cells are there before the kernels end
    step(kernels=2.0, host=4.9)  # they come 3 s too late
    step(kernels=2.0, host=0.0)
    clock.now = stream["free_at"]
    values = meter.read()
    assert values["waiting_share"] == pytest.approx(2.9 / 9.2, abs=0.02)
    assert values["memory_mb"] == 3
    with meter.paused():
        clock.sleep(50)
    step(kernels=2.0, host=1.9)
    assert meter.read()["waiting_share"] == 0
    assert "data sheet" in meter.explain()


def test_what_is_not_known_is_left_out(corpus, model, monkeypatch):
    """An architecture without `body_flops` has no MFU, nor has a device whose peak is not known."""
    monkeypatch.setattr(meters, "device_peak", lambda *_: None)
    cells = next(corpus.batches("train", 4))
    inputs = model.pretrain_inputs(cells, seed=0, step=0)
    meter = Meter(CPU, torch.float32)
    meter.count(model, [inputs], len(cells), step=0)
    values = meter.read()
    assert "mfu" not in values
    assert values["flops_per_second"] > 0
    assert "not known" in meter.explain()
    monkeypatch.setattr(type(model), "body_flops", meters.CellModel.body_flops)
    meter.count(model, [inputs], len(cells), step=0)
    assert "flops_per_second" not in meter.read()


def test_peaks_of_gpus():
    assert gpu_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_peak("NVIDIA H100 PCIe") == 756e12
    assert gpu_peak("NVIDIA H200") == 989e12
    assert gpu_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_peak("NVIDIA L40S") == 362e12
    assert gpu_peak("NVIDIA L4") == PEAKS["L4"]
    assert gpu_peak("NVIDIA A100-SXM4-40GB MIG 3g.20gb") is None
    assert gpu_peak("Tesla V100-SXM2-16GB") is None


def test_the_cpu_reaches_its_peak_and_not_more():
    """The peak is of one large product: another one of the same size is not much faster."""
    peak = cpu_peak(torch.float32, torch.get_num_threads())
    a = torch.rand(1024, 1024)
    best = np.inf
    for _ in range(5):
        began = meters.time.perf_counter()
        a @ a
        best = min(best, meters.time.perf_counter() - began)
    assert 2 * 1024**3 / best < 3 * peak
    assert peak > 1e9
    meter = Meter(CPU, torch.float32)
    assert meter.peak == peak  # measured once a process
    assert "2 N a token" in meter.explain()
    assert "FLOP/s, measured" in meter.explain()
    assert in_flops(32.54e9) == "32.5 GFLOP/s"
    assert in_flops(989e12) == "989 TFLOP/s"
    assert "peak_flops_per_second" in meter.read()
    assert "peak_flops_per_second" not in meter.read()  # told once
