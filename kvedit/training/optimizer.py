"""Steps of Polyak's length: one length for all matrices, by the loss that is to be gained.

Adam gives every number a step of the same length, so noise moves as far as signal.  In whitened
coordinates distance is harm to protected text, and Adam's steps cost a group of facts three times
the harm that it needed.  Here the gradient as a whole sets the direction.  The length is Polyak's
(B. T. Polyak, Introduction to Optimization, 1987): the loss to be gained over the steepness at the
start, so a model that holds facts already, where the same loss is further away, takes longer steps.
They shrink as the gradient does, and where it becomes steeper.

A single fact's loss can reach zero, so its steps need no setting for each model: ``PolyakGradient``
goes a share of the way to where it would be zero if it fell as steeply all the way.  A group's
loss does not, and its batches differ: ``PolyakMomentum`` measures its length once.

Invariants:
- The result depends on nothing but the gradients, in their order.
- Nothing is read back from an accelerator in a step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SQUARE_DECAY, STEP_DECAY = 0.9, 0.8  # of the running means of adaptive steps
MOMENTUM = 0.9
NORM_DECAY = 0.9  # of the running mean of the squared norm, at each step


class PolyakGradient(torch.optim.Optimizer):
    """``x -= lr * loss / <g, d> * d``, g the gradient of all parameters together, d the same.

    ``lr`` is the share of the loss that the step would take away if the loss were linear; 1 is
    Polyak's own step.  With ``adaptive`` d is g divided by its root mean square, number by number,
    as in Adam (Kingma and Ba 2014, arXiv:1412.6980), and steps are averaged: where a few small
    differences decide, the plain gradient goes back and forth.  ``momentum`` is the share of the
    step before that is taken again (B. T. Polyak, Some methods of speeding up the convergence of
    iteration methods, 1964), for steps that see a part of the loss each.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, adaptive: bool = False, momentum: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr})
        self._adaptive, self._momentum = adaptive, momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        """One step against the gradient; parameters without one stay.  ``closure`` gives the loss
        that the gradients are of.
        """
        moved = [(g["lr"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moved:
            return
        gradients = [p.grad for _, p in moved]
        if not self._adaptive:
            directions, slope = gradients, _square(gradients)
        else:
            directions = [self._scaled(p) for _, p in moved]
            slope = _product(gradients, directions)
        length = closure() / slope.clamp_min(torch.finfo(torch.float32).tiny)
        for (rate, parameter), direction in zip(moved, directions, strict=True):
            step = direction * (rate * length.to(parameter.device))
            if self._adaptive:
                step = self._averaged(parameter, step)
            elif self._momentum:
                step = self._continued(parameter, step)
            parameter.sub_(step)

    def _scaled(self, parameter: Tensor) -> Tensor:
        """The gradient divided by its root mean square over the last steps."""
        state: Any = self.state[parameter]
        gradient: Any = parameter.grad
        square = state.setdefault("square", torch.zeros_like(parameter))
        square.lerp_(gradient.square(), 1 - SQUARE_DECAY)
        state["steps"] = state.get("steps", 0) + 1
        unbiased = square / (1 - SQUARE_DECAY ** state["steps"])
        scaled: Tensor = gradient / unbiased.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return scaled

    def _continued(self, parameter: Tensor, step: Tensor) -> Tensor:
        """The step, and a share of the one before."""
        before: Tensor = self.state[parameter].setdefault("step", torch.zeros_like(parameter))
        return before.mul_(self._momentum).add_(step)

    def _averaged(self, parameter: Tensor, step: Tensor) -> Tensor:
        mean: Tensor = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        return mean.lerp_(step, 1 - STEP_DECAY)


class PolyakMomentum(torch.optim.Optimizer):
    """``x -= lr * m / (first * peak)``: m the running mean of gradients, of whose norms ``first``
    is the first and ``peak`` the largest.

    ``lr`` is in the loss's nats: what a step along the first gradient would gain.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step along the running mean; parameters without a gradient stay."""
        moved = [(g["lr"], p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moved:
            return
        steepness = self._steepness([p.grad for _, p in moved])
        for rate, parameter in moved:
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - MOMENTUM)
            parameter.sub_(mean * (rate / steepness.to(mean.device)))

    def _steepness(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together at first, times the largest so far, which is smoothed
        over a few steps.
        """
        square = _square(gradients)
        home = square.device
        # Of all parameters; kept in the first one's state, so that it is in ``state_dict``.
        norms = self.state[self.param_groups[0]["params"][0]]
        first, steep, peak = (norms.get(n, square).to(home) for n in ("first", "steep", "peak"))
        steep = steep.lerp(square, 1 - NORM_DECAY)
        peak = torch.maximum(peak, steep)
        norms.update(first=first, steep=steep, peak=peak)
        first = torch.where(first > 0, first, peak)
        return (first * peak).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _square(gradients: list[Tensor]) -> Tensor:
    """The squared norm of all gradients together, a scalar on the first one's device."""
    return _product(gradients, gradients)


def _product(ones: list[Tensor], others: list[Tensor]) -> Tensor:
    """The inner product of all tensors together, a scalar on the first one's device."""
    home = ones[0].device
    pairs = zip(ones, others, strict=True)
    return torch.stack([(one * other).sum().to(home) for one, other in pairs]).sum()
