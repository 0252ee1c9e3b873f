"""Batched adapters: matrices of one shape whose adapters are one tensor.

A model has hundreds of matrices of four or five shapes, and a GPU that gets a kernel for each of
them mostly waits for Python.  Coordinates, penalty, factors and their optimizer are therefore
computed for all matrices of a shape at once.  PEFT's modules see their own part of the tensors.

Invariants:
- A module's parameters are views of the batched tensors: who writes to one writes to the other.
- Nothing has the size of a matrix; the matrices and their whitening factors are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvedit.adapter.deltas import leading
from kvedit.adapter.fisher import WhiteningFactors, times
from kvedit.adapter.penalty import FrozenFactorPenalty, Penalty
from kvedit.adapter.start import Directions

NAME = "edit"
LINEAR_RANK = 64
"""Of an accumulated delta's gradient term, for single facts: eight edits of eight ranks are kept
exactly, and of more the leading directions."""
_KINDS = ("lora_A", "lora_B", "lora_E")
LinearTerm = Callable[[], Tensor | None]
"""Computes the accumulated delta's whitened gradient term of a matrix, (out, in); None for zero."""


@dataclass(slots=True)
class BatchedAdapters:
    """``k`` wrapped matrices, (out, in), on one device, and what is trained of them, all fp32: E
    (k, r, 1), and the coordinates A' (k, r, in) and B' (k, out, r).
    """

    modules: Sequence[Any]
    scale: float  # PEFT's, of B diag(E) A; read once, because reading it waits for the GPU
    factor_a: Tensor = field(init=False)  # (k, r, in) and (k, out, r): PEFT's A and B
    factor_b: Tensor = field(init=False)
    e: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    # Whitening factors as blocks (blocks, width, width): a row of A' or of B'^T times them is a row
    # of A or of B^T.
    _to_a: Sequence[Tensor] = field(init=False)
    _to_b: Sequence[Tensor] = field(init=False)
    _linear_terms: Sequence[LinearTerm] = field(init=False)
    # What the penalty needs of the linear terms: see ``_low_rank`` and ``_of_frozen``.
    _penalty_terms: tuple[Tensor | None, Tensor] | None = None
    _factors_stale: bool = True  # PEFT's A and B are not computed from A' and B' yet
    # Of the loss over the batches of a step: gradients of E and of PEFT's A and B, if trained.
    _factor_gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = ([getattr(one, kind)[NAME] for one in self.modules] for kind in _KINDS)
        self.factor_a, self.factor_b, e = map(_joined, parameters)
        self.e = e.requires_grad_()

    def start(
        self,
        whitening: Sequence[WhiteningFactors],
        directions: Sequence[Directions],
        linear_terms: Sequence[LinearTerm],
        *,
        frozen_factor: bool,
    ) -> None:
        """Set A', B' and E to their start: see ``Adapter.reset``."""
        self._to_a = [factors.right for factors in whitening]
        self._to_b = [factors.left.mT for factors in whitening]
        self._linear_terms, rank = linear_terms, self.e.shape[1]
        self.a = torch.stack([_padded(one.right.T, rank) for one in directions])
        self.b = torch.stack([_padded(one.left.T, rank).T for one in directions])
        with torch.no_grad():
            self.e.fill_(1.0 if frozen_factor else 0.0)
        trained = [self.a, self.b]
        if frozen_factor:
            trains_a = self.b.shape[1] <= self.a.shape[2]
            trained = [self.a.zero_() if trains_a else self.b.zero_()]
        for side in trained:
            side.requires_grad_()
        self.values_changed()

    def values_changed(self) -> None:
        """Drop what was computed from a frozen factor: A', B' and E were set from outside."""
        self._factors_stale, self._penalty_terms = True, None

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
        if self._penalty_terms is None:
            with torch.no_grad():
                compute = self._of_frozen if self.has_frozen_factor else self._low_rank
                self._penalty_terms = compute()
        if not self.has_frozen_factor:
            both: Tensor = Penalty.apply(self.a, self.b, self.e, *self._penalty_terms)  # type: ignore[no-untyped-call]
            return both
        side = self.b.mT if self.b.requires_grad else self.a
        one: Tensor = FrozenFactorPenalty.apply(side, self.e, *self._penalty_terms)  # type: ignore[no-untyped-call]
        return one

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """The linear terms as (k, out, q) @ (k, q, in): their leading directions, q zero if there
        are none.
        """
        count, out, into = len(self._linear_terms), self.b.shape[1], self.a.shape[2]
        left, right = self.b.new_zeros(count, out, 0), self.a.new_zeros(count, 0, into)
        for at, read in enumerate(self._linear_terms):
            if (term := read()) is None:
                continue
            if not left.shape[2]:
                rank = min(LINEAR_RANK, out, into)
                left, right = left.new_zeros(count, out, rank), left.new_zeros(count, rank, into)
            left[at] = leading(term, left.shape[2])[0]
            torch.mm(left[at].T, term, out=right[at])
        return left, right

    def _of_frozen(self) -> tuple[Tensor | None, Tensor]:
        """The linear terms along a frozen factor's directions, (k, r, longer side), None if there
        are none; and the directions' squared lengths, (k, r, 1).
        """
        trains_b = self.b.requires_grad
        frozen, side = (self.a, self.b.mT) if trains_b else (self.b.mT, self.a)
        along: Tensor | None = None
        for at, read in enumerate(self._linear_terms):
            if (term := read()) is not None:
                along = torch.zeros_like(side) if along is None else along
                along[at] = frozen[at] @ (term.T if trains_b else term)
        return along, frozen.square().sum(-1, keepdim=True)

    def write_factors(self) -> None:
        """Compute PEFT's A and B, a frozen one only once."""
        sides = ((self.a, self.factor_a, self._to_a), (self.b.mT, self.factor_b.mT, self._to_b))
        for side, factor, blocks in sides:
            if self._factors_stale or side.requires_grad:
                for place, rows, by in zip(factor, side, blocks, strict=True):
                    place.copy_(times(rows, by))
        self._factors_stale = False

    def multiply(self, at: int, x: Tensor, weight: Tensor) -> Tensor:
        """``x (W + B diag(E) A)^T``, (N, out), for x (N, in) and a matrix's weight W (out, in),
        without forming the sum; all of the dtype that the products are computed in.
        """
        a, b, sizes = self._factors(at, x.dtype)
        return torch.addmm(x @ weight.T, (x @ a.T) * sizes, b.T)

    def multiply_back(
        self, at: int, x: Tensor, gradient: Tensor, weight: Tensor | None
    ) -> Tensor | None:
        """Add the gradients of E, A and B for a ``gradient`` of that product; that of x (N, in), or
        None without a weight.
        """
        a, b, sizes = self._factors(at, x.dtype)
        back = gradient @ b
        inner = back * sizes
        if self.a.requires_grad:
            self._add("a", at, inner.T @ x)
        if self.b.requires_grad:
            ahead = x @ a.T
            self._add("b", at, gradient.T @ (ahead * sizes))
            if self.a.requires_grad:
                self._add("e", at, (back * ahead).sum(0)[:, None] * self.scale)
        return None if weight is None else torch.addmm(gradient @ weight, inner, a)

    def _factors(self, at: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, in) and B (out, r) of a matrix, and what is between them, (r,)."""
        sizes = self.e[at, :, 0].detach() * self.scale
        return self.factor_a[at].to(dtype), self.factor_b[at].to(dtype), sizes.to(dtype)

    def _add(self, kind: str, at: int, gradient: Tensor) -> None:
        self._gradient(kind)[at].add_(gradient)

    def _gradient(self, kind: str) -> Tensor:
        """The gradients of E or a factor, zero where there were none."""
        if kind not in self._factor_gradients:
            like = {"a": self.factor_a, "b": self.factor_b, "e": self.e}[kind]
            self._factor_gradients[kind] = torch.zeros_like(like, requires_grad=False)
        return self._factor_gradients[kind]

    def gradients(self) -> list[Tensor]:
        """All that ``read_gradients`` reads, zeros where a backward pass left nothing."""
        sides = {"a": self.a, "b": self.b}
        kinds = {name: side for name, side in sides.items() if side.requires_grad}
        if not self.has_frozen_factor:
            kinds["e"] = self.e
        for parameter in kinds.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        penalties = [p.grad for p in kinds.values() if p.grad is not None]
        return [*map(self._gradient, kinds), *penalties]

    def read_gradients(self) -> None:
        """Compute the gradients of what is trained from those of E and of PEFT's A and B."""
        if "a" in self._factor_gradients:
            _add_gradient(self.a, _each_times(self._factor_gradients["a"], self._to_a))
        if "b" in self._factor_gradients:
            _add_gradient(self.b, _each_times(self._factor_gradients["b"].mT, self._to_b).mT)
        if "e" in self._factor_gradients:
            _add_gradient(self.e, self._factor_gradients["e"])

    def factor_gradients(self) -> tuple[Tensor, Tensor]:
        """(k, r, in) and (k, out, r): gradients of PEFT's A and B, zero where there were none."""
        return self._gradient("a"), self._gradient("b")

    def clear_gradients(self) -> None:
        """Drop all gradients; interrupted training may have left some of a step behind."""
        self._factor_gradients.clear()
        self.e.grad = None


def _each_times(rows: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """(k, r, side): of each matrix, the rows times the transpose of its blocks."""
    return torch.stack([times(one, by.mT) for one, by in zip(rows, blocks, strict=True)])


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor (k, ...), fp32, of which each parameter is a view from now on."""
    batched = torch.stack([parameter.detach().float() for parameter in parameters])
    for parameter, part in zip(parameters, batched, strict=True):
        parameter.data = part
    return batched


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _padded(rows: Tensor, count: int) -> Tensor:
    """(count, width): with rows of zeros, where a matrix has fewer directions than ranks."""
    zeros = rows.new_zeros(count - len(rows), rows.shape[1])
    return torch.cat([rows, zeros]).contiguous()
