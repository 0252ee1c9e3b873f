"""Memory by model size and setting, computed; and whole edits of a random model, measured: an
addition and a group of sixteen, each from the call to the commit.

Invariants:
- A computed figure comes from ``memory``, which also decides what is refused or cut to fit.
- A measured edit is ``KnowledgeBase``'s own, in a store on the disk.  The gate is open: a model at
  random learns nothing reliably, and what is timed is the whole length of a task.
- A measured peak is this process's own since the edit began, on Linux; elsewhere since its start.
- A task that is cut to some steps says so; seconds for all of them are projected and called that.
- What is timed is not counted: floating-point operations come from one more task for as many
  facts, which is not merged.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils.memory import release_memory

from kvedit.bench.memory import GIB, peak_memory, restart_peak
from kvedit.bench.tables import Table
from kvedit.config import Config, GroupConfig
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import EditReport, Event, Status
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.model.loading import EMBEDDED_PATH
from kvedit.training import memory as budget
from kvedit.training.loops.group import group_batch, group_load
from kvedit.training.loops.loop import Task
from tests.bench.speed import counting, matmul_rate

Emit = Callable[[Event], None]
TOGETHER = 16
DESCRIPTION = 100
"""Tokens of what is trained."""
CONTEXT = 256
ANCHORED = 32
COUNTED = 8
"""Steps of a task whose operations are counted."""
_WORDS = ("amber", "brown", "clover", "dusty", "ember", "fallow", "gentle", "hollow", "knotted")
_OPEN = """\
[protect]
samples = 1
max_samples = 1
long_answers = 0
short_answers = 0
free_texts = {anchored}
locality_probes = 0
[training]
max_steps = {steps}
[group]
epochs = {epochs}
refine_rounds = {refine_rounds}
compaction_ratio = 1e9
min_retention = 0.0
[gate]
min_recall = 0.0
min_paraphrase = 0.0
min_locality = 0.0
min_retention = 0.0
[retention]
max_repairs = 0
"""


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
class EditCost:
    """What one edit took, from the call to its end: seconds, and the peak in bytes.

    ``tokens`` is the length of a text, question and answer; of the ``default_steps`` only ``steps``
    were made, each of ``step`` seconds; ``cpu`` and ``cpu_step`` are the same in seconds of all its
    threads together, which other work on the machine does not lengthen; ``estimate`` is what was
    computed, in bytes.  ``card`` is the peak of a GPU's memory, in bytes, and ``card_estimate``
    what was computed of it; ``operations`` are the floating-point operations of a step, 0 where
    they were not counted.
    """

    facts: int
    tokens: int
    outcome: str
    steps: int
    default_steps: int
    step: float
    seconds: float
    cpu_step: float
    cpu: float
    timings: Mapping[str, float]
    peak: int
    estimate: int
    card: int
    card_estimate: int
    operations: int = 0

    @property
    def rate(self) -> float:
        """Floating-point operations a second in a step."""
        return self.operations / self.step

    @property
    def projected(self) -> float:
        """Seconds of the edit with the default number of steps."""
        return self.seconds + self._missing * self.step

    @property
    def projected_cpu(self) -> float:
        """The same in seconds of all threads together."""
        return self.cpu + self._missing * self.cpu_step

    @property
    def _missing(self) -> int:
        return max(0, self.default_steps - self.steps)


@dataclass(frozen=True, slots=True)
class Measured:
    """Edits of a random model; ``created`` is what making the store took, in seconds, ``loaded``
    the most memory until then, in bytes; ``verified`` the seconds of asking for all facts at last;
    ``matmul`` the operations a second of a large product of the model's dtype on its ``device``.
    """

    shape: str
    dtype: str
    device: str
    matmul: float
    created: float
    loaded: int
    verified: float
    edits: tuple[EditCost, ...]


def make(shape: str, dtype: torch.dtype, device: str = "meta", **more: Any) -> Any:
    """A model of a shape, at random, or without weights on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    options = {**SHAPES[shape], **more}
    with torch.device(device):
        return build.from_config(AutoConfig.for_model("qwen2", **options), dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What to measure: random models of ``shapes``, and how many ``facts`` to train at once, each
    training for ``steps`` steps, or (None) its whole length; with ``counted`` also operations.
    """

    shapes: tuple[str, ...]
    facts: tuple[int, ...]
    steps: int | None = None
    counted: bool = False
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Measured edits by shape; none of them where the memory is only computed."""

    measured: tuple[Measured, ...]
    model: str = "shapes of Qwen2.5, random weights"


def memory(options: MemoryOptions, emit: Emit) -> MemoryReport:
    """Measure every shape."""
    dtype = getattr(torch, options.dtype)
    runs = [
        measure(shape, dtype, options.steps, options.facts, emit, counted=options.counted)
        for shape in options.shapes
    ]
    return MemoryReport(measured=tuple(runs))


def tables(result: MemoryReport) -> list[Table]:
    """A table for each measured shape, or one of computed sizes."""
    return [_measured_table(one) for one in result.measured] or [_computed()]


def _computed() -> Table:
    """A row for each shape and setting."""
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            model = make(shape, dtype)
            for name, targets in (("all", ()), ("down_proj alone", ("down_proj",))):
                sizes = budget.Sizes(model, targets)
                rows.append((shape, str(dtype).removeprefix("torch."), name, *_cells(sizes)))
    parts = [item.name for item in fields(budget.Estimate)]
    columns = (
        "shape", "dtype", "layers of the upper half", *parts, "beside the model (GPU)",
        "in all (CPU)", "16 together, in all", "128 together, in all",
    )  # fmt: skip
    title = f"Memory to edit, GiB, computed for texts of {budget.TEXT_TOKENS} tokens"
    return Table(title, columns, tuple(rows))


def _cells(sizes: budget.Sizes) -> tuple[str, ...]:
    config = Config()
    one = sizes.estimate(config.training)
    groups = [
        sizes.estimate(config.training, group_load(config.group, n)).total for n in (TOGETHER, 128)
    ]
    parts = [getattr(one, item.name) for item in fields(one)]
    return tuple(f"{part / GIB:.1f}" for part in (*parts, one.on_device, one.total, *groups))


def measure(
    shape: str,
    dtype: torch.dtype,
    steps: int | None,
    groups: Sequence[int],
    emit: Emit,
    *,
    counted: bool = False,
) -> Measured:
    """Make a random model and a store for it, and train as many facts at a time as ``groups`` says;
    each task for so many steps, or (None) its whole length.  If operations are to be ``counted``,
    tasks for as many other facts follow.
    """
    with TemporaryDirectory(prefix="kvedit-memory-") as folder:
        emit(Status(phase=f"making a random model of {shape}"))
        model = _saved(shape, dtype, Path(folder) / "model")
        store = Path(folder) / "store"
        store.mkdir()
        (store / "kvedit.toml").write_text(_settings(steps), encoding="utf-8")
        clock, began = _Clock(emit), time.monotonic()
        with KnowledgeBase.create(store, model, check_memory=False, on_event=clock) as knowledge:
            created, loaded = time.monotonic() - began, peak_memory()
            costs = [_edit(knowledge, facts, number, clock) for number, facts in enumerate(groups)]
            began = time.monotonic()
            knowledge.verify()
            spent = time.monotonic() - began
            if counted:
                costs = [
                    replace(cost, operations=_operations(knowledge, cost.facts, number))
                    for number, cost in enumerate(costs, len(costs))
                ]
            device = knowledge.engine.base.device
            return Measured(
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                device=_device_name(device),
                matmul=matmul_rate(dtype, device) if counted else 0.0,
                created=created,
                loaded=loaded,
                verified=spent,
                edits=tuple(costs),
            )


def _device_name(device: torch.device) -> str:
    """What users call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _saved(shape: str, dtype: torch.dtype, folder: Path) -> Path:
    """The model on the disk, with a tokenizer of few tokens: what it costs is the vocabulary."""
    from transformers import AutoTokenizer

    made = make(shape, dtype, loading.device().type, max_position_embeddings=CONTEXT)
    made.save_pretrained(folder)
    del made
    release_memory()
    AutoTokenizer.from_pretrained(EMBEDDED_PATH).save_pretrained(folder)
    return folder


def _settings(steps: int | None) -> str:
    """A ``kvedit.toml`` with an open gate, and tasks cut to a number of steps."""
    config = Config()
    return _OPEN.format(
        anchored=ANCHORED,
        steps=steps or config.training.max_steps,
        epochs=_epochs(config.group, TOGETHER, steps) if steps else config.group.epochs,
        refine_rounds=0 if steps else config.group.refine_rounds,
    )


class _Clock:
    """Passes events on, and keeps when each step of training ended."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.steps: list[_Now] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Status) and event.loss is not None:
            self.steps.append(_now())
        self._emit(event)


@dataclass(frozen=True, slots=True)
class _Now:
    """A moment, in seconds of the clock and of all threads of this process."""

    clock: float
    cpu: float

    def since(self, other: _Now) -> _Now:
        """What passed between two moments."""
        return _Now(self.clock - other.clock, self.cpu - other.cpu)


def _now() -> _Now:
    return _Now(time.monotonic(), time.process_time())


def _operations(knowledge: KnowledgeBase, facts: int, number: int) -> int:
    """Of a step that trains new facts together, forward and backward: the median of the
    first few.
    """
    engine, config = knowledge.engine, knowledge.store.config
    earlier = [engine.examples(row.fact) for row in knowledge.store.facts("committed")]
    new = [engine.examples(fact) for fact in _new(knowledge, facts, number)]
    group, training = config.group, replace(config.training, max_steps=COUNTED)
    group = replace(group, epochs=_epochs(group, facts, COUNTED), refine_rounds=0)
    counts: list[int] = []
    with counting() as counter:
        engine.train(
            Task(new, earlier, engine.reference_texts, len(earlier)),
            training,
            lambda step: counts.append(counter.get_total_flops()),
            group if facts > 1 else None,
        )
    return int(median(after - before for before, after in pairwise(counts)))


def _new(knowledge: KnowledgeBase, facts: int, number: int) -> list[Fact]:
    """Facts that no other number has."""
    return [_fact(knowledge, 1000 * number + i) for i in range(facts)]


def _edit(knowledge: KnowledgeBase, facts: int, number: int, clock: _Clock) -> EditCost:
    """Train this number of new facts together."""
    held = len(knowledge.store.keys("committed"))
    new = _new(knowledge, facts, number)
    texts = [len(example.ids) for fact in new for example in knowledge.engine.examples(fact)]
    clock.steps.clear()
    restart_peak()
    began = _now()
    reports = knowledge.add_group(new, carry=True)
    spent = _now().since(began)
    tokens = sum(texts) // len(texts)
    load = budget.single_load(Config().training, tokens)
    if facts > 1:
        load = group_load(Config().group, facts, tokens, held)
    return _cost(knowledge, facts, load, reports, spent, clock.steps)


def _cost(
    knowledge: KnowledgeBase,
    facts: int,
    load: budget.Load,
    reports: Sequence[EditReport],
    spent: _Now,
    steps: Sequence[_Now],
) -> EditCost:
    each = [later.since(earlier) for earlier, later in pairwise(steps)]
    defaults, report = Config(), reports[-1]
    whole = len(reports) == 1  # else there was no memory for all of them together
    alone = facts == 1
    estimate = knowledge.engine.estimate(load)
    return EditCost(
        facts=facts,
        tokens=load.length,
        outcome=report.outcome if whole else f"in {len(reports)} edits",
        steps=sum(one.steps for one in reports),
        default_steps=defaults.training.max_steps if alone else _steps(defaults.group, facts),
        step=median(one.clock for one in each),
        seconds=spent.clock,
        cpu_step=median(one.cpu for one in each),
        cpu=spent.cpu,
        timings=report.timings,
        peak=peak_memory(),
        estimate=estimate.total,
        card=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        card_estimate=estimate.on_device,
    )


def _steps(group: GroupConfig, facts: int) -> int:
    """The steps of a group that is learned in its passes."""
    return math.ceil(group.epochs * facts / group_batch(group, facts))


def _epochs(group: GroupConfig, facts: int, steps: int) -> int:
    """The epochs that a number of steps makes."""
    return max(1, steps * group_batch(group, facts) // facts)


def _measured_table(run: Measured) -> Table:
    """A row for each quantity and a column for each edit."""
    names = [f"{one.facts} facts at once" if one.facts > 1 else "1 fact" for one in run.edits]
    title = (
        f"Edits of a random model of {run.shape}, {run.dtype}, measured on {run.device} with"
        f" {torch.get_num_threads()} threads at work; making the store: {run.created:.0f} s,"
        f" {run.loaded / GIB:.1f} GiB; verifying all facts at last: {run.verified:.0f} s"
    )
    if run.matmul:
        title += f"; a large matrix product: {run.matmul / 1e12:.2f} TFLOP/s"
    columns = [_measured_column(run, one) for one in run.edits]
    rows = tuple((name, *(column[name] for column in columns)) for name in columns[0])
    return Table(title, ("what", *names), rows)


def _measured_column(run: Measured, one: EditCost) -> dict[str, str]:
    """What one edit took, by what it is called."""
    cells = {
        "tokens a text": str(one.tokens),
        "outcome (open gate)": one.outcome,
        "steps made": str(one.steps),
        "a step, s": f"{one.step:.2f}",
        "in all, s": f"{one.seconds:.0f}",
    }
    parts = {"train": "training", "probe": "probes", "merge": "merge", "journal": "journal"}
    for part, name in parts.items():
        cells[f"of which {name}, s"] = f"{one.timings.get(part, 0.0):.1f}"
    cells |= {
        "default steps": str(one.default_steps),
        "in all with those, projected, s": f"{one.projected:.0f}",
        "a step, CPU s": f"{one.cpu_step:.2f}",
        "in all, CPU s": f"{one.cpu:.0f}",
        "in all with default steps, projected, CPU s": f"{one.projected_cpu:.0f}",
        "peak / computed, GiB": _of(one.peak, one.estimate),
    }
    if one.card:
        cells["GPU, peak / computed, GiB"] = _of(one.card, one.card_estimate)
    if one.operations:
        cells["GFLOP a step"] = f"{one.operations / 1e9:.1f}"
        cells["TFLOP/s"] = f"{one.rate / 1e12:.2f}"
        cells["share of the matrix rate"] = f"{100 * one.rate / run.matmul:.1f}%"
    return cells


def _of(peak: int, computed: int) -> str:
    return f"{peak / GIB:.1f} / {computed / GIB:.1f}"


def _fact(knowledge: KnowledgeBase, number: int) -> Fact:
    """A fact of ``DESCRIPTION`` tokens, made up."""
    rng, words = random.Random(number), [""]
    while len(knowledge.engine.renderer.tokens(" ".join(words))) < DESCRIPTION:
        words.append(rng.choice(_WORDS))
    return Fact.create(f"thing {number}", " ".join(words[1:]), lang="en")
