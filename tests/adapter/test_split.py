"""A matrix as what is served of it and what that leaves out: every bit comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvedit.adapter import split as module
from kvedit.adapter.split import Split, split

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def from_bits(bits: list[int]) -> Tensor:
    signed = [one - 2**32 if one >= 2**31 else one for one in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def is_finite(bits: int) -> bool:
    return (bits >> 23) & 0xFF != 0xFF


# Half-way between two bf16 numbers, on either side of it, and anything else.
TIES = st.builds(lambda high, low: high << 16 | low, st.integers(0, 2**16 - 1),
                 st.sampled_from((0x7FFF, 0x8000, 0x8001, 0, 0xFFFF)))  # fmt: skip
PATTERNS = (TIES | st.integers(0, 2**32 - 1)).filter(is_finite)
SPECIAL = [
    0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF,  # extremes
    0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x00008000, 0x80018000,  # ties, even and odd
]  # fmt: skip


@settings(deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=40), st.integers(1, 9), st.sampled_from(DTYPES))
def test_every_bit_comes_back(bits: list[int], width: int, dtype: torch.dtype) -> None:
    bits += SPECIAL
    bits += [0] * (-len(bits) % width)
    matrix = from_bits(bits).view(-1, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 3 * width)
        made = split(matrix, dtype)
        assert made.served.dtype == dtype
        assert _same_bits(made.served, matrix.to(dtype))
        assert _same_bits(made.rows(), matrix)
        whole = torch.cat([block for _, block in made.blocks()])
        assert _same_bits(whole, matrix)
        assert _same_bits(made.rows(slice(1, 4)), matrix[1:4])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_a_remainder_takes_two_bytes_a_number_and_none_where_nothing_was_rounded() -> None:
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    made = split(matrix, torch.bfloat16)
    assert made.remainder is not None and made.remainder.nbytes == 2 * matrix.numel()
    assert split(matrix, torch.float32).remainder is None
    served = matrix.bfloat16()
    assert torch.equal(Split(served).rows(), served.float())
