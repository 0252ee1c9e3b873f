"""Q8_0 and Q4_0 as ggml computes them, block by block."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor, nn

from kvedit.revisions.export import rounding


def half(number: float) -> float:
    """Rounded to fp16, as a block's scale is."""
    (rounded,) = struct.unpack("e", struct.pack("e", number))
    return float(rounded)


def by_hand(block: list[float], bits: int) -> list[float]:
    """One block, number by number, as the C code has it."""
    if bits == 8:
        scale = max(map(abs, block)) / 127
        levels = [int(abs(x / scale) + 0.5) * (1 if x > 0 else -1) for x in block]
        return [level * half(scale) for level in levels]
    scale = max(block, key=abs) / -8
    return [(min(15, int(x / scale + 8.5)) - 8) * half(scale) for x in block]


@pytest.mark.parametrize(("bits", "rounded"), [(8, rounding.q8_0), (4, rounding.q4_0)])
def test_blocks_are_rounded_as_by_hand(bits: int, rounded: object) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)).double()
    found = rounded(weight)  # type: ignore[operator]
    for row, there in zip(weight, found, strict=True):
        for at in range(0, 96, 32):
            expected = by_hand([float(x) for x in row[at : at + 32]], bits)
            torch.testing.assert_close(
                there[at : at + 32].double(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-5
            )


def test_zeros_stay_zeros_and_errors_are_bounded() -> None:
    zeros = torch.zeros(2, 32)
    assert torch.equal(rounding.q8_0(zeros), zeros) and torch.equal(rounding.q4_0(zeros), zeros)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    most = weight.view(8, 2, 32).abs().amax(-1, keepdim=True)

    def error(rounded: Tensor) -> Tensor:
        return (rounded - weight).view(8, 2, 32).abs() / most

    assert float(error(rounding.q8_0(weight)).max()) < 0.5 / 127 + 1e-3
    assert float(error(rounding.q4_0(weight)).max()) <= 1 / 8 + 1e-3


def test_a_model_is_rounded_but_its_adapter_and_odd_rows_are_not() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 32)
            self.up = nn.Linear(32, 64)
            self.lora_A = nn.Linear(32, 8, bias=False)
            self.odd = nn.Linear(30, 4)
            self.out = nn.Linear(32, 7, bias=False)

        def get_output_embeddings(self) -> nn.Linear:
            return self.out

    model = Small().bfloat16()
    before = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
    rounding.round_weights(model, 4)
    after = dict(model.named_parameters())
    assert all(weight.dtype == torch.float32 for weight in after.values())
    for name in ("embed.weight", "up.weight"):
        assert torch.equal(after[name], rounding.q4_0(before[name]))
    assert torch.equal(after["out.weight"], rounding.q8_0(before["out.weight"]))
    for name in ("lora_A.weight", "odd.weight", "up.bias"):
        assert torch.equal(after[name], before[name])
