"""The loss of a head that has a logit for every token of the vocabulary, computed a few rows at a time.

All logits, their softmax and its gradient would take more memory than the rest of a model. So a block of logits is
made, summed, and multiplied into the gradients while it is there: exact, and without a second product backward.

Legend: M rows, R rows of a block, D width, T tokens.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cellmill.models.base import in_compute_dtype


def vocabulary_loss(
    x_MD: Tensor,
    weight_TD: Tensor,
    bias_T: Tensor | None = None,
    *,
    targets_M: Tensor | None = None,
    weights_M: Tensor | None = None,
    n_rows: int,
) -> Tensor:
    """Weighted sum over rows of the log-sum-exp of their logits (nats), minus the logits of their targets.

    With targets it is the cross-entropy; without, what is left of it to compute where targets are handled elsewhere.

    Parameters
    ----------
    x_MD, weight_TD, bias_T
        Logits are ``x @ weight.T + bias``; products are in the type of autocast, if it is on, all else is float32.
    targets_M
        int64, of each row; None subtracts nothing.
    weights_M
        float32, of each row; by default 1.
    n_rows
        R: a block holds so many rows of T logits.

    Returns
    -------
    Tensor
        float32 []. Its gradients are made at once, if gradients are on, and once differentiable.
    """
    return _Loss.apply(x_MD, weight_TD, bias_T, targets_M, weights_M, n_rows, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, weight_TD, bias_T, targets_M, weights_M, n_rows, learns):
        x, weight = in_compute_dtype(x_MD), in_compute_dtype(weight_TD)
        total = torch.zeros((), device=x.device)
        weights_M = total.new_ones(len(x)) if weights_M is None else weights_M
        d_x = torch.empty_like(x) if learns else None
        d_weight = torch.zeros_like(weight_TD) if learns else None
        d_bias = torch.zeros_like(bias_T) if learns and bias_T is not None else None
        for start in range(0, len(x), n_rows):
            rows = slice(start, start + n_rows)
            weight_R1 = weights_M[rows, None]
            target_R1 = None if targets_M is None else targets_M[rows, None]
            p_RT = (x[rows] @ weight.mT).float()
            if bias_T is not None:
                p_RT += bias_T
            if targets_M is not None:
                total -= (weight_R1 * p_RT.gather(1, target_R1)).sum()
            largest_R1 = p_RT.amax(1, keepdim=True)
            sum_R1 = p_RT.sub_(largest_R1).exp_().sum(1, keepdim=True)
            total += (weight_R1 * (largest_R1 + sum_R1.log())).sum()
            if not learns:
                continue
            p_RT *= weight_R1 / sum_R1
            if targets_M is not None:
                p_RT.scatter_add_(1, target_R1, -weight_R1)
            if bias_T is not None:
                d_bias += p_RT.sum(0)
            p_RT = p_RT.to(x.dtype)
            torch.mm(p_RT, weight, out=d_x[rows])
            _add_product(d_weight, p_RT.mT, x[rows])
        ctx.dtype = x_MD.dtype
        ctx.save_for_backward(d_x, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_x, d_weight, d_bias = ctx.saved_tensors
        return (grad * d_x).to(ctx.dtype), grad * d_weight, None if d_bias is None else grad * d_bias, *[None] * 4


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b``; at once where the types are the same, else summed in the wider type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
