"""Layouts: ragged values in slots and back, matrices, pooling; the same numbers packed, with a grain, and padded."""

import numpy as np
import pytest
import torch
from cellmill.models.packing import Packing, padded, uniform
from cellmill.views.ragged import spread
from shard_cells import real_cells

LAYOUTS = {"packed": Packing(), "grain": Packing("packed", 256), "padded": Packing("padded")}


@pytest.fixture(scope="module")
def ragged(data) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and genes of real cells, the second and the last without any."""
    cells, _ = real_cells(data, "baron_h1")
    lengths = np.diff(cells.offsets[:6])
    offsets = np.concatenate([[0], np.cumsum([*lengths[:1], 0, *lengths[1:], 0])])
    return offsets, cells.genes[: offsets[-1]]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_slots_hold_each_cells_values_behind_its_specials(ragged, kind):
    offsets, genes = ragged
    layout = LAYOUTS[kind].layout(np.diff(offsets) + 1)
    slots = layout.place(offsets, genes, -1, before=1)
    assert len(slots) == layout.n_slots == len(layout.rows_N)
    for cell, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
        assert slots[start] == -1
        np.testing.assert_array_equal(slots[start + 1 : end], genes[offsets[cell] : offsets[cell + 1]])
        assert (layout.rows_N[start:end] == cell).all()
        np.testing.assert_array_equal(layout.places_N[start:end], np.arange(end - start))
    assert layout.used_N.sum() == layout.n_tokens == len(genes) + len(layout)
    assert (layout.rows_N[~layout.used_N] == len(layout)).all()
    assert (slots[~layout.used_N.numpy()] == -1).all()


def test_a_grain_rounds_slots_up_and_padding_fills_a_matrix():
    lengths = np.array([3, 0, 5])
    assert LAYOUTS["packed"].layout(lengths).n_slots == 8
    assert LAYOUTS["grain"].layout(lengths).n_slots == 256
    assert LAYOUTS["padded"].layout(lengths).n_slots == 15
    assert padded(lengths, 7).n_slots == 21
    assert uniform(4, 6).lengths.tolist() == [6] * 4
    assert LAYOUTS["packed"].layout(lengths).bounds.tolist() == [0, 3, 3, 8, 8]
    assert LAYOUTS["grain"].layout(lengths).bounds.tolist() == [0, 3, 3, 8, 256]
    assert [LAYOUTS[kind].layout(lengths).full for kind in LAYOUTS] == [True, False, False]
    assert uniform(2, 3).full
    assert uniform(2, 3).bounds.tolist() == [0, 3, 6, 6]
    with pytest.raises(ValueError, match="cumulative"):
        _ = padded(lengths).bounds


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_matrix_and_back(ragged, kind):
    offsets, genes = ragged
    lengths = np.diff(offsets)
    layout = LAYOUTS[kind].layout(lengths)
    x_N = torch.from_numpy(layout.place(offsets, genes, 9)).float().requires_grad_()
    matrix_BL = layout.to_matrix(x_N, fill=-1)
    assert matrix_BL.shape == (len(lengths), lengths.max())
    for cell, n in enumerate(lengths):
        np.testing.assert_array_equal(matrix_BL[cell, :n].detach(), genes[offsets[cell] : offsets[cell + 1]])
        assert (matrix_BL[cell, n:] == -1).all()
    torch.testing.assert_close(layout.from_matrix(matrix_BL)[layout.used_N], x_N[layout.used_N])
    (gradient,) = torch.autograd.grad(matrix_BL.sum(), x_N)
    torch.testing.assert_close(gradient, layout.used_N.float())


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_is_that_of_each_cell(ragged, kind, dtype):
    offsets, genes = ragged
    lengths = np.diff(offsets)
    layout = LAYOUTS[kind].layout(lengths)
    values = np.stack([np.sin(genes), np.cos(genes) - 5], axis=1)
    x_ND = torch.from_numpy(layout.place(offsets, values[:, 0], 99.0)[:, None] * [[1.0, -2.0]]).to(dtype)
    where_N = torch.from_numpy(layout.place(offsets, genes % 3 == 0, True))
    x = x_ND.float().numpy()
    for where in (None, where_N):
        for cell, (start, end) in enumerate(zip(layout.starts, layout.ends, strict=True)):
            mine = x[start:end] if where is None else x[start:end][where[start:end].numpy()]
            sums = (layout.sum(x_ND, where), layout.mean(x_ND, where), layout.max(x_ND, where))
            empty = np.zeros(2)
            plain = (mine.sum(0), mine.mean(0), mine.max(0)) if len(mine) else (empty,) * 3
            for ours, theirs in zip(sums, plain, strict=True):
                assert ours.dtype == torch.float32
                np.testing.assert_allclose(ours[cell], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_batches_without_tokens(kind, lengths):
    layout = LAYOUTS[kind].layout(np.array(lengths, dtype=np.int64))
    x_ND = torch.ones(layout.n_slots, 3)
    assert not layout.used_N.any()
    assert layout.places_N.shape == (layout.n_slots,)
    for pooled in (layout.sum(x_ND), layout.mean(x_ND), layout.max(x_ND)):
        assert pooled.shape == (len(lengths), 3)
        assert not pooled.any()
    assert layout.from_matrix(layout.to_matrix(x_ND)).shape == x_ND.shape


def test_a_layout_stays_itself_on_its_device():
    layout = uniform(2, 3)
    assert layout.to("cpu") is layout
    other = layout.to("meta")
    assert (other.device.type, other.n_slots, other.width) == ("meta", 6, 3)


def test_index_names_the_slots_of_ragged_values(ragged):
    offsets, genes = ragged
    layout = LAYOUTS["padded"].layout(np.diff(offsets) + 2)
    cell_of = spread(np.arange(len(layout)), offsets)
    place = np.arange(len(genes)) - offsets[cell_of]
    np.testing.assert_array_equal(layout.index(offsets, 2), layout.starts[cell_of] + 2 + place)
