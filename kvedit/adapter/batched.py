"""Wrapped matrices of one shape, whose adapters are held and moved as one tensor.

A model has hundreds of matrices of four or five shapes, and a GPU that is given a kernel for each
of them waits for Python most of the time.  What all of one shape have in common is therefore done
for all of them at once: the coordinates of what is trained, its price, the factors, their
gradients.  PEFT's modules see their own part of it.

Invariants:
- A part is the module's own storage: who writes to one writes to the other.
- The matrices themselves, and roots that are matrices, are not copied: those are the large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors, times
from kvedit.adapter.penalty import FrozenFactorPenalty, Penalty

NAME = "edit"


@dataclass(slots=True)
class Slot:
    """One wrapped matrix: PEFT's module, and its place ``at`` in a stack."""

    module: Any
    stack: Stack
    at: int

    @property
    def edited(self) -> Tensor:
        """(out, in): the matrix with its change, in the dtype that the layer runs in."""
        return self.stack.edited[self.at]

    @property
    def e(self) -> Tensor:
        """(r, 1): PEFT's own singular values."""
        values: Tensor = self.module.lora_E[NAME]
        return values


@dataclass(slots=True)
class Stack:
    """``k`` wrapped matrices, (out, in), on one device, and what is trained of them: E, (k, r, 1),
    and the coordinates A', (k, r, in), and B', (k, out, r).

    ``lean``: the layers are matrices that a change can be added to, not quantised ones.
    """

    modules: Sequence[Any]
    lean: bool
    scale: float  # PEFT's, of B diag(E) A; read once, since a GPU is waited for to read it
    factor_a: Tensor = field(init=False)  # (k, r, in) and (k, out, r): PEFT's A and B
    factor_b: Tensor = field(init=False)
    e: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    edited: list[Tensor] = field(init=False)
    _left: _Sides = field(init=False)
    _right: _Sides = field(init=False)
    _linear_term: Tensor = field(init=False)  # (k, out, in): of earlier edits, on the change
    _weights: Sequence[Tensor] = field(init=False)  # (out, in): what the changes are added to
    _fresh: bool = True  # started, and not carried over into PEFT's modules yet
    # Of a frame's directions, where there is one: how the pull lies, (k, r, longer side), and the
    # square of their length, (k, r, 1).
    _along: tuple[Tensor, Tensor] | None = None
    # Of the sums W + B diag(E) A, (k, out, in), fp32, over the batches of a step; and of PEFT's
    # A and B.
    _slopes: Tensor | None = None
    _seen: set[int] = field(default_factory=set)
    _of_factors: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.factor_a = _joined([module.lora_A[NAME] for module in self.modules])
        self.factor_b = _joined([module.lora_B[NAME] for module in self.modules])
        self.e = _joined([module.lora_E[NAME] for module in self.modules]).requires_grad_()

    def start(
        self,
        whitening: Sequence[WhiteningFactors],
        gradients: Sequence[Tensor],
        penalty_gradient: Sequence[Tensor],
        weights: Sequence[Tensor],
        rank: int,
        *,
        frozen_factor: bool,
    ) -> None:
        """Set A', B' and E to where the gradients would have them begin: see ``Adapter.reset``."""
        self._left = _Sides([root.left for root in whitening])
        self._right = _Sides([_turned(root.right) for root in whitening])
        self._weights = weights
        pulls = (_into(own, root) for own, root in zip(penalty_gradient, whitening, strict=True))
        steep = (_into(own, root) for own, root in zip(gradients, whitening, strict=True))
        self._linear_term = torch.empty(
            len(weights), *weights[0].shape, dtype=torch.float32, device=self.e.device
        )
        for own, linear_term in zip(self._linear_term, pulls, strict=True):
            own.copy_(linear_term)
        found = [leading(one, min(rank, *one.shape)) for one in steep]
        self.a = torch.stack([_filled(v.T, self.e.shape[1]) for _, v in found])
        self.b = torch.stack([_filled(u.T, self.e.shape[1]).T for u, _ in found])
        with torch.no_grad():
            self.e.fill_(1.0 if frozen_factor else 0.0)
        out, into = self._linear_term.shape[1:]
        if frozen_factor and out <= into:
            self.a = torch.zeros_like(self.a).requires_grad_()
        elif frozen_factor:
            self.b = torch.zeros_like(self.b).requires_grad_()
        else:
            self.a.requires_grad_()
            self.b.requires_grad_()
        self.changed()

    def changed(self) -> None:
        """A', B' and E were set anew: what was made of a frame is not its own."""
        self._fresh, self._along = True, None

    @property
    def trained(self) -> list[Tensor]:
        """Of A' and B' what is no frame."""
        return [side for side in (self.a, self.b) if side.requires_grad]

    @property
    def frozen_factor(self) -> bool:
        """Whether one side stays what it is at the start."""
        return len(self.trained) == 1

    def penalty(self) -> Tensor:
        """|B' diag(E) A'|^2, and what the pull adds to it, a scalar.

        A frame's directions are orthonormal, or zero: nothing has to be multiplied out.
        """
        if not self.frozen_factor:
            both: Tensor = Penalty.apply(self.a, self.b, self.e, self._linear_term)  # type: ignore[no-untyped-call]
            return both
        ours = self.b.requires_grad
        side, frame = (self.b.mT, self.a) if ours else (self.a, self.b.mT)
        if self._along is None:
            linear_term = self._linear_term.mT if ours else self._linear_term
            self._along = frame @ linear_term, frame.square().sum(-1, keepdim=True)
        one: Tensor = FrozenFactorPenalty.apply(side, self.e, *self._along)  # type: ignore[no-untyped-call]
        return one

    def carry_over(self) -> None:
        """A' and B' as PEFT's A and B, a frame once, when it is set; and the edited matrices."""
        if self._fresh or self.a.requires_grad:
            self._right.back(self.a, self.factor_a)
        if self._fresh or self.b.requires_grad:
            self._left.back(self.b.mT, self.factor_b.mT)
        self._fresh = False
        if self.lean:
            scaled = self.factor_b * (self.e.mT * self.scale)
            self.edited = [
                torch.addmm(weight.float(), b, a).to(module.base_layer.weight.dtype)
                for module, weight, b, a in zip(
                    self.modules, self._weights, scaled, self.factor_a, strict=True
                )
            ]

    def add(self, at: int, slope: Tensor) -> None:
        """A batch's gradient (out, in) of an edited matrix."""
        if self._slopes is None:
            self._slopes = torch.empty_like(self._linear_term)
        if at in self._seen:
            self._slopes[at].add_(slope)
        else:
            self._slopes[at].copy_(slope)
        self._seen.add(at)

    def share_out(self) -> None:
        """The gradients of PEFT's A, B and E from those of the edited matrices."""
        if not self.lean:
            self._collect()
        if self._slopes is None:
            return
        for at in set(range(len(self.modules))) - self._seen:
            self._slopes[at].zero_()
        scaled = self.e.detach() * self.scale  # (k, r, 1)
        inner = self.factor_b.mT @ self._slopes  # (k, r, in)
        outer = self._slopes @ self.factor_a.mT  # (k, out, r)
        own = (inner * self.factor_a).sum(-1, keepdim=True) * self.scale
        self._of_factors = inner.mul_(scaled), outer.mul_(scaled.mT)
        _gather(self.e, own)
        self._slopes = None
        self._seen.clear()

    def _collect(self) -> None:
        """What autograd left with the modules of quantised layers."""
        kinds = [[getattr(m, kind)[NAME] for m in self.modules] for kind in _KINDS]
        if all(parameter.grad is None for kind in kinds for parameter in kind):
            return
        a, b, e = (
            torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in kind])
            for kind in kinds
        )
        self._of_factors = a, b
        _gather(self.e, e)
        for parameter in (p for kind in kinds for p in kind):
            parameter.grad = None

    def carry_back(self) -> None:
        """The gradients of PEFT's A and B as those of A' and B', of what is trained alone."""
        a, b = self.factor_gradients()
        if self.a.requires_grad:
            _gather(self.a, self._right.there(a))
        if self.b.requires_grad:
            _gather(self.b, self._left.there(b.mT).mT)

    def factor_gradients(self) -> tuple[Tensor, Tensor]:
        """(k, r, in) and (k, out, r): gradients of PEFT's A and B, zero where there were none."""
        if self._of_factors is None:
            self._of_factors = torch.zeros_like(self.factor_a), torch.zeros_like(self.factor_b)
        return self._of_factors

    def forget(self) -> None:
        """Drop gradients: a lesson that was broken off may have left some of a step behind."""
        self._slopes = self._of_factors = self.e.grad = None
        self._seen.clear()
        for module in self.modules:
            for kind in _KINDS:
                getattr(module, kind)[NAME].grad = None


