"""A LoRA adapter in PEFT's format: written from factors, loaded again, cut to fewer terms.

Invariants:
- The same factors are the same bytes.
- A folder is loaded as PEFT loads it for anyone: nothing of ours stands between.
"""

from __future__ import annotations

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
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        fan_in_fan_out=conv,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # A set comes out in another order each time; the same export should be the same bytes.
    config.target_modules = sorted(factors)
    config.save_pretrained(folder)
    tensors = {}
    for name, own in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = own.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = own.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> Any:
    """Put a LoRA adapter over a model, as PEFT does for anyone; the model is wrapped in place."""
    from peft import PeftModel

    # PEFT would spread the model anew, which parts that lie on the disk do not survive; without a
    # map its layers go where those of the base are.
    spread = model.__dict__.pop("hf_device_map", None)
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    finally:
        if spread is not None:
            model.hf_device_map = spread


@torch.no_grad()
def cut(model: nn.Module, factors: Mapping[str, Factors], rank: int) -> None:
    """Let a loaded LoRA adapter compute with the first ``rank`` terms of its factors alone."""
    for name, own in factors.items():
        weight = model.get_submodule(name).lora_A["default"].weight  # type: ignore[index,union-attr]
        kept = torch.zeros_like(own.a)
        kept[:rank] = own.a[:rank]
        weight.copy_(kept)
