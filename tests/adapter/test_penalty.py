"""The penalty of a change: its formula, and the gradients computed with it."""

from __future__ import annotations

import torch

from kvedit.adapter.penalty import FrozenFactorPenalty, Penalty


def test_the_gradients_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, e = some(2, 3, 7), some(2, 5, 3), some(2, 3, 1)
    trained = tuple(part.requires_grad_() for part in (a, b, e))
    change = (b * e.mT) @ a
    for rank in (4, 0):
        left, right = some(2, 5, rank), some(2, rank, 7)
        expected = change.square().sum() + 2 * (change * (left @ right)).sum()
        torch.testing.assert_close(Penalty.apply(a, b, e, left, right), expected)
        assert torch.autograd.gradcheck(Penalty.apply, (*trained, left, right))
    side, squares = some(2, 3, 7).requires_grad_(), some(2, 3, 1).square()
    for along in (some(2, 3, 7), None):
        assert torch.autograd.gradcheck(FrozenFactorPenalty.apply, (side, e, along, squares))
