"""The price of an adapter's change of one matrix, and its slopes.

In the coordinates of ``curvature`` the predicted harm of a change D' is ``|D'|^2``; where earlier
edits moved the weights already, what they pull adds ``2 <pull, D'>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Price(torch.autograd.Function):
    """``|b diag(e) a|^2 + 2 <pull, b diag(e) a>``, a scalar: a (r, in), b (out, r), e (r, 1), pull
    (out, in).

    The gradients, which share most of its products, are formed with it: taken by autograd they were
    three times as many kernels.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, e: Tensor, pull: Tensor) -> Tensor:
        rows, columns, sizes = a @ a.T, b.T @ b, e @ e.T
        back, inner = b.T @ pull, columns * sizes
        pulled = (back * a).sum(1, keepdim=True)
        ctx.save_for_backward(
            2 * torch.addmm(e * back, inner, a),
            2 * torch.addmm((pull @ a.T) * e.T, b, sizes * rows),
            2 * torch.addmm(pulled, columns * rows, e),
        )
        return (inner * rows).sum() + 2 * (pulled * e).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        of_a, of_b, of_e = ctx.saved_tensors
        return slope * of_a, slope * of_b, slope * of_e, None


class FramedPrice(torch.autograd.Function):
    """The same where the other side's directions are at right angles: side (r, n), e (r, 1); along
    (r, n) is how the pull lies in those directions, squares (r, 1) are their lengths squared.
    """

    @staticmethod
    def forward(ctx: Any, side: Tensor, e: Tensor, along: Tensor, squares: Tensor) -> Tensor:
        once = squares * e
        lengths, pulled = side.square().sum(1, keepdim=True), (side * along).sum(1, keepdim=True)
        ctx.save_for_backward(2 * (side * (once * e) + along * e), 2 * (once * lengths + pulled))
        return (e * (once * lengths + 2 * pulled)).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_side, of_e = ctx.saved_tensors
        return slope * of_side, slope * of_e, None, None
