"""Base models in 4 or 8 bits (bitsandbytes): the layers that edits touch are dequantized.

A delta cannot be added to quantized weights: at 4 bits a step of a weight is a hundred times as
large as an edit's change.  So the edited matrices are replaced by plain ones with the dequantized
values, in the dtype that the model computes in.  That is exact, since quantized layers multiply
with those values, and costs memory: the edited layers at full width.  A low-rank path beside
quantized weights would be gated in another arithmetic than a merge and grow with every edit.

Invariant: the layers that edits do not touch stay as they were loaded, and are never written to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError, UsageError

KINDS = ("4bit", "8bit")
_METHOD = "bitsandbytes"
_SCALE_BITS = 32 / 64  # bits per weight of the scales of 4-bit blocks: one fp32 for 64 weights


def options(source: str, load_in: str, **location: Any) -> dict[str, Any]:
    """Arguments with which transformers quantizes a model while it loads it; none for "".

    ``load_in`` is one of ``KINDS``.  Raises ModelError if bitsandbytes is not installed.
    """
    if not load_in:
        return {}
    if load_in not in KINDS:
        raise ModelError(f"a model cannot be loaded in {load_in!r}", hint="Known: 4bit, 8bit.")
    from transformers import AutoConfig, BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    try:
        if load_in == "8bit":
            return {"quantization_config": config(load_in_8bit=True)}
        # The default would compute in fp32 instead of the model's own dtype.
        dtype = AutoConfig.from_pretrained(source, **location).dtype or torch.float32
        four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return {"quantization_config": config(**four_bit, bnb_4bit_compute_dtype=dtype)}
    except ImportError as error:
        raise ModelError(
            f"loading in {load_in} needs bitsandbytes", hint="pip install bitsandbytes"
        ) from error


def method(model: Any) -> str:
    """The quantization method by transformers' name; "" if the model is not quantized."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        return "unknown" if getattr(model, "is_quantized", False) else ""
    name = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(name, "value", name) or "unknown")


def bits(config: Any, load_in: str) -> float | None:
    """Bits of a quantized weight, scales included; None if the model is not quantized.

    ``config`` is the model's configuration, which says so if the weights are stored quantized.
    """
    settings = getattr(config, "quantization_config", None)
    stored = settings if isinstance(settings, dict) else vars(settings) if settings else {}
    kinds = {load_in} | {
        kind for kind in KINDS for name in ("load_in_", "_load_in_") if stored.get(name + kind)
    }
    return 4 + _SCALE_BITS if "4bit" in kinds else 8.0 if "8bit" in kinds else None


def refuse_unknown(source: str, model: Any) -> None:
    """Raise ModelError for weights quantized by another method than bitsandbytes."""
    kind = method(model)
    if kind in ("", _METHOD):
        return
    raise ModelError(
        f"the weights of {source} are quantized ({kind}): edits cannot be merged into them",
        hint="Edit the model in float32, bfloat16 or float16 (or in 4 or 8 bits of bitsandbytes),"
        " export it, and quantize the export; or export --format peft and put the adapter over the"
        " quantized base.",
    )


def refuse_whole_export(model: Any) -> None:
    """Raise UsageError if the model is quantized: a folder of such weights cannot hold edits."""
    if kind := method(model):
        raise UsageError(
            f"the base model is quantized ({kind}): edits cannot be merged into it",
            hint="Write them as an adapter over the quantized base: kvedit export --format peft."
            " For a whole model, make a store for the model that is not quantized.",
        )


def dequantize(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the quantized layers among the named ones by plain ones, in place."""
    for name in names:
        layer = model.get_submodule(name)
        weight = _dequantized(layer)
        if weight is not None:
            model.set_submodule(name, _plain(layer, weight.to(model.dtype)))


def _dequantized(layer: Any) -> Any:
    """(out, in): the weight of a quantized layer; None for one that is not quantized."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    weight = layer.weight
    if "Linear4bit" in kinds:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if "Linear8bitLt" in kinds:  # integers from -127 to 127, a scale for each row
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scales.float()[:, None] / 127)
    return None


def _plain(layer: Any, weight: Tensor) -> nn.Linear:
    """A linear layer with these weights, and the bias and hook of the quantized one."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    if hook := getattr(layer, "_hf_hook", None):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(linear, hook)
    return linear.eval()
