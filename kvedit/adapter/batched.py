"""Batched adapters: matrices of one shape whose adapters are one tensor.

A model has hundreds of matrices of four or five shapes, and a GPU that gets a kernel for each of
them mostly waits for Python.  Coordinates, penalty, factors and their gradients are therefore
computed for all matrices of a shape at once.  PEFT's modules see their own part of the tensors.

Invariants:
- A module's parameters are views of the batched tensors: who writes to one writes to the other.
- The matrices themselves, and whitening factors that are matrices, are not copied: they are large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors, times
from kvedit.adapter.penalty import FrozenFactorPenalty, Penalty

NAME = "edit"
_KINDS = ("lora_A", "lora_B", "lora_E")


@dataclass(slots=True)
class BatchedAdapters:
    """``k`` wrapped matrices, (out, in), on one device, and what is trained of them, all fp32: E
    (k, r, 1), and the coordinates A' (k, r, in) and B' (k, out, r).

    ``dense``: the layers are matrices that a change can be added to, not quantized ones.
    """

    modules: Sequence[Any]
    dense: bool
    scale: float  # PEFT's, of B diag(E) A; read once, because reading it waits for the GPU
    factor_a: Tensor = field(init=False)  # (k, r, in) and (k, out, r): PEFT's A and B
    factor_b: Tensor = field(init=False)
    e: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    edited: list[Tensor] = field(init=False)  # (out, in): with the change, in the layer's dtype
    _left: _Sides = field(init=False)
    _right: _Sides = field(init=False)
    _linear_term: Tensor = field(init=False)  # (k, out, in): the accumulated delta's gradient term
    _weights: Sequence[Tensor] = field(init=False)  # (out, in): what the changes are added to
    _factors_stale: bool = True  # PEFT's A and B are not computed from A' and B' yet
    # With a frozen factor: the gradient term along its directions, (k, r, longer side), and the
    # directions' squared lengths, (k, r, 1).
    _frozen_terms: tuple[Tensor, Tensor] | None = None
    # Gradients of the sums W + B diag(E) A, (k, out, in), fp32, over the batches of a step, the
    # indices that have one, and the gradients of PEFT's A and B.
    _gradients: Tensor | None = None
    _has_gradient: set[int] = field(default_factory=set)
    _factor_gradients: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.factor_a, self.factor_b, e = map(_joined, self._parameters())
        self.e = e.requires_grad_()

    def _parameters(self) -> list[list[Any]]:
        """PEFT's A, B and E of each module."""
        return [[getattr(module, kind)[NAME] for module in self.modules] for kind in _KINDS]

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
        """Set A', B' and E to their start by the gradients: see ``Adapter.reset``."""
        self._left = _Sides([factors.left for factors in whitening])
        self._right = _Sides([_transposed(factors.right) for factors in whitening])
        self._weights = weights
        shape = (len(weights), *weights[0].shape)
        self._linear_term = torch.empty(shape, dtype=torch.float32, device=self.e.device)
        for place, one, by in zip(self._linear_term, penalty_gradient, whitening, strict=True):
            place.copy_(_whitened(one, by))
        steep = (_whitened(one, by) for one, by in zip(gradients, whitening, strict=True))
        vectors = [leading(one, min(rank, *one.shape)) for one in steep]
        self.a = torch.stack([_padded(v.T, self.e.shape[1]) for _, v in vectors])
        self.b = torch.stack([_padded(u.T, self.e.shape[1]).T for u, _ in vectors])
        with torch.no_grad():
            self.e.fill_(1.0 if frozen_factor else 0.0)
        trained = [self.a, self.b]
        if frozen_factor:
            out, into = self._linear_term.shape[1:]
            trained = [self.a.zero_() if out <= into else self.b.zero_()]
        for side in trained:
            side.requires_grad_()
        self.values_changed()

    def values_changed(self) -> None:
        """Drop what was computed from a frozen factor: A', B' and E were set from outside."""
        self._factors_stale, self._frozen_terms = True, None

    @property
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """E, A' and B'."""
        return self.e, self.a, self.b

    @property
    def trained(self) -> list[Tensor]:
        """A' and B', without a frozen factor."""
        return [side for side in (self.a, self.b) if side.requires_grad]

    @property
    def has_frozen_factor(self) -> bool:
        """Whether one side keeps its start."""
        return len(self.trained) == 1

    def penalty(self) -> Tensor:
        """|B' diag(E) A'|^2 and the gradient term, a scalar.

        The directions of a frozen factor are orthonormal, or zero: their product is not needed.
        """
        if not self.has_frozen_factor:
            both: Tensor = Penalty.apply(self.a, self.b, self.e, self._linear_term)  # type: ignore[no-untyped-call]
            return both
        trains_b = self.b.requires_grad
        side, frozen = (self.b.mT, self.a) if trains_b else (self.a, self.b.mT)
        if self._frozen_terms is None:
            linear_term = self._linear_term.mT if trains_b else self._linear_term
            self._frozen_terms = frozen @ linear_term, frozen.square().sum(-1, keepdim=True)
        one: Tensor = FrozenFactorPenalty.apply(side, self.e, *self._frozen_terms)  # type: ignore[no-untyped-call]
        return one

    def write_factors(self) -> None:
        """Compute PEFT's A and B (a frozen one only once) and the edited matrices."""
        if self._factors_stale or self.a.requires_grad:
            self._right.write_transposed(self.a, self.factor_a)
        if self._factors_stale or self.b.requires_grad:
            self._left.write_transposed(self.b.mT, self.factor_b.mT)
        self._factors_stale = False
        if self.dense:
            scaled = self.factor_b * (self.e.mT * self.scale)
            parts = zip(self.modules, self._weights, scaled, self.factor_a, strict=True)
            self.edited = [
                torch.addmm(weight.float(), b, a).to(module.base_layer.weight.dtype)
                for module, weight, b, a in parts
            ]

    def add_gradient(self, at: int, gradient: Tensor) -> None:
        """Add a batch's gradient (out, in) of an edited matrix."""
        if self._gradients is None:
            self._gradients = torch.empty_like(self._linear_term)
        if at in self._has_gradient:
            self._gradients[at].add_(gradient)
        else:
            self._gradients[at].copy_(gradient)
        self._has_gradient.add(at)

    def collect_gradients(self) -> None:
        """Compute the gradients of PEFT's A, B and E from those of the edited matrices."""
        if not self.dense:
            self._collect_from_modules()
        if self._gradients is None:
            return
        for at in set(range(len(self.modules))) - self._has_gradient:
            self._gradients[at].zero_()
        scaled = self.e.detach() * self.scale  # (k, r, 1)
        inner = self.factor_b.mT @ self._gradients  # (k, r, in)
        outer = self._gradients @ self.factor_a.mT  # (k, out, r)
        of_e = (inner * self.factor_a).sum(-1, keepdim=True) * self.scale
        self._factor_gradients = inner.mul_(scaled), outer.mul_(scaled.mT)
        _add_gradient(self.e, of_e)
        self._gradients = None
        self._has_gradient.clear()

    def _collect_from_modules(self) -> None:
        """Take the gradients that autograd left in the modules of quantized layers."""
        kinds = self._parameters()
        if all(parameter.grad is None for parameter in chain(*kinds)):
            return
        a, b, e = (
            torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in kind])
            for kind in kinds
        )
        self._factor_gradients = a, b
        _add_gradient(self.e, e)
        for parameter in chain(*kinds):
            parameter.grad = None

    def read_gradients(self) -> None:
        """Compute the gradients of what is trained of A' and B' from those of PEFT's A and B."""
        a, b = self.factor_gradients()
        if self.a.requires_grad:
            _add_gradient(self.a, self._right.times(a))
        if self.b.requires_grad:
            _add_gradient(self.b, self._left.times(b.mT).mT)

    def factor_gradients(self) -> tuple[Tensor, Tensor]:
        """(k, r, in) and (k, out, r): gradients of PEFT's A and B, zero where there were none."""
        if self._factor_gradients is None:
            a, b = self.factor_a, self.factor_b
            self._factor_gradients = torch.zeros_like(a), torch.zeros_like(b)
        return self._factor_gradients

    def clear_gradients(self) -> None:
        """Drop all gradients; interrupted training may have left some of a step behind."""
        self._gradients = self._factor_gradients = self.e.grad = None
        self._has_gradient.clear()
        for parameter in chain(*self._parameters()):
            parameter.grad = None


