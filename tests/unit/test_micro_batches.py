"""Cutting a step into micro batches: every cell once, no more tokens than allowed, little room left empty."""

import gc
import weakref

import numpy as np
import pytest
import torch
from cellmill.models.attention import attend, attention_backend
from cellmill.models.packing import PACKED
from cellmill.training import micro_batches
from cellmill.training.micro_batches import SHAPES, cut, few_shapes
from shard_cells import real_cells

LIMIT = 16384


@pytest.fixture(scope="module")
def lengths(data) -> np.ndarray:
    """Genes of real cells of the pancreas and of the blood, 76 to 5,900 of them, in the order of a hash."""
    both = [real_cells(data, name)[0].lengths for name in ("baron_h1", "celltypist_sample")]
    lengths = np.concatenate(both)
    return lengths[np.argsort(np.arange(len(lengths)) * 7919 % 10007, kind="stable")]


def totals(lengths_B: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    return np.array([lengths_B[rows].sum() for rows in parts])


def test_cells_go_to_the_emptiest_longest_first():
    parts = cut(np.array([3, 9, 5, 5, 2]), 12)
    # 9 | 5 5 then 3 to the shorter (9 + 3), 2 to the shorter (10 + 2): both full
    assert [rows.tolist() for rows in parts] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("limit", [1000, 4096, LIMIT, 10**9])
@pytest.mark.parametrize("n_cells", [1, 7, 64, 512])
def test_every_cell_stands_in_one_micro_batch_of_allowed_size(lengths, n_cells, limit):
    lengths_B = lengths[:n_cells]
    parts = cut(lengths_B, limit)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n_cells))
    assert all((np.diff(rows) > 0).all() for rows in parts)
    long = [rows for rows in parts if lengths_B[rows].sum() > limit]
    assert all(len(rows) == 1 for rows in long)
    assert len(long) == (lengths_B > limit).sum()
    again = cut(lengths_B.copy(), limit)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("n_cells", [64, 256])
def test_micro_batches_are_few_and_equally_long(lengths, n_cells):
    for start in range(0, 1024, n_cells):
        lengths_B = np.minimum(lengths[start : start + n_cells], 1024)
        parts = cut(lengths_B, LIMIT)
        assert len(parts) == -(-lengths_B.sum() // LIMIT)
        assert np.ptp(totals(lengths_B, parts)) <= lengths_B.max()


def test_cells_without_tokens_are_kept():
    assert [rows.tolist() for rows in cut(np.zeros(3, np.int64), 100)] == [[0, 1, 2]]
    assert [rows.tolist() for rows in cut(np.array([0, 200]), 100)] == [[1], [0]]


def test_cells_longer_than_half_the_limit_are_cut_at_once(monkeypatch):
    tries, spread = [], micro_batches._spread
    monkeypatch.setattr(micro_batches, "_spread", lambda *a: tries.append(1) or spread(*a))
    assert len(cut(np.full(300, 60), 100)) == 300
    assert len(tries) == 1


def test_a_layout_goes_with_its_last_owner():
    """Also one whose mask of attention was remembered: nothing waits for the garbage collector."""
    x_NHK = torch.randn(30, 2, 16)
    layout = PACKED.layout(np.array([10, 20]))
    gone = weakref.ref(layout)
    gc.disable()
    try:
        with attention_backend("flex"), torch.no_grad():
            attend(x_NHK, x_NHK, x_NHK, layout, causal=True)
        assert layout.masks
        del layout
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("longest", [256, 1024, 4096])
@pytest.mark.parametrize("n_cells", [8, 32, 128])
def test_a_compiler_meets_few_shapes_and_little_room_is_empty(lengths, n_cells, longest):
    """At least 97 % of the slots are tokens of real cells, whatever batch and length."""
    lengths = np.minimum(lengths, longest)
    packing = few_shapes(min(LIMIT, int(lengths[:n_cells].sum())))
    used, shapes, slots = 0, set(), 0
    for start in range(0, 2048, n_cells):
        lengths_B = lengths[start : start + n_cells]
        for rows in cut(lengths_B, LIMIT):
            layout = packing.layout(lengths_B[rows])
            used += layout.n_tokens
            slots += layout.n_slots
            shapes.add(layout.n_slots)
    assert used >= 0.97 * slots
    assert len(shapes) <= SHAPES
