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
    a (k, r, in), b (k, out, r), e (k, r, 1), linear_term (k, out, in).

    The gradients share most of its products and are computed with it: autograd launched three times
    as many kernels.
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        of_a, of_b, of_e = ctx.saved_tensors
        return gradient * of_a, gradient * of_b, gradient * of_e, None


class FrozenFactorPenalty(torch.autograd.Function):
    """The same where the other side is frozen with orthogonal directions, for side (k, r, n) and e
    (k, r, 1): along (k, r, n) is the linear term in those directions, squares (k, r, 1) are their
    squared lengths.
    """

    @staticmethod
    def forward(ctx: Any, side: Tensor, e: Tensor, along: Tensor, squares: Tensor) -> Tensor:
        once = squares * e
        lengths, linear = side.square().sum(-1, keepdim=True), (side * along).sum(-1, keepdim=True)
        ctx.save_for_backward(2 * (side * (once * e) + along * e), 2 * (once * lengths + linear))
        return (e * (once * lengths + 2 * linear)).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_side, of_e = ctx.saved_tensors
        return gradient * of_side, gradient * of_e, None, None
