"""Packed cells: the tokens of all cells one after the other, without padding, and where each cell's lie.

A model sees flat tensors [N, ...] and a `Layout`. The plain way, every cell padded to the longest, is the same thing
with unused slots: what is proved for one layout is compared with the other in the tests.

Legend: B cells, N slots of all cells together, D width, L slots of the longest cell.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cellmill.views.ragged import spread


@dataclass(frozen=True)
class Packing:
    """How a model lays out the tokens of its cells.

    Attributes
    ----------
    kind
        "packed", or "padded": every cell has as many slots as the longest.
    grain
        Packed slots are rounded up to a multiple of this, so that a compiler meets few shapes; the slots at the end
        belong to no cell.
    """

    kind: Literal["packed", "padded"] = "packed"
    grain: int = 1

    def layout(self, lengths_B: np.ndarray) -> "Layout":
        """Where the tokens of cells of these lengths lie."""
        lengths_B = np.asarray(lengths_B, dtype=np.int64)
        if self.kind == "padded":
            return padded(lengths_B)
        total = int(lengths_B.sum())
        return Layout(lengths_B, np.cumsum(lengths_B) - lengths_B, max(-(-total // self.grain) * self.grain, 1))


PACKED = Packing()


def padded(lengths_B: np.ndarray, width: int | None = None) -> "Layout":
    """Every cell has `width` slots, by default as many as the longest has tokens: a flattened matrix [B, L]."""
    lengths_B = np.asarray(lengths_B, dtype=np.int64)
    width = width or max(int(lengths_B.max(initial=0)), 1)
    return Layout(lengths_B, np.arange(len(lengths_B)) * width, len(lengths_B) * width, width)


def uniform(n_cells: int, length: int) -> "Layout":
    """Every cell has `length` tokens."""
    return padded(np.full(n_cells, length), length)


class Layout:
    """Cell b owns the slots ``starts[b] : starts[b] + lengths[b]`` of N; slots that no cell owns are unused.

    Cells lie in their order and do not overlap. What is on the host is numpy; tensors are made on the layout's device
    when they are first asked for, from the two small arrays that were moved there.

    Attributes
    ----------
    lengths, starts
        int64 [B], on the host.
    n_slots
        N.
    width
        Slots of every cell, where all have as many (a matrix [B, L]), else None.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        starts: np.ndarray,
        n_slots: int,
        width: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.lengths, self.starts, self.n_slots, self.width = lengths, starts, n_slots, width
        self.device = torch.device(device)
        self.masks = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ends(self) -> np.ndarray:
        """int64 [B], on the host."""
        return self.starts + self.lengths

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest cell."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def n_tokens(self) -> int:
        """Slots that are used."""
        return int(self.lengths.sum())

    @property
    def full(self) -> bool:
        """Whether every slot is used: a matrix that is full is a packed layout, too."""
        return self.n_tokens == self.n_slots

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Layout":
        """The same layout for tensors on `device`."""
        if torch.device(device) == self.device:
            return self
        return Layout(self.lengths, self.starts, self.n_slots, self.width, device)

    def one_each(self) -> "Layout":
        """The layout of one token of each cell, which lie as the cells do: in a matrix or packed."""
        kind = "packed" if self.width is None and len(self) else "padded"  # of no cells it has no slot
        return Packing(kind).layout(np.ones(len(self))).to(self.device)

    # --- on the host: putting ragged arrays into slots ----------------------------------------------------------------

    def index(self, offsets: np.ndarray, before: int = 0) -> np.ndarray:
        """int64 [M], the slot of each ragged value, where a cell's first stands `before` slots behind its start."""
        return np.arange(offsets[-1]) + spread(self.starts + before - offsets[:-1], offsets)

    def place(self, offsets: np.ndarray, values_M: np.ndarray, fill, *, before: int = 0, dtype=None) -> np.ndarray:
        """[N], ragged values in their slots and `fill` in all others; `before` as for `index`."""
        if before == 0 and len(values_M) == self.n_slots and offsets[-1] == self.n_slots:
            return np.ascontiguousarray(values_M, dtype=dtype)
        out_N = np.full(self.n_slots, fill, dtype=dtype or values_M.dtype)
        out_N[self.index(offsets, before)] = values_M
        return out_N

    # --- on the device ------------------------------------------------------------------------------------------------

    def on_device(self, array: np.ndarray) -> Tensor:
        """A tensor on the layout's device; to a GPU through pinned memory, so that nobody waits for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @cached_property
    def lengths_B(self) -> Tensor:
        """int64 [B]."""
        return self.on_device(self.lengths)

    @cached_property
    def starts_B(self) -> Tensor:
        """int64 [B]."""
        return self.on_device(self.starts)

    @cached_property
    def rows_N(self) -> Tensor:
        """int64 [N], the cell of each slot; B in unused slots."""
        if self.width is not None:
            row_N = torch.arange(self.n_slots, device=self.device) // self.width
            return torch.where(self._place_in_row(row_N) < self.lengths_B[row_N], row_N, len(self))
        n_unused = torch.full((1,), self.n_slots - self.n_tokens, device=self.device)  # made there: nobody waits for it
        counts = torch.cat([self.lengths_B, n_unused])
        rows_B = torch.arange(len(self) + 1, device=self.device)
        return torch.repeat_interleave(rows_B, counts, output_size=self.n_slots)

    def _place_in_row(self, row_N: Tensor) -> Tensor:
        return torch.arange(self.n_slots, device=self.device) - self.starts_B[row_N]

    @cached_property
    def places_N(self) -> Tensor:
        """int64 [N], the place 0, 1, 2, ... of each slot within its cell; 0 in unused slots."""
        last = max(len(self) - 1, 0)
        if not len(self):
            return torch.zeros(self.n_slots, dtype=torch.int64, device=self.device)
        return torch.where(self.used_N, self._place_in_row(self.rows_N.clamp(max=last)), 0)

    @cached_property
    def used_N(self) -> Tensor:
        """Bool [N]."""
        return self.rows_N < len(self)

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [B + 2], cumulative lengths of packed cells; unused slots at the end count as one more cell."""
        if self.width is not None and not self.full:
            raise ValueError("a padded layout has no cumulative lengths")
        return self.on_device(np.r_[self.starts, self.n_tokens, self.n_slots].astype(np.int32))

    def sum(self, x_ND: Tensor, where_N: Tensor | None = None) -> Tensor:
        """float32 [B, D], the sum over each cell's tokens, or those of them where `where_N` holds."""
        rows_N = self.rows_N if where_N is None else torch.where(where_N, self.rows_N, len(self))
        return x_ND.new_zeros(len(self) + 1, x_ND.shape[1], dtype=torch.float32).index_add(0, rows_N, x_ND.float())[:-1]

    def mean(self, x_ND: Tensor, where_N: Tensor | None = None) -> Tensor:
        """float32 [B, D], as `sum`, over the number of tokens; zeros where there are none."""
        ones_N1 = torch.ones(self.n_slots, 1, device=self.device)
        return self.sum(x_ND, where_N) / self.sum(ones_N1, where_N).clamp(min=1)

    def max(self, x_ND: Tensor, where_N: Tensor | None = None) -> Tensor:
        """float32 [B, D], the largest value of each cell's tokens; zeros where there are none."""
        rows_N = self.rows_N if where_N is None else torch.where(where_N, self.rows_N, len(self))
        lowest_BD = x_ND.new_full((len(self) + 1, x_ND.shape[1]), -torch.inf, dtype=torch.float32)
        index_ND = rows_N.unsqueeze(1).expand_as(x_ND)
        max_BD = lowest_BD.scatter_reduce(0, index_ND, x_ND.float(), "amax")[:-1]
        return torch.where(max_BD == -torch.inf, 0.0, max_BD)

    def to_matrix(self, x_N: Tensor, fill: float = 0) -> Tensor:
        """[B, L, ...] from [N, ...]; L is the longest cell (at least 1), `fill` stands behind each cell."""
        if self.width is not None:
            x_N = x_N if self.full else torch.where(_like(self.used_N, x_N), x_N, fill)
            return x_N.unflatten(0, (len(self), self.width))
        width = max(self.longest, 1)
        out = x_N.new_full((len(self) * width + 1, *x_N.shape[1:]), fill)
        return out.index_copy(0, self._matrix_index, x_N)[:-1].unflatten(0, (len(self), width))

    def from_matrix(self, x_BL: Tensor) -> Tensor:
        """[N, ...] from the [B, L, ...] of `to_matrix`; zeros in unused slots."""
        if self.width is not None:
            return x_BL.flatten(0, 1)
        flat = torch.cat([x_BL.flatten(0, 1), x_BL.new_zeros(1, *x_BL.shape[2:])])
        return flat.index_select(0, self._matrix_index)

    @cached_property
    def _matrix_index(self) -> Tensor:
        """int64 [N], the slot of each token in the flattened matrix of `to_matrix`; B L for unused slots."""
        width = max(self.longest, 1)
        return torch.where(self.used_N, self.rows_N * width + self.places_N, len(self) * width)


def _like(mask_N: Tensor, x_N: Tensor) -> Tensor:
    return mask_N.view(-1, *(1,) * (x_N.ndim - 1))