class _Sides:
    """The whitening factors of one side: ``k`` matrices (n, n), or ``k`` diagonals (n,), which are
    small and copied into one tensor.
    """

    def __init__(self, whitening: Sequence[Tensor]) -> None:
        self._whitening = whitening
        self._diagonals = torch.stack(list(whitening))[:, None] if whitening[0].ndim == 1 else None

    def times(self, sides: Tensor) -> Tensor:
        """(k, r, n): each times its factor."""
        if self._diagonals is not None:
            return sides * self._diagonals
        return torch.stack([side @ by for side, by in zip(sides, self._whitening, strict=True)])

    def write_transposed(self, sides: Tensor, out: Tensor) -> None:
        """Write (k, r, n), each times the transpose of its factor, into another tensor."""
        if self._diagonals is not None:
            torch.mul(sides, self._diagonals, out=out)
            return
        for side, by, place in zip(sides, self._whitening, out, strict=True):
            torch.mm(side, by.T, out=place)


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor (k, ...), fp32, of which each parameter is a view from now on."""
    batched = torch.stack([parameter.detach().float() for parameter in parameters])
    for parameter, part in zip(parameters, batched, strict=True):
        parameter.data = part
    return batched


def _whitened(gradient: Tensor, whitening: WhiteningFactors) -> Tensor:
    """A gradient with respect to D, (out, in), as one with respect to D'."""
    return times(times(gradient.T, whitening.left).T, _transposed(whitening.right))


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _padded(rows: Tensor, count: int) -> Tensor:
    """(count, width): with rows of zeros, where a matrix has fewer directions than ranks."""
    zeros = rows.new_zeros(count - len(rows), rows.shape[1])
    return torch.cat([rows, zeros]).contiguous()


def _transposed(factor: Tensor) -> Tensor:
    """The transpose; a diagonal is its own."""
    return factor if factor.ndim == 1 else factor.T
