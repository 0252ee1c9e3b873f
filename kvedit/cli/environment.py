"""Settings of libraries in the environment, of which one may be what an error comes from."""

from __future__ import annotations

import os
import re

NAMES = re.compile(
    "(ACCELERATE|CUDA|DIFFUSERS|FSDP|GLOO|HF|HUGGINGFACE|LOCAL|MASTER|MKL|MPL|NCCL|OMP|PYTORCH|"
    "SAFETENSORS|TOKENIZERS|TORCH|TRANSFORMERS|TRITON)[A-Z]*_.*|MPLBACKEND|RANK|WORLD_SIZE"
)
"""The names of variables that torch, accelerate, transformers and the hub's client read."""


SHORT = 2  # characters of values, such as 0, 1 and no, that stand in messages about anything


def misread(error: Exception) -> str:
    """The variable whose value an error of a library quotes, as NAME=VALUE; empty if none is.

    One that the message names comes before one whose value it quotes, a long value before a short
    one; a short one has to be in quotation marks.  Where several are as likely, all are named.
    """
    if not isinstance(error, ValueError | LookupError | RuntimeError | ImportError | TypeError):
        return ""
    weights = {
        name: weight
        for name, value in os.environ.items()
        if NAMES.fullmatch(name) and value and (weight := _weight(name, value, str(error)))
    }
    likely = [name for name, weight in weights.items() if weight == max(weights.values())]
    return " or ".join(f"{name}={os.environ[name]!r:.60}" for name in sorted(likely))


def _weight(name: str, value: str, message: str) -> tuple[bool, int]:
    """How likely a message is about a variable; false if it does not quote the value."""
