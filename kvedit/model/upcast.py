"""Products of half-precision matrices on a CPU that is slow at them.

torch multiplies bf16 and fp16 quickly where oneDNN has kernels for them: on x86 from AVX-512 on.
Elsewhere, on most laptops, it does so in a plain loop, fifty times slower than in fp32.  There the
operands are widened to fp32, multiplied, and the product rounded once, which is what the quick
kernels do as well: they too sum in fp32.

Invariants:
- Weights and activations stay in their dtype: what is stored, digested and told of near-ties does
  not depend on the processor.
- A model that needs none of this is left as it is.
"""

from __future__ import annotations

import logging
import time
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kvedit.model.devices import first_device

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
SIDE = 256  # of the products that are timed
SLOW = 8.0  # times the seconds of fp32: quick kernels take less than twice, plain loops fifty times
ATTENTION = "kvedit_widened_sdpa"
_OF_MATRICES = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype much more slowly than wider ones: tried once,
    a tenth of a second where it is so.
    """
    return dtype in HALF and _seconds(dtype) > SLOW * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The quickest of a few products."""
    one = torch.ones(SIDE, SIDE, dtype=dtype)
    found = []
    for _ in range(3):
        began = time.perf_counter()
        one @ one
        found.append(time.perf_counter() - began)
    return min(found)


def product(one: Tensor, other: Tensor) -> Tensor:
    """``one @ other``, (..., n) and (n, m), both of one dtype, in which it comes out."""
    if _widens(one):
        return (one.float() @ other.float()).to(one.dtype)
    return one @ other


def _widens(operand: Tensor) -> bool:
    return operand.device.type == "cpu" and is_slow(operand.dtype)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this context all products of two matrices are ``product``s: for code that is not ours."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = kwargs or {}
        if func not in _OF_MATRICES or not _widens(args[0]):
            return func(*args, **more)
        return func(*(operand.float() for operand in args), **more).to(args[0].dtype)


def upcast_model(model: Any) -> None:
    """Let a model on the CPU multiply in fp32 where its own dtype is slow there: its linear layers,
    and attention where transformers lets it be chosen.
    """
    from transformers.pytorch_utils import Conv1D

    if first_device(model).type != "cpu" or not is_slow(model.dtype):
        return
    log.info("this processor is slow at %s: products are computed in float32", model.dtype)
    ways = {nn.Linear: _linear, Conv1D: _conv1d}
    for module in model.modules():
        if (way := ways.get(type(module))) is not None:
            # Where accelerate fetches weights from elsewhere, inside of that.
            name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(module, name, partial(way, module))
    if getattr(model.config, "_attn_implementation", "") == "sdpa":
        _register_attention()
        model.set_attn_implementation(ATTENTION)


def _linear(layer: Any, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if _widens(x):
        weight, bias = weight.float(), None if bias is None else bias.float()
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """GPT-2's, whose weight is (in, out)."""
    weight, bias = layer.weight, layer.bias
    if _widens(x):
        weight, bias = weight.float(), bias.float()
    found: Tensor = x.to(weight.dtype) @ weight + bias
    return found.to(x.dtype)


@cache
def _register_attention() -> None:
    """Make a way of attention known to transformers: its own, in fp32."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _widens(query):
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    found, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), mask, **more
    )
    return found.to(query.dtype), None
