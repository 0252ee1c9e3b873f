"""Half-precision products of other libraries on a CPU that is slow at them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kvedit.model import upcast
from tests.bench.products import Products


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is slow at half precision, whatever this one is."""
    monkeypatch.setattr(upcast, "is_slow", lambda dtype: dtype in upcast.HALF)


def test_full_precision_is_left_alone() -> None:
    one = torch.randn(3, 4)
    with Products():
        assert torch.equal(one @ one.T, upcast.product(one, one.T))


def test_products_of_others_are_rounded_once() -> None:
    one, other = torch.randn(5, 40).bfloat16(), torch.randn(40, 5).bfloat16()
    more = torch.randn(5, 5).bfloat16()
    with Products():
        multiplied, added = one @ other, torch.addmm(more, one, other, beta=2.0, alpha=-3.0)
    assert torch.equal(multiplied, upcast.product(one, other))
    exact = 2.0 * more.double() - 3.0 * (one.double() @ other.double())
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(added.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_muon_takes_the_same_step() -> None:
    """It makes its directions orthogonal by products of bf16 matrices, wherever it runs."""
    weights = []
    for context in (Products(), nullcontext()):
        weight = nn.Parameter(torch.linspace(-1, 1, 48).reshape(6, 8))
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Muon([weight], lr=0.02)
        with context:
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-3, rtol=0)
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 48).reshape(6, 8))
