"""Half-precision matrix products in fp32, on a CPU that is slow at them.

torch multiplies bf16 and fp16 quickly where oneDNN has kernels for them: on x86 from AVX-512 on.
On other CPUs, those of most laptops, it uses a plain loop that is fifty times slower than fp32.
There the operands are cast to fp32, multiplied, and the product rounded once, as the quick kernels
do: they accumulate in fp32 too.  A single row, as in decoding one text, is quickest with the plain
loop: it is bound by reading the weights, and half-precision ones are half as many bytes.

Invariants:
- Weights and activations keep their dtype, so that digests and numerical ties do not depend on the
  processor.
- A weight is cast a block at a time: there is never an fp32 copy of it, not for the backward pass
  either.
"""

import logging
import time
from collections.abc import Callable, Iterator
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
ONE_ROW_SIZE = 1024  # rows and columns of the matrix of the one-row products that are timed
BLOCK = 2**19  # numbers of a weight that are cast at a time: they stay in the processor's cache
ATTENTION = "kvedit_upcast_sdpa"


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype much more slowly than fp32 ones; measured."""
    if dtype not in HALF:
        return False
    half, full = (torch.ones(TIMED_SIZE, TIMED_SIZE, dtype=d) for d in (dtype, torch.float32))
    return _seconds(lambda: half @ half) > SLOW_RATIO * _seconds(lambda: full @ full)


@cache
def is_slow_for_one_row(dtype: torch.dtype) -> bool:
    """Whether the product of one row and a matrix is quicker in fp32, cast included; measured."""
    weight = torch.ones(ONE_ROW_SIZE, ONE_ROW_SIZE, dtype=dtype)
    row = weight[:1]
    return _seconds(lambda: functional.linear(row, weight)) > _seconds(
        lambda: _forward(row, weight, None)
    )


def _seconds(product: Callable[[], Tensor]) -> float:
    """Time of the quickest of three products."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product()
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


def _linear(layer: Any, x: Tensor) -> Tensor:
    return _multiply(x, layer.weight, layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return _multiply(x, layer.weight.t(), layer.bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out), in the dtype of ``x``: ``functional.linear`` in that of the weight (out, in)."""
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    if not _upcasts(weight) or _is_quick_row(rows, weight):
        out = functional.linear(rows, weight, bias)
    elif weight.requires_grad:
        wide = None if bias is None else bias.float()
        out = functional.linear(rows.float(), weight.float(), wide).to(weight.dtype)
    else:
        out = _Product.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], len(weight)).to(x.dtype)


def _is_quick_row(rows: Tensor, weight: Tensor) -> bool:
    """Whether this is one row whose product in the weight's dtype is the quickest."""
    plain = len(rows) == 1 and weight.is_contiguous() and not rows.requires_grad
    return plain and not is_slow_for_one_row(weight.dtype)


class _Product(torch.autograd.Function):
    """``rows`` (n, in) times a frozen ``weight`` (out, in): (n, out), all of the same dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _forward(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        total = gradient.new_zeros(len(gradient), weight.shape[1], dtype=torch.float32)
        for part, block in _blocks(weight):
            total.addmm_(gradient[:, part].float(), block)
        return total.to(gradient.dtype), None, None


def _forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, out = rows.float(), rows.new_empty(len(rows), len(weight))
    for part, block in _blocks(weight):
        out[:, part] = functional.linear(x, block, None if bias is None else bias[part].float())
    return out


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each block of a weight's rows, cast to fp32, and which rows they are."""
    size = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        yield part, weight[part].float()


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
