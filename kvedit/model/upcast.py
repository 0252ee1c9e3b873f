"""Half-precision matrix products in fp32, on a CPU that is slow at them.

torch multiplies bf16 and fp16 quickly where oneDNN has kernels for them: on x86 from AVX-512 on.
On other CPUs, those of most laptops, it uses a plain loop that is fifty times slower than fp32.
There the operands are cast to fp32, multiplied, and the product rounded once, as the quick kernels
do: they accumulate in fp32 too.

Invariant: weights and activations keep their dtype, so that digests and numerical ties do not
depend on the processor.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvedit.model.devices import first_device

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
TIMED_SIZE = 256  # rows and columns of the products that are timed
SLOW_RATIO = 8.0  # to the time of fp32: quick kernels take less than 2, plain loops 50
ATTENTION = "kvedit_upcast_sdpa"
_WIDE = "kvedit_wide_weight"  # a linear layer's weight in fp32, inside ``cast_once``


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype much more slowly than fp32 ones; measured."""
    return dtype in HALF and _seconds(dtype) > SLOW_RATIO * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Time of the quickest of three products."""
    matrix = torch.ones(TIMED_SIZE, TIMED_SIZE, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)


def product(one: Tensor, other: Tensor) -> Tensor:
    """``one @ other``, (..., n) and (n, m), both and the result of the same dtype."""
    return (operand(one) @ operand(other)).to(one.dtype)


def operand(tensor: Tensor) -> Tensor:
    """A tensor as it is multiplied: in fp32 where products of its dtype are slow."""
    return tensor.float() if _upcasts(tensor) else tensor


def _upcasts(operand: Tensor) -> bool:
    return operand.device.type == "cpu" and is_slow(operand.dtype)


def upcast_model(model: Any) -> None:
    """Make a model on the CPU multiply in fp32 if its dtype is slow there: in linear layers and,
    where transformers lets it be replaced, in attention.
    """
    from transformers.pytorch_utils import Conv1D

    if first_device(model).type != "cpu" or not is_slow(model.dtype):
        return
    log.info("this processor is slow at %s: products are computed in float32", model.dtype)
    forwards = {nn.Linear: _linear, Conv1D: _conv1d}
    for module in model.modules():
        if (forward := forwards.get(type(module))) is not None:
            # Where accelerate fetches offloaded weights, below its hook.
            name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(module, name, partial(forward, module))
    if getattr(model.config, "_attn_implementation", "") == "sdpa":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)


@contextmanager
def cast_once(model: nn.Module, most: float) -> Iterator[None]:
    """Inside, where products are computed in fp32, each linear layer's weight is cast once and not
    at every step, of which steps of a few rows are most; nothing that takes more than ``most``
    bytes.  The weights must not change inside.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and _upcasts(m.weight)]
    if 4 * sum(layer.weight.numel() for layer in layers) > most:
        layers = []
    try:
        for layer in layers:
            layer.__dict__[_WIDE] = layer.weight.detach().float()
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop(_WIDE, None)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return _multiply(x, layer.__dict__.get(_WIDE, layer.weight), layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return _multiply(x, layer.weight.t(), layer.bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out): a linear layer of a weight (out, in)."""
    if _upcasts(x) and not weight.requires_grad:
        y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    if _upcasts(x):
        weight, bias = weight.float(), None if bias is None else bias.float()
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer in fp32 whose weight is cast anew in the backward pass: autograd would keep an
    fp32 copy of every weight of the model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradient.float() @ weight.float()).to(gradient.dtype), None, None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _upcasts(query):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    out, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), mask, **kwargs
    )
    return out.to(query.dtype), None
