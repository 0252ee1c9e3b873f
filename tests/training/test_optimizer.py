"""The optimizers: how long their steps are, and which way they go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.training.optimizer import PolyakGradient, PolyakMomentum


def parameters(*widths: int) -> list[torch.Tensor]:
    return [torch.zeros(width, requires_grad=True) for width in widths]


def step(optimizer: PolyakMomentum, sides: list[torch.Tensor], *gradients: torch.Tensor) -> float:
    """Take a step; returns its length over all parameters together."""
    before = [side.detach().clone() for side in sides]
    for side, gradient in zip(sides, gradients, strict=True):
        side.grad = gradient
    optimizer.step()
    moved = torch.cat([side.detach() - old for side, old in zip(sides, before, strict=True)])
    return float(moved.norm())


@given(scale=st.floats(1e-3, 1e3))
@settings(deadline=None)  # the first optimizer of a process imports much of torch
def test_a_steady_gradient_gives_steps_that_gain_the_rate(scale: float) -> None:
    sides = parameters(3, 5)
    optimizer = PolyakMomentum(sides, lr=0.02)
    penalty_gradients = torch.full((3,), scale), torch.full((5,), 2 * scale)
    for _ in range(80):
        length = step(optimizer, sides, *penalty_gradients)
    assert length * float(torch.cat(penalty_gradients).norm()) == pytest.approx(0.02, rel=1e-2)


def test_steps_shrink_with_the_gradient() -> None:
    sides = parameters(4)
    optimizer = PolyakMomentum(sides, lr=0.02)
    for _ in range(60):
        step(optimizer, sides, torch.ones(4))
    for _ in range(120):
        length = step(optimizer, sides, torch.full((4,), 0.01))
    assert length == pytest.approx(0.0001, rel=0.05)


def test_no_step_is_longer_than_the_first_way_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = parameters(6, 2)
    optimizer = PolyakMomentum(sides, lr=0.1)
    first = 0.0
    for _ in range(50):
        size = float(torch.rand(1, generator=generator))
        draws = [size * torch.randn(width, generator=generator) for width in (6, 2)]
        first = first or float(torch.cat(draws).norm())
        assert step(optimizer, sides, *draws) * first <= 0.1


def test_a_steep_stretch_shortens_all_later_steps() -> None:
    sides = parameters(4)
    optimizer = PolyakMomentum(sides, lr=0.02)
    for slope, times in ((1.0, 60), (5.0, 60), (1.0, 120)):
        for _ in range(times):
            length = step(optimizer, sides, torch.full((4,), slope))
    assert length == pytest.approx(0.02 * 2 / (2 * 10), rel=0.05)


def test_a_matrix_with_a_small_gradient_moves_little() -> None:
    """Adam would move both alike."""
    sides = parameters(1, 1)
    optimizer = PolyakMomentum(sides, lr=0.1)
    for _ in range(20):
        step(optimizer, sides, torch.tensor([1.0]), torch.tensor([0.01]))
    assert float(sides[1].detach() / sides[0].detach()) == pytest.approx(0.01, rel=1e-3)


def test_noise_cancels_where_a_steady_slope_adds_up() -> None:
    sides = parameters(2)
    optimizer = PolyakMomentum(sides, lr=0.01)
    for number in range(100):
        step(optimizer, sides, torch.tensor([0.1, 1.0 if number % 2 else -1.0]))
    steady, noisy = sides[0].detach().abs().tolist()
    assert steady > 5 * noisy


def test_it_finds_the_lowest_point_of_a_bowl() -> None:
    sides = parameters(2)
    optimizer = PolyakMomentum(sides, lr=0.1)
    goal = torch.tensor([0.5, -0.3])
    for _ in range(400):
        step(optimizer, sides, sides[0].detach() - goal)
    assert torch.allclose(sides[0].detach(), goal, atol=1e-3)


def test_without_gradients_nothing_moves() -> None:
    sides = parameters(2)
    optimizer = PolyakMomentum(sides, lr=0.1)
    optimizer.step()
    assert float(sides[0].detach().norm()) == 0.0


def test_a_straight_loss_is_gained_by_the_share_that_the_rate_says() -> None:
    """Whatever the gradient's scale: there is no setting for each model."""
    for scale in (1e-3, 1.0, 1e3):
        sides = parameters(3, 5)
        slopes = torch.full((3,), scale), torch.full((5,), -2 * scale)
        optimizer = PolyakGradient(sides, lr=0.7)
        for side, slope in zip(sides, slopes, strict=True):
            side.grad = slope
        optimizer.step(lambda: 4.0)
        gained = -sum(float(s.detach() @ g) for s, g in zip(sides, slopes, strict=True))
        assert gained == pytest.approx(0.7 * 4.0, rel=1e-5)


def test_without_a_gradient_nothing_moves() -> None:
    sides = parameters(3)
    optimizer = PolyakGradient(sides, lr=0.7)
    optimizer.step(lambda: 1.0)
    sides[0].grad = torch.zeros(3)
    optimizer.step(lambda: 1.0)
    assert not sides[0].any()


def test_an_adaptive_step_gains_its_share_whatever_the_scale_of_a_number() -> None:
    """Numbers with small and large gradients move alike; the average holds back the first step."""
    for scale in (1e-3, 1e3):
        sides = parameters(2)
        optimizer = PolyakGradient(sides, lr=0.5, adaptive=True)
        sides[0].grad = torch.tensor([scale, -100 * scale])
        optimizer.step(lambda: 3.0)
        moved = sides[0].detach()
        assert float(moved[0]) == pytest.approx(-float(moved[1]), rel=1e-4)
        gained = -float(moved @ sides[0].grad)
        assert gained == pytest.approx(0.2 * 0.5 * 3.0, rel=1e-4)


def test_with_momentum_a_share_of_the_step_before_is_taken_again() -> None:
    sides = parameters(1)
    optimizer = PolyakGradient(sides, lr=1.0, momentum=0.5)
    moves = []
    for _ in range(3):
        before = float(sides[0].detach())
        sides[0].grad = torch.ones(1)
        optimizer.step(lambda: 1.0)
        moves.append(before - float(sides[0].detach()))
    assert moves == pytest.approx([1.0, 1.5, 1.75])
