"""Bases in 4 or 8 bits (bitsandbytes): the layers that edits touch are unpacked, the rest stays so.

A delta cannot be added to packed weights: at 4 bits a step of a weight is a hundred times what an
edit moves.  So the touched matrices are replaced by plain ones that hold what the packed ones stand
for, in the dtype that the model computes in.  That is exact, for it is what the packed layers
multiply with, and everything that holds for a plain base (the merge, the gate on what is served,
digests, undoing) holds for them without a second way of serving.  The alternative, a side path of
low rank beside packed weights, would be gated in another arithmetic than a merge and would grow
with every edit.  What it costs is the memory of the touched layers at their full width.

Invariants:
- Packed weights are never written to.
- The untouched layers stay as they were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError, UsageError

KINDS = ("4bit", "8bit")
_METHOD = "bitsandbytes"
_ABSMAX = 0.5
"""Bits a weight that the scales of 4-bit blocks take: one fp32 number for 64 weights."""


def options(source: str, load_in: str, **known: Any) -> dict[str, Any]:
    """What transformers needs to pack a model while it loads it; nothing for "".

    ``load_in`` is one of ``KINDS``.  Raises ModelError where bitsandbytes is not installed.
    """
    if not load_in:
        return {}
    if load_in not in KINDS:
        raise ModelError(f"a model cannot be loaded in {load_in!r}", hint="Known: 4bit, 8bit.")
    from transformers import AutoConfig, BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    try:
        if load_in == "8bit":
            return {"quantization_config": make(load_in_8bit=True)}
        dtype = AutoConfig.from_pretrained(source, **known).dtype or torch.float32
        packed = make(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )  # in its own dtype: the default would compute in fp32
        return {"quantization_config": packed}
    except ImportError as error:
        raise ModelError(
            f"loading in {load_in} needs bitsandbytes", hint="pip install bitsandbytes"
        ) from error


def method(model: Any) -> str:
    """How a model is quantised, as transformers calls it; "" if it is not."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return "unknown" if getattr(model, "is_quantized", False) else ""
    found = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(found, "value", found) or "unknown")


def bits(config: Any, load_in: str) -> float | None:
    """How many bits a packed weight takes, scales included; None if there are none.

    ``config`` is a model's configuration, which says so where the weights are stored packed.
    """
    settings = getattr(config, "quantization_config", None)
    stored = settings if isinstance(settings, dict) else vars(settings) if settings else {}
    four = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    eight = stored.get("load_in_8bit") or stored.get("_load_in_8bit")
    if load_in == "4bit" or four:
        return 4 + _ABSMAX
    return 8.0 if load_in == "8bit" or eight else None


def refuse_unknown(source: str, model: Any) -> None:
    """Raise ModelError for packed weights of a kind that cannot be unpacked here."""
    kind = method(model)
    if kind in ("", _METHOD):
        return
    raise ModelError(
        f"the weights of {source} are quantised ({kind}): edits cannot be merged into them",
        hint="Edit the model in float32, bfloat16 or float16 (or in 4 or 8 bits of bitsandbytes),"
        " export it, and quantise the export; or export --format peft and put the adapter over the"
        " quantised base.",
    )


def refuse_whole_export(model: Any) -> None:
    """Raise UsageError: a folder of packed weights cannot hold edits."""
    if kind := method(model):
        raise UsageError(
            f"the base is quantised ({kind}): edits cannot be merged into packed weights",
            hint="Write them as an adapter over the quantised base: kvedit export --format peft."
            " For a whole model, make a store for the unquantised base.",
        )


def unpack(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the packed layers among the named ones by plain ones, in place."""
    for name in names:
        layer = model.get_submodule(name)
        weight = _unpacked(layer)
        if weight is not None:
            parent, _, last = name.rpartition(".")
            plain = _plain(layer, weight.to(model.dtype))  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), last, plain)


def _unpacked(layer: Any) -> Tensor | None:
    """(out, in): what a packed layer multiplies with; None for one that is not packed."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    weight = layer.weight
    if "Linear4bit" in kinds:
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found
    if "Linear8bitLt" in kinds:  # codes from -127 to 127, a scale for each row
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        whole: Tensor = weight.data.float() * (scales.float()[:, None] / 127)
        return whole
    return None


def _plain(layer: Any, weight: Tensor) -> nn.Linear:
    """A linear layer that holds these weights and what else the packed one had."""
    out, into = weight.shape
    made = nn.Linear(into, out, bias=False, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    made.bias = layer.bias
    if hook := getattr(layer, "_hf_hook", None):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(made, hook)
    return made.eval()
