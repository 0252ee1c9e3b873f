"""The price of an adapter's change of one matrix, and its slopes.

In the coordinates of ``fisher`` the predicted harm of a change D' is ``|D'|^2``; where earlier
edits moved the weights already, what they pull adds ``2 <linear_term, D'>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Penalty(torch.autograd.Function):
    """The sum over k matrices of ``|b diag(e) a|^2 + 2 <linear_term, b diag(e) a>``, a scalar: a (k, r,
    in), b (k, out, r), e (k, r, 1), pull (k, out, in).

    The gradients, which share most of its products, are formed with it: taken by autograd they were
    three times as many kernels.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, e: Tensor, linear_term: Tensor) -> Tensor:
        rows, columns, sizes = a @ a.mT, b.mT @ b, e @ e.mT
        back, inner = b.mT @ linear_term, columns * sizes
        linear = (back * a).sum(-1, keepdim=True)
        ctx.save_for_backward(
            torch.baddbmm(e * back, inner, a, beta=2, alpha=2),
            torch.baddbmm((linear_term @ a.mT) * e.mT, b, sizes * rows, beta=2, alpha=2),
            torch.baddbmm(linear, columns * rows, e, beta=2, alpha=2),
        )
        return (inner * rows).sum() + 2 * (linear * e).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        of_a, of_b, of_e = ctx.saved_tensors
        return slope * of_a, slope * of_b, slope * of_e, None


class FrozenFactorPenalty(torch.autograd.Function):
    """The same where the other side's directions are at right angles: side (k, r, n), e (k, r, 1);
    along (k, r, n) is how the pull lies in those directions, squares (k, r, 1) are their lengths
    squared.
    """

    @staticmethod
    def forward(ctx: Any, side: Tensor, e: Tensor, along: Tensor, squares: Tensor) -> Tensor:
        once = squares * e
        lengths, linear = side.square().sum(-1, keepdim=True), (side * along).sum(-1, keepdim=True)
        ctx.save_for_backward(2 * (side * (once * e) + along * e), 2 * (once * lengths + linear))
        return (e * (once * lengths + 2 * linear)).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_side, of_e = ctx.saved_tensors
        return slope * of_side, slope * of_e, None, None
