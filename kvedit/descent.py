"""Gradient descent with momentum, one length of step for all matrices.

Adam gives every number a step of the same length, so what is noise moves as far as what is needed.
In the coordinates of ``curvature`` distance is harm to what must stay, and such steps cost a group
of facts three times what it needed.  Here the gradient as a whole sets the direction, and its
largest norm so far the length: a step is ``lr`` long, in the root of the price's nats, as long as
the gradient is at its steepest, and shrinks as it does.

Invariants:
- The result depends on nothing but the gradients, in their order.
- Nothing is read back from an accelerator in a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
REMEMBERED = 0.9  # of the mean squared norm, a step


class Descent(torch.optim.Optimizer):
    """``x -= lr * m / peak``: m the running mean of gradients, peak the largest of their norms."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self._mean: Tensor | None = None
        self._peak: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the running mean; parameters without a gradient stay."""
        moved = [(g["lr"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moved:
            return
        longest = self._longest([p.grad for _, p in moved])
        for rate, parameter in moved:
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - MOMENTUM)
            parameter.sub_(mean * (rate / longest.to(mean.device)))

    def _longest(self, gradients: list[Tensor]) -> Tensor:
        """The largest norm so far of all gradients together, smoothed over a few steps."""
        home = gradients[0].device
        square = torch.stack([g.square().sum().to(home) for g in gradients]).sum()
        self._mean = square if self._mean is None else self._mean.lerp(square, 1 - REMEMBERED)
        self._peak = self._mean if self._peak is None else torch.maximum(self._peak, self._mean)
        return self._peak.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
