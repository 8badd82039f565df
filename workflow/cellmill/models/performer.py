"""A Performer's attention: softmax attention estimated by random features, linear in the number of keys.

FAVOR+ of Choromanski et al., ICLR 2021. Features are float32 and never held for all tokens: they are computed cell
after cell and piece by piece, and again in the backward pass.

Legend: B cells, N query slots, S key slots, P tokens of one piece, H heads, K width of a head, F random features.
"""

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cellmill.models.graphs import outside_graphs
from cellmill.models.packing import Layout
from cellmill.randomness import hash64

FEATURE_FLOOR = 1e-4
"""Added to every random feature, as in the Performer's code, so that no query's weights are all zero."""
ON_CPU, ON_GPU = 2**18, 2**25
"""Features of a piece: on a CPU they stay in its cache."""


def draw_projection(n_features: int, width: int, *keys) -> Tensor:
    """Random directions, float32 [F, K], orthogonal within each block of K, of lengths as normal vectors have.

    A function of `keys` (integers or strings) alone. The signs of the QR decomposition are set so that directions are
    uniform (Mezzadri, Notices of the AMS 54, 592, 2007); as LAPACK leaves them, the estimated kernel is biased.
    """
    generator = torch.Generator("cpu").manual_seed(int(hash64("scfoundation projection", *keys).view(np.int64)[0]))
    n_blocks = -(-n_features // width)
    normal = torch.randn(n_blocks, width, width, generator=generator, device="cpu", dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    directions_FK = (q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).mT.flatten(0, 1)[:n_features]
    lengths_F = torch.randn(n_features, width, generator=generator, device="cpu", dtype=torch.float64).norm(dim=1)
    return (directions_FK * lengths_F[:, None]).float()


@outside_graphs
def performer(
    q_NHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, projection_FK: Tensor, queries: Layout, keys: Layout
) -> Tensor:
    """Estimated attention of each cell's queries to its keys: [N, H K], the heads side by side.

    What is subtracted from the exponents of the keys is one number a cell, as in the published code when it is given
    cells one by one; it matters through `FEATURE_FLOOR` alone.

    Parameters
    ----------
    projection_FK
        The directions of `draw_projection`.
    queries, keys
        Where each cell's tokens lie; every cell that has queries has keys.

    Returns
    -------
    Tensor
        Zeros in unused slots.
    """
    return _Performer.apply(q_NHK, k_SHK, v_SHK, projection_FK, queries, keys).flatten(1)


def performer_flops(width: int, n_heads: int, n_features: int, queries: Layout, keys: Layout) -> float:
    """Floating-point operations of one layer, forward: two products for each query and key, of features and values."""
    return 2.0 * n_features * (2 * width + n_heads) * float(queries.n_tokens + keys.n_tokens)


class _Performer(torch.autograd.Function):
    """Context [N, H, K]."""

    @staticmethod
    def forward(ctx, q_NHK, k_SHK, v_SHK, projection_FK, queries, keys):
        n_cells, (_, n_heads, width) = len(queries), q_NHK.shape
        scaled_FK = projection_FK * width**-0.25
        sums_BHFK = q_NHK.new_zeros(n_cells, n_heads, len(projection_FK), width + 1, dtype=torch.float32)
        largest_B = sums_BHFK.new_full((n_cells,), -torch.inf)
        out_NHK = torch.zeros_like(q_NHK)
        with torch.autocast(q_NHK.device.type, enabled=False):
            for cell, query_pieces, key_pieces in _cells(queries, keys, n_heads * len(projection_FK), q_NHK.device):
                sums_BHFK[cell], largest_B[cell] = _sum_keys(k_SHK, v_SHK, scaled_FK, key_pieces)
                for piece in query_pieces:
                    feature_HPF = _query_features(q_NHK[piece].float(), scaled_FK) + FEATURE_FLOOR
                    out_NHK[piece] = _divide(feature_HPF @ sums_BHFK[cell]).transpose(0, 1)
        ctx.save_for_backward(q_NHK, k_SHK, v_SHK, projection_FK, sums_BHFK, largest_B)
        ctx.layouts = queries, keys
        return out_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHK):
        q_NHK, k_SHK, v_SHK, projection_FK, sums_BHFK, largest_B = ctx.saved_tensors
        queries, keys = ctx.layouts
        n_heads, width = q_NHK.shape[1:]
        scaled_FK = projection_FK * width**-0.25
        dq, dk, dv = torch.zeros_like(q_NHK), torch.zeros_like(k_SHK), torch.zeros_like(v_SHK)
        with torch.autocast(q_NHK.device.type, enabled=False):
            for cell, query_pieces, key_pieces in _cells(queries, keys, n_heads * len(projection_FK), q_NHK.device):
                sums_HFK, d_sums_HFK = sums_BHFK[cell], torch.zeros_like(sums_BHFK[cell])
                for piece in query_pieces:
                    q_PHK, grad_HPK = q_NHK[piece].float(), grad_NHK[piece].float().transpose(0, 1)
                    kernel_HPF = _query_features(q_PHK, scaled_FK)
                    feature_HPF = kernel_HPF + FEATURE_FLOOR
                    both_HPK = feature_HPF @ sums_HFK
                    weight_HP1 = both_HPK[:, :, width:]
                    d_weight_HP1 = -(grad_HPK * _divide(both_HPK)).sum(2, keepdim=True)
                    d_both_HPK = torch.cat([grad_HPK, d_weight_HP1], 2) / weight_HP1
                    d_sums_HFK += feature_HPF.mT @ d_both_HPK
                    d_exponent_HPF = (d_both_HPK @ sums_HFK.mT).mul_(kernel_HPF)
                    dq[piece] = _exponent_backward(d_exponent_HPF, q_PHK, scaled_FK)
                for piece in key_pieces:
                    k_PHK = k_SHK[piece].float()
                    kernel_HPF = _exponents(k_PHK, scaled_FK).sub_(largest_B[cell]).exp_()
                    d_exponent_HPF = (_with_ones(v_SHK[piece]) @ d_sums_HFK.mT).mul_(kernel_HPF)
                    dk[piece] = _exponent_backward(d_exponent_HPF, k_PHK, scaled_FK)
                    dv[piece] = ((kernel_HPF + FEATURE_FLOOR) @ d_sums_HFK[:, :, :width]).transpose(0, 1)
        return dq, dk, dv, None, None, None


def _cells(queries: Layout, keys: Layout, n_features: int, device: torch.device):
    """For each cell its number, and slices of its queries and of its keys."""
    room = ON_CPU if device.type == "cpu" else ON_GPU
    length = max(room // n_features, 1)
    for cell in range(len(queries)):
        ends = ((layout.starts[cell], layout.ends[cell]) for layout in (queries, keys))
        yield cell, *([slice(i, min(i + length, end)) for i in range(start, end, length)] for start, end in ends)


def _exponents(x_PHK: Tensor, scaled_FK: Tensor) -> Tensor:
    """[H, P, F], logarithms of the features before they are lowered."""
    return _products(x_PHK, scaled_FK).sub_(_half_square(x_PHK))


def _products(x_PHK: Tensor, scaled_FK: Tensor) -> Tensor:
    return (x_PHK @ scaled_FK.T).transpose(0, 1)


def _half_square(x_PHK: Tensor) -> Tensor:
    """[H, P, 1]."""
    return (x_PHK.square().sum(2, keepdim=True) * (x_PHK.shape[2] ** -0.5 / 2)).transpose(0, 1)


def _query_features(q_PHK: Tensor, scaled_FK: Tensor) -> Tensor:
    """[H, P, F], each query's exponents lowered by the largest of its products."""
    product_HPF = _products(q_PHK, scaled_FK)
    return product_HPF.sub_(product_HPF.amax(2, keepdim=True) + _half_square(q_PHK)).exp_()


def _sum_keys(k_SHK: Tensor, v_SHK: Tensor, scaled_FK: Tensor, pieces: list[slice]) -> tuple[Tensor, Tensor]:
    """Sums over a cell's keys of features times values, [H, F, K + 1], last of the features; the largest product."""
    n_heads, width = k_SHK.shape[1:]
    sums_HFK = k_SHK.new_zeros(n_heads, len(scaled_FK), width + 1, dtype=torch.float32)
    values_H1K = torch.zeros_like(sums_HFK[:, :1])
    largest = sums_HFK.new_full((), -torch.inf)
    for piece in pieces:
        k_PHK, v_HPK = k_SHK[piece].float(), _with_ones(v_SHK[piece])
        product_HPF = _products(k_PHK, scaled_FK)
        before, largest = largest, torch.maximum(largest, product_HPF.amax())
        kernel_HPF = product_HPF.sub_(_half_square(k_PHK) + largest).exp_()
        sums_HFK = torch.baddbmm(sums_HFK * torch.exp(before - largest), kernel_HPF.mT, v_HPK)
        values_H1K += v_HPK.sum(1, keepdim=True)
    return sums_HFK + FEATURE_FLOOR * values_H1K, largest


def _with_ones(v_PHK: Tensor) -> Tensor:
    """float32 [H, P, K + 1], with a column of ones: what is summed with it are the weights."""
    return torch.cat([v_PHK, v_PHK.new_ones(*v_PHK.shape[:2], 1)], 2).float().transpose(0, 1)


def _divide(both_HPK: Tensor) -> Tensor:
    """[H, P, K], weighted values over weights."""
    return both_HPK[:, :, :-1] / both_HPK[:, :, -1:]


def _exponent_backward(d_exponent_HPF: Tensor, x_PHK: Tensor, scaled_FK: Tensor) -> Tensor:
    """[P, H, K], the gradient of what the exponents were made of; what they were lowered by is a constant."""
    d_square_PH1 = d_exponent_HPF.sum(2, keepdim=True).transpose(0, 1)
    return d_exponent_HPF.transpose(0, 1) @ scaled_FK - x_PHK * (d_square_PH1 * x_PHK.shape[2] ** -0.5)