_KINDS = ("lora_A", "lora_B", "lora_E")


class _Sides:
    """The roots of one side of each matrix, ``k`` matrices (n, n) or as many diagonals (n,).

    Diagonals are few numbers: a copy of all stands together.
    """

    def __init__(self, whitening: Sequence[Tensor]) -> None:
        self._whitening = whitening
        self._diagonals = torch.stack(list(whitening))[:, None] if whitening[0].ndim == 1 else None

    def there(self, sides: Tensor) -> Tensor:
        """(k, r, n): each times its root."""
        if self._diagonals is not None:
            return sides * self._diagonals
        return torch.stack([side @ root for side, root in zip(sides, self._whitening, strict=True)])

    def back(self, sides: Tensor, into: Tensor) -> None:
        """Write (k, r, n), each times the transpose of its root, into another tensor."""
        if self._diagonals is not None:
            torch.mul(sides, self._diagonals, out=into)
            return
        for side, root, place in zip(sides, self._whitening, into, strict=True):
            torch.mm(side, root.T, out=place)


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """All as one tensor (k, ...), fp32, of which each parameter is a part from now on."""
    whole = torch.stack([parameter.detach().float() for parameter in parameters])
    for parameter, part in zip(parameters, whole, strict=True):
        parameter.data = part
    return whole


def _into(gradient: Tensor, whitening: WhiteningFactors) -> Tensor:
    """A gradient with respect to D, (out, in), as one with respect to D'."""
    return times(times(gradient.T, whitening.left).T, _turned(whitening.right))


def _gather(side: Tensor, gradient: Tensor) -> None:
    """Add to a gradient."""
    side.grad = gradient if side.grad is None else side.grad + gradient


def _filled(rows: Tensor, count: int) -> Tensor:
    """(count, width): rows of zeros added, where a matrix has fewer directions than ranks."""
    spare = rows.new_zeros(count - len(rows), rows.shape[1])
    return torch.cat([rows, spare]).contiguous()


def _turned(root: Tensor) -> Tensor:
    """The transpose; a diagonal is its own."""
    return root if root.ndim == 1 else root.T
