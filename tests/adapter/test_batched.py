"""Batched adapters: each matrix has the factors, gradients and penalty it would have by itself."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvedit.adapter import batched
from kvedit.adapter.batched import NAME, BatchedAdapters
from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors
from kvedit.adapter.start import Directions

COUNT, OUT, INTO, RANK, SCALE = 3, 6, 8, 4, 0.25
TOKENS = 5


def some(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def wrapped(generator: torch.Generator) -> Any:
    """What batched adapters use of one of PEFT's modules."""
    sides = {"lora_A": (RANK, INTO), "lora_B": (OUT, RANK), "lora_E": (RANK, 1)}
    parts = {kind: {NAME: torch.nn.Parameter(torch.zeros(s))} for kind, s in sides.items()}
    return SimpleNamespace(**parts)


class Setting:
    """Batched adapters with random values, and the same by a formula for each matrix."""

    def __init__(self, *, blocks: bool, frozen_factor: bool, moved: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.modules = [wrapped(self.generator) for _ in range(COUNT)]
        self.weights = [self.some(OUT, INTO) for _ in range(COUNT)]
        sides = ((2, OUT // 2), (4, INTO // 4)) if blocks else ((1, OUT), (1, INTO))
        self.whitening = [
            WhiteningFactors(*(self.some(k, width, width) for k, width in sides))
            for _ in range(COUNT)
        ]
        self.linear_terms = [self.some(OUT, INTO) if moved else None for _ in range(COUNT)]
        directions = [Directions(*leading(self.some(OUT, INTO), RANK)) for _ in range(COUNT)]
        self.adapters = BatchedAdapters(self.modules, SCALE)
        self.adapters.start(
            self.whitening,
            directions,
            [partial(self.linear_terms.__getitem__, at) for at in range(COUNT)],
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
            torch.block_diag(*factor)
            for factor in (self.whitening[at].left, self.whitening[at].right)
        )
        adapters = self.adapters
        return (left @ adapters.b[at]) * adapters.e[at].T, adapters.a[at] @ right


both = pytest.mark.parametrize("blocks", [False, True])
frozen = pytest.mark.parametrize("frozen_factor", [False, True])


@both
@frozen
def test_each_matrix_is_edited_by_its_own_factors(blocks: bool, frozen_factor: bool) -> None:
    setting = Setting(blocks=blocks, frozen_factor=frozen_factor)
    x = setting.some(TOKENS, INTO)
    for at, module in enumerate(setting.modules):
        b, a = setting.factors(at)
        torch.testing.assert_close(module.lora_A[NAME].detach(), a.detach())
        expected = x @ (setting.weights[at] + SCALE * b @ a).T
        found = setting.adapters.multiply(at, x, setting.weights[at])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@both
@frozen
def test_gradients_are_those_of_each_matrix(blocks: bool, frozen_factor: bool) -> None:
    """Summed over batches; a matrix that no batch reached has none."""
    setting = Setting(blocks=blocks, frozen_factor=frozen_factor)
    adapters = setting.adapters
    batches = [(at, setting.some(TOKENS, INTO), setting.some(TOKENS, OUT)) for at in (0, 2, 0)]
    asked = [*adapters.trained] if frozen_factor else [adapters.e, *adapters.trained]
    loss = torch.zeros(())
    for at, x, gradient in batches:
        b, a = setting.factors(at)
        x.requires_grad_()
        loss = loss + ((x @ (setting.weights[at] + SCALE * b @ a).T) * gradient).sum()
    expected = torch.autograd.grad(loss, [*asked, *(x for _, x, _ in batches)])
    with torch.no_grad():
        of_inputs = [
            adapters.multiply_back(at, x, gradient, setting.weights[at])
            for at, x, gradient in batches
        ]
        adapters.read_gradients()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(asked, expected, strict=False):
        close(parameter.grad, gradient)
    for found, gradient in zip(of_inputs, expected[len(asked) :], strict=True):
        close(found, gradient)
    adapters.clear_gradients()
    assert adapters.e.grad is None
    assert not any(part.any() for part in adapters.factor_gradients())


@frozen
def test_processes_sum_all_that_is_trained(frozen_factor: bool) -> None:
    """Also of matrices that this process's texts did not reach."""
    setting = Setting(blocks=False, frozen_factor=frozen_factor)
    shapes = [tuple(part.shape) for part in setting.adapters.gradients()]
    assert len(shapes) == (2 if frozen_factor else 6)
    with torch.no_grad():
        setting.adapters.multiply_back(
            1, setting.some(TOKENS, INTO), setting.some(TOKENS, OUT), None
        )
    found = setting.adapters.gradients()
    assert [tuple(part.shape) for part in found] == shapes
    assert any(part[1].any() for part in found) and not any(part[0].any() for part in found)


@frozen
@pytest.mark.parametrize("moved", [False, True])
def test_the_penalty_is_the_sum_over_the_matrices(frozen_factor: bool, moved: bool) -> None:
    setting = Setting(blocks=False, frozen_factor=frozen_factor, moved=moved)
    adapters, expected = setting.adapters, torch.zeros(())
    for at, linear_term in enumerate(setting.linear_terms):
        change = (adapters.b[at] * adapters.e[at].T) @ adapters.a[at]
        expected = expected + change.square().sum()
        if linear_term is not None:
            expected = expected + 2 * (change * linear_term).sum()
    torch.testing.assert_close(adapters.penalty(), expected, rtol=1e-4, atol=1e-3)


def test_of_large_gradient_terms_the_leading_directions_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three directions of which one is small; a matrix that was not moved has none."""
    monkeypatch.setattr(batched, "LINEAR_RANK", 2)
    setting = Setting(blocks=False, frozen_factor=False)
    u, v = (torch.linalg.qr(setting.some(side, 3))[0] for side in (OUT, INTO))
    sizes = torch.tensor([5.0, 3.0, 1e-3])
    setting.linear_terms[0], setting.linear_terms[1] = (u * sizes) @ v.T, None
    left, right = setting.adapters._low_rank()
    assert left.shape == (COUNT, OUT, 2)
    torch.testing.assert_close(left[0] @ right[0], setting.linear_terms[0], rtol=0, atol=2e-3)
    assert not (left[1] @ right[1]).any()
