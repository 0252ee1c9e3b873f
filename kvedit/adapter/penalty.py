"""The Fisher penalty of an adapter's change of a matrix, with its gradients.

In the whitened coordinates of ``fisher`` the predicted harm of a change D' is ``|D'|^2`` (K-FAC;
as a penalty between tasks: Ritter et al. 2018, arXiv:1805.07810).  After earlier edits it is
quadratic around the base model, so their accumulated delta adds ``2 <linear_term, D'>``.
"""

from typing import Any

import torch
from torch import Tensor


class Penalty(torch.autograd.Function):
    """The sum over k matrices of ``|b diag(e) a|^2 + 2 <linear_term, b diag(e) a>``, a scalar, for
    a (k, r, in), b (k, out, r), e (k, r, 1), and ``linear_term = left right`` with left (k, out, q)
    and right (k, q, in).

    The gradients share most of its products and are computed with it: autograd launched three times
    as many kernels.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, e: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rows, columns, sizes = a @ a.mT, b.mT @ b, e @ e.mT
        back, inner = (b.mT @ left) @ right, columns * sizes
        linear = (back * a).sum(-1, keepdim=True)
        ctx.save_for_backward(
            torch.baddbmm(e * back, inner, a, beta=2, alpha=2),
            torch.baddbmm((left @ (right @ a.mT)) * e.mT, b, sizes * rows, beta=2, alpha=2),
            torch.baddbmm(linear, columns * rows, e, beta=2, alpha=2),
        )
        return (inner * rows).sum() + 2 * (linear * e).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        of_a, of_b, of_e = ctx.saved_tensors
        return gradient * of_a, gradient * of_b, gradient * of_e, None, None


class FrozenFactorPenalty(torch.autograd.Function):
    """The same where the other side is frozen with orthogonal directions, for side (k, r, n) and e
    (k, r, 1): along (k, r, n) is the linear term in those directions, or None; squares (k, r, 1)
    are their squared lengths.
    """

    @staticmethod
    def forward(ctx: Any, side: Tensor, e: Tensor, along: Tensor | None, squares: Tensor) -> Tensor:
        once = squares * e
        lengths, linear = side.square().sum(-1, keepdim=True), torch.zeros_like(e)
        of_side = side * (2 * once * e)
        if along is not None:
            linear = (side * along).sum(-1, keepdim=True)
            of_side.addcmul_(along, e, value=2)
        ctx.save_for_backward(of_side, 2 * (once * lengths + linear))
        return (e * (once * lengths + 2 * linear)).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_side, of_e = ctx.saved_tensors
        return gradient * of_side, gradient * of_e, None, None
