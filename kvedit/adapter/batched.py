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

from kvedit.adapter.fisher import WhiteningFactors, times
from kvedit.adapter.start import Directions

NAME = "edit"
_KINDS = ("lora_A", "lora_B", "lora_E")
LinearTerm = Callable[[Tensor, bool], Tensor | None]
"""Rows, (r, out) if the flag says so, else (r, in), times the accumulated delta's gradient term of
a matrix, (out, in), or its transpose: (r, in) or (r, out); None for zero."""


@dataclass(slots=True)
class BatchedAdapters:
    """``k`` wrapped matrices, (out, in), on one device, and their adapters, all fp32: E (k, r, 1),
    one for the ranks in use and zero for others, and the coordinates A' (k, r, in) and B'
    (k, out, r), of which the longer side is trained.
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
    # What the penalty needs of the linear terms: see ``_terms``.
    _penalty_terms: tuple[Tensor | None, Tensor] | None = None
    _factors_stale: bool = True  # PEFT's A and B are not computed from A' and B' yet
    _gradient: Tensor | None = None  # of PEFT's A or B^T, over the batches of a step

    def __post_init__(self) -> None:
        parameters = ([getattr(one, kind)[NAME] for one in self.modules] for kind in _KINDS)
        self.factor_a, self.factor_b, e = map(_joined, parameters)
        self.e = e.requires_grad_()  # so that autograd goes back to the first edited matrix

    def start(
        self,
        whitening: Sequence[WhiteningFactors],
        directions: Sequence[Directions],
        linear_terms: Sequence[LinearTerm],
    ) -> None:
        """Set A', B' and E to their start: see ``Adapter.reset``."""
        self._to_a = [factors.right for factors in whitening]
        self._to_b = [factors.left.mT for factors in whitening]
        self._linear_terms, rank = linear_terms, self.e.shape[1]
        self.a = torch.stack([_padded(one.right.T, rank) for one in directions])
        self.b = torch.stack([_padded(one.left.T, rank).T for one in directions])
        with torch.no_grad():
            for sizes, one in zip(self.e, directions, strict=True):
                sizes.zero_()[: len(one.values)] = 1.0
        self.trained.zero_().requires_grad_()
        self.values_changed()

    def end(self) -> None:
        """Let go of all that ``start`` sets anew and that is as large as the moments."""
        self._to_a = self._to_b = ()
        self._linear_terms, self._penalty_terms = (), None
        self.clear_gradients()

    def values_changed(self) -> None:
        """Drop what was computed from a frozen factor: A', B' and E were set from outside."""
        self._factors_stale, self._penalty_terms = True, None

    @property
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """E, A' and B'."""
        return self.e, self.a, self.b

    @property
    def _trains_a(self) -> bool:
        return self.b.shape[1] <= self.a.shape[2]

    @property
    def _trained_blocks(self) -> Sequence[Tensor]:
        """The whitening factors of the trained side."""
        return self._to_a if self._trains_a else self._to_b

    @property
    def trained(self) -> Tensor:
        """A' or B', the longer one."""
        return self.a if self._trains_a else self.b

    def penalty(self) -> Tensor:
        """``|B' diag(E) A'|^2`` and the gradient term of the accumulated delta, ``2 <L, B' diag(E)
        A'>``, a scalar (K-FAC; as a penalty between tasks: Ritter et al. 2018, arXiv:1805.07810;
        quadratic around the base model, so earlier edits add the second term).

        The directions of the frozen side are orthonormal, or zero: their product is not needed.
        """
        if self._penalty_terms is None:
            with torch.no_grad():
                self._penalty_terms = self._terms()
        along, squares = self._penalty_terms
        side = self.a if self._trains_a else self.b.mT
        penalty = (side.square() * squares).sum()
        return penalty if along is None else penalty + 2 * (side * along).sum()

    def _terms(self) -> tuple[Tensor | None, Tensor]:
        """The linear terms along the frozen side's directions, (k, r, longer side), None if there
        are none; and the directions' squared lengths, (k, r, 1).
        """
        frozen, side = (self.b.mT, self.a) if self._trains_a else (self.a, self.b.mT)
        if self._factors_stale:
            self.write_factors()
        rows, blocks = self.factor_b.mT if self._trains_a else self.factor_a, self._trained_blocks
        along: Tensor | None = None
        for at, linear_term in enumerate(self._linear_terms):
            if (term := linear_term(rows[at], self._trains_a)) is not None:
                along = torch.zeros_like(side) if along is None else along
                along[at] = times(term, blocks[at].mT)
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
        """Add the gradient of A or B for a ``gradient`` of that product; that of x (N, in), or None
        without a weight.
        """
        a, b, sizes = self._factors(at, x.dtype)
        inner = (gradient @ b) * sizes
        total = self.gradient()
        if self._trains_a:
            total[at].add_(inner.T @ x)
        else:
            total[at].add_(((x @ a.T) * sizes).T @ gradient)
        return None if weight is None else torch.addmm(gradient @ weight, inner, a)

    def _factors(self, at: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, in) and B (out, r) of a matrix, and what is between them, (r,)."""
        sizes = self.e[at, :, 0].detach() * self.scale
        return self.factor_a[at].to(dtype), self.factor_b[at].to(dtype), sizes.to(dtype)

    def gradient(self) -> Tensor:
        """(k, r, longer side): the gradient of PEFT's A or B^T, zero where there was none."""
        if self._gradient is None:
            factor = self.factor_a if self._trains_a else self.factor_b.mT
            self._gradient = torch.zeros_like(factor, requires_grad=False)
        return self._gradient

    def gradients(self) -> list[Tensor]:
        """All that ``read_gradient`` reads, zeros where a backward pass left nothing."""
        if self.trained.grad is None:
            self.trained.grad = torch.zeros_like(self.trained)
        return [self.gradient(), self.trained.grad]

    def read_gradient(self) -> None:
        """Add the gradient of what is trained, by that of PEFT's A or B^T."""
        side, blocks = self.trained, self._trained_blocks
        if side.grad is None:
            side.grad = torch.zeros_like(side)
        total = side.grad if self._trains_a else side.grad.mT
        for place, rows, by in zip(total, self.gradient(), blocks, strict=True):
            place.add_(times(rows, by.mT))

    def clear_gradients(self) -> None:
        """Drop all gradients; interrupted training may have left some of a step behind."""
        self._gradient = self.e.grad = self.trained.grad = None


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor (k, ...), fp32, of which each parameter is a view from now on."""
    batched = torch.stack([parameter.detach().float() for parameter in parameters])
    for parameter, part in zip(parameters, batched, strict=True):
        parameter.data = part
    return batched


def _padded(rows: Tensor, count: int) -> Tensor:
    """(count, width): with rows of zeros, where a matrix has fewer directions than ranks."""
    zeros = rows.new_zeros(count - len(rows), rows.shape[1])
    return torch.cat([rows, zeros]).contiguous()
