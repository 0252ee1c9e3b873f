"""Settings of libraries in the environment, of which one may be what an error comes from."""

from __future__ import annotations

import os
import re

NAMES = re.compile(
    "(ACCELERATE|CUDA|DIFFUSERS|FSDP|GLOO|HF|HUGGINGFACE|LOCAL|MASTER|MKL|MPL|NCCL|OMP|PYTORCH|"
    "SAFETENSORS|TOKENIZERS|TORCH|TRANSFORMERS|TRITON)[A-Z]*_.*|MPLBACKEND|RANK|WORLD_SIZE"
)
"""The names of variables that torch, accelerate, transformers and the hub's client read."""


_PLAIN = re.compile("[0-9]+|true|false|yes|no|on|off", re.IGNORECASE)
"""Values that libraries understand, and that messages about anything quote."""


def misread(error: Exception) -> str:
    """The variable whose value an error of a library quotes, as NAME=VALUE; empty if none is.

    A variable that the message names comes before the others, and a plain value counts for it
    alone; where several are as likely, all are named.
    """
    if not isinstance(error, ValueError | LookupError | RuntimeError | ImportError | TypeError):
        return ""
    message = str(error)
    quoted = [name for name, value in os.environ.items()
              if NAMES.fullmatch(name) and _quotes(message, value)]  # fmt: skip
    named = [name for name in quoted if re.search(rf"\b{name}\b", message)]
    others = [name for name in quoted if not _PLAIN.fullmatch(os.environ[name])]
    return " or ".join(f"{name}={os.environ[name]!r:.60}" for name in sorted(named or others))


def _quotes(message: str, value: str) -> bool:
    """Whether a message has a value in quotation marks, or ends with it after a word like value."""
    said = re.escape(value)
    form = rf"""(['"`‘“]){said}['"`’”]|(value|got|received|:)\s+{said}\W*$"""
    return bool(value) and re.search(form, message, re.IGNORECASE) is not None
