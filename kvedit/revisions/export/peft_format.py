"""A LoRA adapter in PEFT's format: written from factors, loaded again, cut to fewer terms.

Invariants:
- The same factors are the same bytes.
- A folder is loaded by PEFT alone, as any user of PEFT would.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvedit.adapter.deltas import Factors

CONFIG_FILE = "adapter_config.json"


def write(folder: Path, factors: Mapping[str, Factors], *, base: str, conv: bool) -> None:
    """Write factors, all of one rank, as a LoRA adapter in PEFT's format; it scales them by 1.

    ``base`` is the model that it is for; ``conv`` whether its layers are GPT-2's ``Conv1D``.  The
    configuration has only keys that PEFT 0.4 (2023) knows: an older PEFT refuses ones that it does
    not know, and what is left out has a default that means a plain LoRA.
    """
    from safetensors.torch import save_file

    rank = next(iter(factors.values())).rank
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "inference_mode": True, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "target_modules": sorted(factors), "fan_in_fan_out": conv, "bias": "none",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
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
