"""Memory by model size and setting, computed; and lessons of a random model, measured: one fact by
itself as ``add`` teaches it, and a group of sixteen with what stands beside a group in every step.

Invariants:
- A computed figure comes from ``memory.estimate``, which also decides what ``init`` refuses.
- A measured peak is this process's own since the part began, on Linux; elsewhere since its start.
- A lesson is cut to some steps and says so; seconds for all of them are projected and called that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvedit import memory
from kvedit.bench.report import Sheet
from kvedit.bench.speed import peak_memory
from kvedit.config import GroupConfig, TrainingConfig
from kvedit.engine import Engine
from kvedit.events import Event, Status
from kvedit.models import BaseModel
from kvedit.prompts import Example
from kvedit.training import Lesson

_GIB = 1024**3
Emit = Callable[[Event], None]
TOGETHER = 16
PROMPTS = 10
ANCHORED = 64


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
class LessonCost:
    """What teaching some facts together took: seconds, and the peak in bytes.

    ``begin`` is all before the first step is done but that step; ``after`` merging, probing the
    merged model and putting it back.  Of the ``default_steps`` only ``steps`` were made.
    """

    facts: int
    steps: int
    default_steps: int
    begin: float
    step: float
    after: float
    peak: int

    @property
    def projected(self) -> float:
        """Seconds of the lesson with the default number of steps."""
        return self.begin + self.default_steps * self.step + self.after


@dataclass(frozen=True, slots=True)
class Measured:
    """Lessons on a random model; ``loaded`` is what the process took before, in bytes."""

    shape: str
    dtype: str
    protect_seconds: float
    loaded: int
    estimate: int
    lessons: tuple[LessonCost, ...]


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
    """Protect some texts, then teach one fact and sixteen together, each for some steps; a random
    model learns nothing, and what it is taught is taken back.
    """
    emit(Status(phase=f"making a random model of {shape}"))
    model = make(shape, dtype, "cpu").eval().requires_grad_(False)
    wanted = memory.estimate(model, TrainingConfig()).total
    engine = Engine(BaseModel(model, _NoTokenizer(), shape, "", ""), TrainingConfig())
    loaded = _peak()
    emit(Status(phase="protecting 16 texts"))
    began = time.monotonic()
    engine.protect([_text(number, 48) for number in range(16)])
    protected = time.monotonic() - began
    engine.anchor([_text(number, 48) for number in range(ANCHORED)])
    name = str(dtype).removeprefix("torch.")
    costs = tuple(_lesson(engine, facts, steps, emit) for facts in (1, TOGETHER))
    return Measured(shape, name, protected, loaded, wanted, costs)


def _lesson(engine: Engine, facts: int, steps: int, emit: Emit) -> LessonCost:
    """Teach so many facts, cut to some steps; merge, probe and put back."""
    emit(Status(phase=f"teaching {facts} at once for {steps} steps"))
    defaults, group = TrainingConfig(), GroupConfig()
    new = [[_text(1000 * (fact + 1) + n, 32) for n in range(PROMPTS)] for fact in range(facts)]
    earlier = [[_text(500_000 + n, 32)] for n in range(group.rehearsal)]
    lesson = Lesson(new, earlier, engine.anchors)
    done: list[float] = []
    _restart_peak()
    before = engine.master.snapshot()
    began = time.monotonic()
    taught = engine.teach(
        lesson,
        replace(defaults, max_steps=steps),
        lambda step: done.append(time.monotonic()),
        replace(group, passes=steps, rounds=0) if facts > 1 else None,
    )
    ended = time.monotonic()
    each = (done[-1] - done[0]) / (len(done) - 1)
    engine.master.add(taught.delta)
    engine.recall([example for fact in new for example in fact])
    engine.master.restore(before)
    return LessonCost(
        facts=facts,
        steps=taught.trained.steps,
        default_steps=defaults.max_steps if facts == 1 else _passes(group, facts),
        begin=done[0] - began - each,
        step=each,
        after=time.monotonic() - ended,
        peak=_peak(),
    )


def _passes(group: GroupConfig, facts: int) -> int:
    """The steps of a group that is learned in its passes."""
    return math.ceil(group.passes * facts / min(group.batch, facts))


def measured_sheet(found: Measured) -> Sheet:
    """A row for each lesson."""
    headers = (
        "shape", "dtype", "facts", "steps made", "before the first, s", "a step, s",
        "merge, probe, put back, s", "default steps", "projected, s", "peak, GiB",
        "computed, GiB",
    )  # fmt: skip
    rows = tuple(
        (
            found.shape, found.dtype, str(one.facts), str(one.steps), f"{one.begin:.1f}",
            f"{one.step:.2f}", f"{one.after:.1f}", str(one.default_steps), f"{one.projected:.0f}",
            f"{one.peak / _GIB:.1f}", f"{found.estimate / _GIB:.1f}",
        )
        for one in found.lessons
    )  # fmt: skip
    title = (
        f"Lessons measured on {torch.get_num_threads()} threads; the model loaded:"
        f" {found.loaded / _GIB:.1f} GiB; protecting 16 texts: {found.protect_seconds:.1f} s"
    )
    return Sheet(title, headers, rows)


def _restart_peak() -> None:
    """Let the system forget the peak so far, where it can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    """The most memory that this process had resident since ``_restart_peak``, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory()


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
