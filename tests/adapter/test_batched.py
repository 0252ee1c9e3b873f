"""Batched adapters: each matrix has the factors, gradients and penalty it would have by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvedit.adapter.batched import NAME, BatchedAdapters
from kvedit.adapter.fisher import WhiteningFactors

COUNT, OUT, INTO, RANK, SCALE = 3, 5, 7, 4, 0.25


def some(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def wrapped(generator: torch.Generator) -> Any:
    """What batched adapters use of one of PEFT's modules."""
    sides = {"lora_A": (RANK, INTO), "lora_B": (OUT, RANK), "lora_E": (RANK, 1)}
    parts = {kind: {NAME: torch.nn.Parameter(torch.zeros(s))} for kind, s in sides.items()}
    return SimpleNamespace(base_layer=SimpleNamespace(weight=some(generator, OUT, INTO)), **parts)


class Setting:
    """Batched adapters with random values, and the same by a formula for each matrix."""

    def __init__(self, *, diagonal: bool, frozen_factor: bool, dense: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.modules = [wrapped(self.generator) for _ in range(COUNT)]
        self.weights = [module.base_layer.weight for module in self.modules]
        sides = ((OUT,), (INTO,)) if diagonal else ((OUT, OUT), (INTO, INTO))
        self.whitening = [
            WhiteningFactors(*(self.some(*side) for side in sides)) for _ in range(COUNT)
        ]
        self.penalty_gradient = [self.some(OUT, INTO) for _ in range(COUNT)]
        steep = [self.some(OUT, INTO) for _ in range(COUNT)]
        self.adapters = BatchedAdapters(self.modules, dense, SCALE)
        self.adapters.start(
            self.whitening,
            steep,
            self.penalty_gradient,
            self.weights,
            RANK,
            frozen_factor=frozen_factor,
        )
        with torch.no_grad():
            for part in (self.adapters.e, *self.adapters.trained):
                part.copy_(self.some(*part.shape))
            self.adapters.write_factors()

    def some(self, *shape: int) -> Tensor:
        return some(self.generator, *shape)

    def factors(self, at: int) -> tuple[Tensor, Tensor]:
        """B diag(E) and A of one matrix, with a gradient to what is trained."""
        left, right = (
            torch.diag(factor) if factor.ndim == 1 else factor
            for factor in (self.whitening[at].left, self.whitening[at].right)
        )
        adapters = self.adapters
        return (left @ adapters.b[at]) * adapters.e[at].T, adapters.a[at] @ right


@pytest.mark.parametrize("frozen_factor", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_each_matrix_is_edited_by_its_own_factors(diagonal: bool, frozen_factor: bool) -> None:
    setting = Setting(diagonal=diagonal, frozen_factor=frozen_factor)
    for at, module in enumerate(setting.modules):
        b, a = setting.factors(at)
        torch.testing.assert_close(module.lora_A[NAME].detach(), a.detach())
        expected = setting.weights[at] + SCALE * b @ a
        torch.testing.assert_close(setting.adapters.edited[at], expected.detach())


@pytest.mark.parametrize("frozen_factor", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients_are_those_of_each_matrix(diagonal: bool, frozen_factor: bool) -> None:
    """Summed over batches; a matrix that no batch reached has none."""
    setting = Setting(diagonal=diagonal, frozen_factor=frozen_factor)
    adapters = setting.adapters
    batches = [(0, setting.some(OUT, INTO)), (2, setting.some(OUT, INTO))]
    batches.append((0, setting.some(OUT, INTO)))
    asked = [adapters.e, *adapters.trained]
    loss = torch.zeros(())
    for at, gradient in batches:
        b, a = setting.factors(at)
        loss = loss + (SCALE * (b @ a) * gradient).sum()
    expected = torch.autograd.grad(loss, asked)
    with torch.no_grad():
        for at, gradient in batches:
            adapters.add_gradient(at, gradient)
        adapters.collect_gradients()
        adapters.read_gradients()
    for parameter, gradient in zip(asked, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    adapters.clear_gradients()
    assert adapters.e.grad is None
    assert not any(part.any() for part in adapters.factor_gradients())


def test_gradients_of_quantized_layers_are_collected() -> None:
    setting = Setting(diagonal=False, frozen_factor=False, dense=False)
    adapters, kinds = setting.adapters, ("lora_A", "lora_B", "lora_E")
    penalty_gradients = [
        [setting.some(*getattr(m, k)[NAME].shape) for k in kinds] for m in setting.modules
    ]
    for module, own in zip(setting.modules, penalty_gradients, strict=True):
        for kind, gradient in zip(kinds, own, strict=True):
            getattr(module, kind)[NAME].grad = gradient
    with torch.no_grad():
        adapters.collect_gradients()
        adapters.collect_gradients()  # counts them once
    found = (*adapters.factor_gradients(), adapters.e.grad)
    for at in range(COUNT):
        for part, gradient in zip(found, penalty_gradients[at], strict=True):
            assert part is not None
            assert torch.equal(part[at], gradient)


@pytest.mark.parametrize("frozen_factor", [False, True])
def test_the_penalty_is_the_sum_over_the_matrices(frozen_factor: bool) -> None:
    setting = Setting(diagonal=False, frozen_factor=frozen_factor)
    adapters, expected = setting.adapters, torch.zeros(())
    for at in range(COUNT):
        change = (adapters.b[at] * adapters.e[at].T) @ adapters.a[at]
        factor = setting.whitening[at]
        linear_term = factor.left.T @ setting.penalty_gradient[at] @ factor.right.T
        expected = expected + change.square().sum() + 2 * (change * linear_term).sum()
    torch.testing.assert_close(adapters.penalty(), expected, rtol=1e-4, atol=1e-3)
