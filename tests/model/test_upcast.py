"""Half precision on a CPU that is slow at it: the same answers, weights left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kvedit.model import loading, upcast
from kvedit.model.loading import BaseModel

MEASURED = upcast.is_slow


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that is slow at half precision, whatever this one is."""
    monkeypatch.setattr(upcast, "is_slow", lambda dtype: dtype in upcast.HALF)
    yield


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.sampled_from(upcast.HALF))
def test_a_product_is_rounded_once(rows: int, inner: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + inner)
    one = torch.randn(rows, inner, generator=generator).to(dtype)
    other = torch.randn(inner, out, generator=generator).to(dtype)
    rounded = upcast.product(one, other)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, (one.float() @ other.float()).to(dtype))


def test_full_precision_is_left_alone() -> None:
    one = torch.randn(3, 4)
    assert torch.equal(upcast.product(one, one.T), one @ one.T)


def test_whether_it_is_slow_is_measured() -> None:
    half, full = (torch.ones(256, 256, dtype=d) for d in (torch.bfloat16, torch.float32))
    ratio = upcast._seconds(lambda: half @ half) / upcast._seconds(lambda: full @ full)
    assert MEASURED(torch.bfloat16) == (ratio > upcast.SLOW_RATIO)
    assert not MEASURED(torch.float32)


@settings(deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 30), st.sampled_from((8, 64, 4096)),
    st.booleans(), st.booleans(), st.sampled_from(upcast.HALF),
)  # fmt: skip
def test_a_product_in_blocks_is_the_product(
    rows: int, inner: int, out: int, block: int, biased: bool, quick_row: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + inner)
    x, weight, bias, slope = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, inner), (out, inner), (out,), (rows, out))
    )
    layer = nn.Linear(inner, out, bias=biased).requires_grad_(False)
    layer.weight.data, layer.bias = weight, nn.Parameter(bias, False) if biased else None
    given_x = x.clone().requires_grad_(not quick_row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upcast, "BLOCK", block)
        patch.setattr(upcast, "is_slow_for_one_row", lambda dtype: not quick_row)
        ours = upcast._linear(layer, given_x)
        exact = functional.linear(x.double(), weight.double(), bias.double() if biased else None)
        # Rounded once, so at most half a step of the dtype away, and what fp32 sums lose.
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
        if not quick_row:
            ours.backward(slope)
            assert given_x.grad is not None and given_x.grad.dtype == dtype
            below = (slope.double() @ weight.double()).float()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(given_x.grad.float(), below, rtol=eps, atol=1e-4)


def test_a_model_gives_the_same_logits_and_keeps_its_weights(
    small: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = loading.load(str(small["bf16"]))
    assert wide.model.config._attn_implementation == upcast.ATTENTION
    monkeypatch.setattr(upcast, "is_slow", lambda dtype: False)
    plain = loading.load(str(small["bf16"]))
    assert plain.model.config._attn_implementation == "sdpa"
    assert wide.fingerprint == plain.fingerprint
    for name, weight in wide.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, plain.model.get_parameter(name))
    logits = [_logits(one) for one in (wide, plain)]
    assert logits[0].dtype == torch.bfloat16
    apart = (logits[0].float() - logits[1].float()).norm() / logits[1].float().norm()
    assert float(apart) < 0.02


def _logits(base: BaseModel) -> Tensor:
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        logits: Tensor = base.model(input_ids=ids, attention_mask=mask).logits
    return logits


def test_gradients_reach_what_is_below(load: Callable[[str], BaseModel]) -> None:
    model = load("bf16").model
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()
    expected = layer.weight.float().sum(0).expand_as(x)
    assert x.grad is not None
    assert torch.allclose(x.grad.float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_weight_is_not_kept_in_fp32(frozen: bool) -> None:
    """And the gradient is to the bit that of the plain expression, which keeps it."""
    layer = nn.Linear(6, 5).to(torch.bfloat16).requires_grad_(not frozen)
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    x = torch.randn(2, 3, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = upcast._linear(layer, x)
    y.sum().backward()
    plain = x.detach().requires_grad_()
    wide = functional.linear(plain.float(), layer.weight.float(), layer.bias.float())
    wide.to(torch.bfloat16).sum().backward()
    assert x.grad is not None and plain.grad is not None
    assert torch.equal(y, wide.to(torch.bfloat16)) and torch.equal(x.grad, plain.grad)
    assert (torch.float32 in kept) != frozen and (layer.weight.grad is None) == frozen


def test_gpt2s_layers_too() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 7).to(torch.bfloat16).requires_grad_(False)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 7, dtype=torch.bfloat16)
    out = upcast._conv1d(layer, x)
    wide = functional.linear(x.float(), layer.weight.float().T, layer.bias.float())
    assert torch.equal(out, wide.to(torch.bfloat16))
