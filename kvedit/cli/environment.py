"""Settings of libraries in the environment, of which one may be what an error comes from."""

from __future__ import annotations

import os
import re

NAMES = re.compile(
    "(ACCELERATE|CUDA|DIFFUSERS|FSDP|GLOO|HF|HUGGINGFACE|LOCAL|MASTER|MKL|MPL|NCCL|OMP|PYTORCH|"
    "SAFETENSORS|TOKENIZERS|TORCH|TRANSFORMERS|TRITON)[A-Z]*_.*|MPLBACKEND|RANK|WORLD_SIZE"
)
"""The names of variables that torch, accelerate, transformers and the hub's client read."""


def misread(error: Exception) -> str:
    """The variable whose value an error of a library quotes, as NAME=VALUE; empty if none is."""
    if not isinstance(error, ValueError | LookupError | RuntimeError | ImportError | TypeError):
        return ""
    for name, value in os.environ.items():
        quoted = rf"(?<!\w){re.escape(value)}(?!\w)"
        if NAMES.fullmatch(name) and value and re.search(quoted, str(error), re.IGNORECASE):
            return f"{name}={value!r:.60}"
    return ""
