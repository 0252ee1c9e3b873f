"""A matrix in full precision, kept as what is served of it and what that leaves out.

bf16 is the upper half of fp32, so an fp32 number follows from its rounded value and 16 bits more: a
matrix costs two bytes a number beside the served weights instead of four, and none where nothing
was rounded.  For other served dtypes the numbers are kept in fp32.

Invariants:
- ``rows`` gives back exactly the bits that were split, for all finite numbers, and -0 among them.
- No tensor of a ``Split`` is changed in place: several states of a model share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**18  # numbers formed at a time: in fp64 they stay in the processor's cache
_HALF_STEP = -(2**15)  # the remainder, as int16, of a number half-way between two bf16 ones


@dataclass(frozen=True, slots=True)
class Split:
    """(out, in): ``served``, in the served dtype, and what makes it fp32 again, on the CPU.

    ``remainder`` is for bf16 int16, the difference of the bits from those of ``served`` as fp32;
    for other dtypes the fp32 numbers themselves; None where ``served`` is exact.  ``ties`` (N,),
    int64, are the flat positions of numbers half a step above ``served``: one more than int16 has.
    """

    served: Tensor
    remainder: Tensor | None = None
    ties: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.served.shape

    def rows(self, part: slice = slice(None)) -> Tensor:
        """(rows, in), fp32: these rows in full precision; may share memory with the split."""
        if self.remainder is None:
            return self.served[part].float()
        if self.remainder.dtype == torch.float32:
            return self.remainder[part]
        bits = _upper_bits(self.served[part]).add_(self.remainder[part])
        if self.ties is not None and len(self.ties):
            first, end, _ = part.indices(len(self.served))
            width = self.shape[1]
            inside = self.ties[(self.ties >= first * width) & (self.ties < end * width)]
            bits.view(-1)[inside - first * width] -= 2 * _HALF_STEP
        return bits.view(torch.float32)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows at a time, in full precision, and which they are."""
        for part in row_blocks(self.shape):
            yield part, self.rows(part)


def row_blocks(shape: torch.Size) -> list[slice]:
    """Slices of the rows of a matrix, each of about ``BLOCK`` numbers."""
    size = max(1, BLOCK // shape[1])
    return [slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)]


class Splitter:
    """A ``Split`` in the making, some rows at a time."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._served = torch.empty(shape, dtype=dtype)
        rest = {torch.bfloat16: torch.int16, torch.float32: None}.get(dtype, torch.float32)
        self._remainder = None if rest is None else torch.empty(shape, dtype=rest)
        self._ties: list[Tensor] = []

    def put(self, part: slice, values: Tensor) -> None:
        """Set some rows to ``values`` (rows, in), fp32 or fp64, rounded to fp32 first."""
        full, served = values.float().contiguous(), self._served[part]
        served.copy_(full)
        if self._remainder is None:
            return
        if self._remainder.dtype == torch.float32:
            self._remainder[part] = full
            return
        difference = full.view(torch.int32) - _upper_bits(served)
        self._remainder[part] = difference
        above = (difference == -_HALF_STEP).flatten().nonzero()[:, 0]
        self._ties.append(above + part.start * self._served.shape[1])

    def done(self) -> Split:
        """The split, once all rows are set."""
        ties = torch.cat(self._ties) if self._ties else None
        return Split(self._served, self._remainder, ties)


def split(matrix: Tensor, dtype: torch.dtype) -> Split:
    """Split a matrix (out, in), fp32, for a served dtype."""
    splitter = Splitter(matrix.shape, dtype)
    for part in row_blocks(matrix.shape):
        splitter.put(part, matrix[part])
    return splitter.done()


def _upper_bits(served: Tensor) -> Tensor:
    """int32: the bits of bf16 numbers as fp32; a new tensor."""
    return served.contiguous().view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
