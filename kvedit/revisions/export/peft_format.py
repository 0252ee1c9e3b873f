"""A LoRA adapter in PEFT's format: written from factors, loaded again, cut to fewer terms.

Invariants:
- The same factors are the same bytes.
- A folder is loaded by PEFT alone, as any user of PEFT would.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvedit.adapter.deltas import Factors


def write(folder: Path, factors: Mapping[str, Factors], *, base: str, conv: bool) -> None:
    """Write factors, all of one rank, as a LoRA adapter in PEFT's format; it scales them by 1.

    ``base`` is the model that it is for; ``conv`` whether its layers are GPT-2's ``Conv1D``.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = next(iter(factors.values())).rank
    config: Any = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(factors), fan_in_fan_out=conv, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    # PEFT makes a set of the names, whose order varies; the same export must be the same bytes.
    config.target_modules = sorted(factors)
    config.save_pretrained(folder)
    tensors = {}
    for name, pair in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> Any:
    """Wrap a model, in place, in the LoRA adapter of a folder, as PEFT loads it."""
    from peft import PeftModel

    # PEFT would dispatch the model again, which breaks parts that are offloaded to the disk;
    # without a device map its layers go where those of the base are.
    device_map = model.__dict__.pop("hf_device_map", None)
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    finally:
        if device_map is not None:
            model.hf_device_map = device_map


@torch.no_grad()
def cut(model: nn.Module, factors: Mapping[str, Factors], rank: int) -> None:
    """Let a loaded LoRA adapter use only the first ``rank`` terms of its factors."""
    for name, pair in factors.items():
        weight = model.get_submodule(name).lora_A["default"].weight  # type: ignore[index,union-attr]
        weight.copy_(pair.a)
        weight[rank:] = 0
