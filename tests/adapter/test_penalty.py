"""The penalty of a change: its formula, and the gradients computed with it."""

from __future__ import annotations

import torch

from kvedit.adapter.penalty import FrozenFactorPenalty, Penalty


def test_the_gradients_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, e, linear_term = some(2, 3, 7), some(2, 5, 3), some(2, 3, 1), some(2, 5, 7)
    change = (b * e.mT) @ a
    expected = change.square().sum() + 2 * (change * linear_term).sum()
    torch.testing.assert_close(Penalty.apply(a, b, e, linear_term), expected)
    trained = tuple(part.requires_grad_() for part in (a, b, e))
    assert torch.autograd.gradcheck(Penalty.apply, (*trained, linear_term))
    side, squares = some(2, 3, 7).requires_grad_(), some(2, 3, 1).square()
    assert torch.autograd.gradcheck(FrozenFactorPenalty.apply, (side, e, some(2, 3, 7), squares))
