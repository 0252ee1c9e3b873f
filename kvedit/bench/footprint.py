"""Memory by model size and setting, computed; and one lesson of a random model, measured.

Invariants:
- A computed figure comes from ``memory.estimate``, which also decides what ``init`` refuses.
- A measured figure is this process's own peak, the model's making left out where the system says.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvedit import memory
from kvedit.bench.report import Sheet
from kvedit.config import TrainingConfig
from kvedit.engine import Engine
from kvedit.events import Event, Status
from kvedit.models import BaseModel
from kvedit.prompts import Example
from kvedit.training import Lesson

_GIB = 1024**3
Emit = Callable[[Event], None]


def _qwen(width: int, inner: int, blocks: int, heads: int, keys: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": 152_064,
        "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES: Mapping[str, dict[str, Any]] = {
    "0.5B": _qwen(896, 4864, 24, 14, 2, True),
    "1.5B": _qwen(1536, 8960, 28, 12, 2, True),
    "3B": _qwen(2048, 11008, 36, 16, 2, True),
    "7B": _qwen(3584, 18944, 28, 28, 4, False),
    "14B": _qwen(5120, 13824, 48, 40, 8, False),
    "32B": _qwen(5120, 27648, 64, 40, 8, False),
}
"""Of the Qwen2.5 family."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One lesson on a random model: seconds, and the peak and the model's own size in bytes."""

    shape: str
    dtype: str
    steps: int
    protect_seconds: float
    step_seconds: float
    peak: int
    estimate: int


def make(shape: str, dtype: torch.dtype, device: str = "meta") -> Any:
    """A model of a shape, at random, or without weights on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    with torch.device(device):
        return build.from_config(AutoConfig.for_model("qwen2", **SHAPES[shape]), dtype=dtype)


def computed() -> Sheet:
    """A row for each shape and setting."""
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            model = make(shape, dtype)
            for name, targets in (("all", ()), ("down_proj alone", ("down_proj",))):
                found = memory.estimate(model, TrainingConfig(), targets=targets)
                rows.append((shape, str(dtype).removeprefix("torch."), name, *_cells(found)))
    headers = (
        "shape", "dtype", "layers of the upper half", "weights", "master (CPU)", "gradients",
        "curvature", "adapter", "activations", "beside the model (GPU)", "in all (CPU)",
    )  # fmt: skip
    return Sheet("Memory to edit, GiB, computed", headers, tuple(rows))


def _cells(found: memory.Estimate) -> tuple[str, ...]:
    parts = (
        found.weights, found.master, found.gradients, found.curvature, found.adapter,
        found.activations, found.on_device, found.total,
    )  # fmt: skip
    return tuple(f"{part / _GIB:.1f}" for part in parts)


def measure(shape: str, dtype: torch.dtype, steps: int, emit: Emit) -> Measured:
    """Protect sixteen texts and teach one fact for some steps; a random model learns nothing."""
    emit(Status(phase=f"making a random model of {shape}"))
    model = make(shape, dtype, "cpu").eval().requires_grad_(False)
    config = replace(TrainingConfig(), max_steps=steps)
    wanted = memory.estimate(model, config).total
    base = BaseModel(model, _NoTokenizer(), shape, "", "")
    engine = Engine(base, config)
    began = time.monotonic()
    engine.protect([_text(number, 48) for number in range(16)])
    protected = time.monotonic() - began
    emit(Status(phase=f"teaching for {steps} steps"))
    began = time.monotonic()
    taught = engine.teach(Lesson([[_text(100 + n, 32) for n in range(10)]]))
    seconds = (time.monotonic() - began) / max(1, taught.trained.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = str(dtype).removeprefix("torch.")
    return Measured(shape, name, taught.trained.steps, protected, seconds, peak, wanted)


def measured_sheet(found: Measured) -> Sheet:
    """One row."""
    headers = (
        "shape", "dtype", "protecting 16 texts, s", "a step of teaching, s", "peak, GiB",
        "computed, GiB",
    )  # fmt: skip
    row = (
        found.shape, found.dtype, f"{found.protect_seconds:.1f}", f"{found.step_seconds:.2f}",
        f"{found.peak / _GIB:.1f}", f"{found.estimate / _GIB:.1f}",
    )  # fmt: skip
    return Sheet(f"One lesson of {found.steps} steps, measured", headers, (row,))


def _text(seed: int, length: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 100_000, (length,), generator=generator).tolist()
    return Example(tuple(ids), length // 2)


class _NoTokenizer:
    """Stands where none is needed: texts are drawn as tokens."""

    chat_template = None
    eos_token_id = 1
    bos_token_id = None

    def __call__(self, text: str, **more: Any) -> dict[str, list[int]]:
        return {"input_ids": [2] * len(text)}
