"""Matrices of one shape held as one tensor: each has the factors, the slopes and the price that it
would have by itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvedit.adapter.batched import NAME, Stack
from kvedit.adapter.fisher import WhiteningFactors

COUNT, OUT, INTO, RANK, SCALE = 3, 5, 7, 4, 0.25


def some(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def wrapped(generator: torch.Generator) -> Any:
    """What a stack asks of a module of PEFT's."""
    sides = {"lora_A": (RANK, INTO), "lora_B": (OUT, RANK), "lora_E": (RANK, 1)}
    parts = {kind: {NAME: torch.nn.Parameter(torch.zeros(s))} for kind, s in sides.items()}
    return SimpleNamespace(base_layer=SimpleNamespace(weight=some(generator, OUT, INTO)), **parts)


class Setting:
    """A stack that was started, its values moved; and the same by a formula for each matrix."""

    def __init__(self, *, diagonal: bool, frozen_factor: bool, lean: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.modules = [wrapped(self.generator) for _ in range(COUNT)]
        self.weights = [module.base_layer.weight for module in self.modules]
        sides = ((OUT,), (INTO,)) if diagonal else ((OUT, OUT), (INTO, INTO))
        self.whitening = [
            WhiteningFactors(*(self.some(*side) for side in sides)) for _ in range(COUNT)
        ]
        self.penalty_gradient = [self.some(OUT, INTO) for _ in range(COUNT)]
        steep = [self.some(OUT, INTO) for _ in range(COUNT)]
        self.stack = Stack(self.modules, lean, SCALE)
        self.stack.start(
            self.whitening,
            steep,
            self.penalty_gradient,
            self.weights,
            RANK,
            frozen_factor=frozen_factor,
        )
        with torch.no_grad():
            for part in (self.stack.e, *self.stack.trained):
                part.copy_(self.some(*part.shape))
            self.stack.carry_over()

    def some(self, *shape: int) -> Tensor:
        return some(self.generator, *shape)

    def factors(self, at: int) -> tuple[Tensor, Tensor]:
        """B diag(E) and A of one matrix, with a gradient to what is trained."""
        left, right = (
            torch.diag(root) if root.ndim == 1 else root
            for root in (self.whitening[at].left, self.whitening[at].right)
        )
        stack = self.stack
        return (left @ stack.b[at]) * stack.e[at].T, stack.a[at] @ right


@pytest.mark.parametrize("frozen_factor", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_each_matrix_is_edited_by_its_own_factors(diagonal: bool, frozen_factor: bool) -> None:
    setting = Setting(diagonal=diagonal, frozen_factor=frozen_factor)
    for at, module in enumerate(setting.modules):
        b, a = setting.factors(at)
        torch.testing.assert_close(module.lora_A[NAME].detach(), a.detach())
        wanted = setting.weights[at] + SCALE * b @ a
        torch.testing.assert_close(setting.stack.edited[at], wanted.detach())


@pytest.mark.parametrize("frozen_factor", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_slopes_are_those_of_each_matrix(diagonal: bool, frozen_factor: bool) -> None:
    """Summed over batches; a matrix that no batch reached has none."""
    setting = Setting(diagonal=diagonal, frozen_factor=frozen_factor)
    stack = setting.stack
    batches = [(0, setting.some(OUT, INTO)), (2, setting.some(OUT, INTO))]
    batches.append((0, setting.some(OUT, INTO)))
    asked = [stack.e, *stack.trained]
    loss = torch.zeros(())
    for at, slope in batches:
        b, a = setting.factors(at)
        loss = loss + (SCALE * (b @ a) * slope).sum()
    wanted = torch.autograd.grad(loss, asked)
    with torch.no_grad():
        for at, slope in batches:
            stack.add(at, slope)
        stack.share_out()
        stack.carry_back()
    for parameter, slope in zip(asked, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-5)
    stack.forget()
    assert stack.e.grad is None
    assert not any(part.any() for part in stack.factor_gradients())


def test_what_autograd_left_with_a_quantised_layer_is_taken_over() -> None:
    setting = Setting(diagonal=False, frozen_factor=False, lean=False)
    stack, kinds = setting.stack, ("lora_A", "lora_B", "lora_E")
    penalty_gradients = [
        [setting.some(*getattr(m, k)[NAME].shape) for k in kinds] for m in setting.modules
    ]
    for module, own in zip(setting.modules, penalty_gradients, strict=True):
        for kind, slope in zip(kinds, own, strict=True):
            getattr(module, kind)[NAME].grad = slope
    with torch.no_grad():
        stack.share_out()
        stack.share_out()  # counts them once
    found = (*stack.factor_gradients(), stack.e.grad)
    for at in range(COUNT):
        for part, slope in zip(found, penalty_gradients[at], strict=True):
            assert part is not None
            assert torch.equal(part[at], slope)


@pytest.mark.parametrize("frozen_factor", [False, True])
def test_the_price_is_the_sum_of_the_matrices_prices(frozen_factor: bool) -> None:
    setting = Setting(diagonal=False, frozen_factor=frozen_factor)
    stack, wanted = setting.stack, torch.zeros(())
    for at in range(COUNT):
        change = (stack.b[at] * stack.e[at].T) @ stack.a[at]
        root = setting.whitening[at]
        linear_term = root.left.T @ setting.penalty_gradient[at] @ root.right.T
        wanted = wanted + change.square().sum() + 2 * (change * linear_term).sum()
    torch.testing.assert_close(stack.penalty(), wanted, rtol=1e-4, atol=1e-3)
