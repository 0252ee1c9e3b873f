"""Batched adapters: each matrix has the factors, gradients and penalty it would have by itself."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvedit.adapter.batched import NAME, BatchedAdapters
from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors
from kvedit.adapter.start import Directions

COUNT, SHORT, LONG, RANK, SCALE = 3, 6, 8, 4, 0.25
TOKENS = 5


def some(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def wrapped(generator: torch.Generator, out: int, into: int) -> Any:
    """What batched adapters use of one of PEFT's modules."""
    sides = {"lora_A": (RANK, into), "lora_B": (out, RANK), "lora_E": (RANK, 1)}
    parts = {kind: {NAME: torch.nn.Parameter(torch.zeros(s))} for kind, s in sides.items()}
    return SimpleNamespace(**parts)


class Setting:
    """Batched adapters with random values, and the same by a formula for each matrix.

    ``tall``: more outputs than inputs, so that B is trained.  The last matrix has a rank less.
    """

    def __init__(self, *, tall: bool, blocks: bool = False, moved: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(0)
        out, into = (LONG, SHORT) if tall else (SHORT, LONG)
        self.out, self.into, self.tall = out, into, tall
        self.modules = [wrapped(self.generator, out, into) for _ in range(COUNT)]
        self.weights = [self.some(out, into) for _ in range(COUNT)]
        sides = ((2, out // 2), (2, into // 2)) if blocks else ((1, out), (1, into))
        self.whitening = [
            WhiteningFactors(*(self.some(k, width, width) for k, width in sides))
            for _ in range(COUNT)
        ]
        self.linear_terms = [self.some(out, into) if moved else None for _ in range(COUNT)]
        ranks = (RANK, RANK, RANK - 1)
        directions = [Directions(*leading(self.some(out, into), rank)) for rank in ranks]
        self.adapters = BatchedAdapters(self.modules, SCALE)
        multiplied = [partial(self.times_linear_term, at) for at in range(COUNT)]
        self.adapters.start(self.whitening, directions, multiplied)
        with torch.no_grad():
            values = self.some(*self.adapters.trained.shape)
            sizes = self.adapters.e.mT if tall else self.adapters.e
            self.adapters.trained.copy_(values * sizes)
            self.adapters.write_factors()

    def some(self, *shape: int) -> Tensor:
        return some(self.generator, *shape)

    def times_linear_term(self, at: int, rows: Tensor, of_outputs: bool) -> Tensor | None:
        term = self.linear_terms[at]
        return None if term is None else rows @ (term if of_outputs else term.T)

    def factors(self, at: int) -> tuple[Tensor, Tensor]:
        """B diag(E) and A of one matrix, with a gradient to what is trained."""
        left, right = (
            torch.block_diag(*factor)
            for factor in (self.whitening[at].left, self.whitening[at].right)
        )
        adapters = self.adapters
        return (left @ adapters.b[at]) * adapters.e[at].detach().T, adapters.a[at] @ right


either = pytest.mark.parametrize("tall", [False, True])


@either
@pytest.mark.parametrize("blocks", [False, True])
def test_each_matrix_is_edited_by_its_own_factors(blocks: bool, tall: bool) -> None:
    setting = Setting(blocks=blocks, tall=tall)
    x = setting.some(TOKENS, setting.into)
    for at, module in enumerate(setting.modules):
        b, a = setting.factors(at)
        torch.testing.assert_close(module.lora_A[NAME].detach(), a.detach())
        expected = x @ (setting.weights[at] + SCALE * b @ a).T
        found = setting.adapters.multiply(at, x, setting.weights[at])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@either
@pytest.mark.parametrize("blocks", [False, True])
def test_gradients_are_those_of_each_matrix(blocks: bool, tall: bool) -> None:
    """Summed over batches; a matrix that no batch reached has none."""
    setting = Setting(blocks=blocks, tall=tall)
    adapters = setting.adapters
    assert adapters.trained is (adapters.b if tall else adapters.a)
    sides = setting.into, setting.out
    batches = [(at, *(setting.some(TOKENS, side) for side in sides)) for at in (0, 2, 0)]
    loss = torch.zeros(())
    for at, x, gradient in batches:
        b, a = setting.factors(at)
        x.requires_grad_()
        loss = loss + ((x @ (setting.weights[at] + SCALE * b @ a).T) * gradient).sum()
    expected, *of_inputs = torch.autograd.grad(
        loss, [adapters.trained, *(x for _, x, _ in batches)]
    )
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for (at, x, gradient), of_x in zip(batches, of_inputs, strict=True):
            close(adapters.multiply_back(at, x, gradient, setting.weights[at]), of_x)
        adapters.read_gradient()
    close(adapters.trained.grad, expected)
    adapters.clear_gradients()
    assert adapters.trained.grad is None and not adapters.gradient().any()


@either
def test_processes_sum_all_that_is_trained(tall: bool) -> None:
    """Also of matrices that this process's texts did not reach, and in place."""
    setting = Setting(tall=tall)
    shapes = [part.shape for part in setting.adapters.gradients()]
    x, gradient = setting.some(TOKENS, setting.into), setting.some(TOKENS, setting.out)
    with torch.no_grad():
        assert setting.adapters.multiply_back(1, x, gradient, None) is None
    found = setting.adapters.gradients()
    assert [part.shape for part in found] == shapes and len(shapes) == 2
    assert found[0][1].any() and not found[0][0].any()
    for part in found:
        part.zero_()
    setting.adapters.read_gradient()
    assert setting.adapters.trained.grad is not None and not setting.adapters.trained.grad.any()


@either
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_penalty_is_the_sum_over_the_matrices(tall: bool, moved: bool, blocks: bool) -> None:
    """And so are its gradients."""
    setting = Setting(tall=tall, moved=moved, blocks=blocks)
    adapters, expected = setting.adapters, torch.zeros(())
    for at, linear_term in enumerate(setting.linear_terms):
        change = (adapters.b[at] * adapters.e[at].detach().T) @ adapters.a[at]
        expected = expected + change.square().sum()
        if linear_term is not None:
            b, a = setting.factors(at)
            expected = expected + 2 * ((b @ a) * linear_term).sum()
    found = adapters.penalty()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    (own,), (other,) = (torch.autograd.grad(one, [adapters.trained]) for one in (found, expected))
    used = (adapters.e.mT if tall else adapters.e).expand_as(own) > 0
    torch.testing.assert_close(own[used], other[used], rtol=1e-3, atol=1e-3)
