"""What teaching costs: seconds a fact, where they go, memory, and arithmetic against the machine.

Invariants:
- Everything is measured in one process on one machine, one thing after the other.
- What is timed is not instrumented: the parts of a lesson, and its floating-point operations, come
  from repeating one lesson, which changes no weights and draws the same numbers each time.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from kvedit.config import GroupConfig
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import InvalidFactError
from kvedit.events import EditReport, Event, Score, Status
from kvedit.facts.fact import Fact
from kvedit.ingest.report import IngestOptions
from kvedit.ingest.run import ingest
from kvedit.metrics import bootstrap
from kvedit.model import forward, loading
from kvedit.training.engine import Engine
from kvedit.training.loop import Task
from tests.bench import questions
from tests.bench.asking import Kept
from tests.bench.retain import (
    BenchOptions,
    Edit,
    Emit,
    add_timed,
    engine_of,
    new_store,
    pair_ratios,
    plain_all,
)
from tests.bench.strategies import own_store

MATMUL_SIDE = 1024
ACCELERATED_SIDE = 8192
"""Of a product on an accelerator, which 1024 would not fill."""
MATMUL_SECONDS = 0.5
REHEARSED = 16
SEARCH = "search"
"""The part of ingest that looks for what the model knows: once for a store, before the lessons."""
PASSES = 6
"""Of a group's lesson that is taken apart: its steps are alike, a few tell what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions(BenchOptions):
    """``ingest_facts`` are taught by ingest, ``facts`` of them one by one, ``plain_facts`` of those
    by the plain recipe; drawn evenly, since texts differ in length.
    """

    ingest_facts: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestTime:
    """One run of ingest, groups of automatic size: seconds of all, and by part: the search for what
    the model knows, the parts of its edits, the rest (``other``).

    ``task`` are its last facts taught once more together, in fewer passes, as taken apart.
    """

    facts: int
    committed: int
    seconds: float
    parts: dict[str, float]
    task: LessonTime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonTime:
    """A lesson for some facts, beside ``rehearsal`` earlier ones: ``seconds`` without instruments,
    ``parts`` of the repetition with time hooks, ``operations`` counted in another.
    """

    facts: int
    steps: int
    rehearsal: int
    seconds: float
    parts: dict[str, float]
    operations: int

    @property
    def rate(self) -> float:
        """Floating-point operations a second."""
        return self.operations / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTime:
    """``verify`` of all facts: each phrasing teacher-forced, one of each fact generated."""

    facts: int
    phrasings: int
    seconds: float
    held: Score


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its bootstrap 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """All that ``speed`` measured; ``peaks`` are the process's largest memory so far, in bytes,
    after each stage; ``matmul`` floating-point operations a second by dtype.

    ``ratios`` pair the plain recipe's seconds with kvedit's, for facts that both learned; ``ratio``
    is their median.  ``ingest_ratio`` is the plain recipe's median over ingest's mean, in seconds a
    fact that was learned; there is one run of ingest, so its interval is that of the plain recipe.
    """

    model: str
    dtype: str
    setup_seconds: float
    edits: tuple[Edit, ...]
    ingested: IngestTime
    plain: tuple[Edit, ...]
    ratios: tuple[float, ...]
    ratio: Estimate | None
    ingest_ratio: Estimate | None
    task: LessonTime
    matmul: dict[str, float]
    verified: VerifyTime
    peaks: dict[str, int]


def speed(options: SpeedOptions, emit: Emit) -> SpeedResult:
    """Add one by one, ingest, and the plain recipe, on the same facts; then one lesson in parts."""
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    count = max(options.facts + 1, options.ingest_facts)
    facts = questions.new_facts(data, count, options.facts_file, options.kind)
    if len(facts) < 2:
        raise InvalidFactError("two facts are needed: one to add, one to take a lesson apart")
    single = spread(facts, min(options.facts, len(facts) - 1))
    other = next(fact for fact in facts if fact not in single)
    peaks: dict[str, int] = {}
    began = time.monotonic()
    with new_store(own_store(options, "one-by-one"), emit) as knowledge:
        setup = time.monotonic() - began
        edits = _one_by_one(knowledge, single, emit)
        peaks["one by one"] = peak_memory()
        verified = _verify(knowledge)
        task = _task(knowledge, other, emit)
        base = engine_of(knowledge).base
        matmul = {_name(dtype): matmul_rate(dtype, base.device) for dtype in _dtypes(base.dtype)}
    ingested = _ingest(options, facts[: options.ingest_facts], emit)
    peaks["ingest"] = peak_memory()
    some = spread(single, min(options.plain_facts, len(single)))
    plain = plain_all(source, some, Kept((), ()), emit)[0] if some else []
    if plain:
        peaks["plain recipe"] = peak_memory()
    ratios = pair_ratios(edits, plain)
    return SpeedResult(
        model=base.name,
        dtype=_name(base.dtype),
        setup_seconds=setup,
        edits=tuple(edits),
        ingested=ingested,
        plain=tuple(plain),
        ratios=tuple(ratios),
        ratio=middle(ratios),
        ingest_ratio=ingest_ratio(ingested, plain),
        task=task,
        matmul=matmul,
        verified=verified,
        peaks=peaks,
    )


def spread(facts: Sequence[Fact], count: int) -> list[Fact]:
    """So many of the facts, evenly from the first to the last."""
    return [facts[at * len(facts) // count] for at in range(count)]


def middle(values: Sequence[float], scale: float = 1.0) -> Estimate | None:
    """The median of some values times ``scale``; None of no values."""
    if not values:
        return None
    low, high = bootstrap(lambda rng: median(rng.choices(values, k=len(values))))
    return Estimate(scale * median(values), scale * low, scale * high)


def ingest_ratio(
    ingested: IngestTime, plain: Sequence[Edit], *, searched: bool = True
) -> Estimate | None:
    """The plain recipe's median over ingest's mean, in seconds a fact that was learned; without the
    search where the store is not ``searched`` by this run.
    """
    if not ingested.committed:
        return None
    learned = [edit.seconds for edit in plain if edit.outcome == "learned"]
    apart = 0.0 if searched else ingested.parts.get(SEARCH, 0.0)
    return middle(learned, ingested.committed / (ingested.seconds - apart))


def shares(edits: Sequence[Edit]) -> dict[str, float]:
    """The share of each part in the time of all edits."""
    total = sum(edit.seconds for edit in edits) or 1.0
    names = dict.fromkeys(name for edit in edits for name in edit.timings)
    return {n: sum(edit.timings.get(n, 0.0) for edit in edits) / total for n in names}


def _one_by_one(knowledge: KnowledgeBase, facts: Sequence[Fact], emit: Emit) -> list[Edit]:
    edits = []
    for number, fact in enumerate(facts, 1):
        emit(Status(phase=f"fact {number} of {len(facts)}", key=fact.key))
        edits.append(add_timed(knowledge, fact))
    return edits


def _verify(knowledge: KnowledgeBase) -> VerifyTime:
    engine = engine_of(knowledge)
    rows = knowledge.store.facts("committed")
    asked = sum(len(engine.examples(row.fact)) for row in rows)
    report = knowledge.verify()
    return VerifyTime(
        facts=len(rows), phrasings=asked, seconds=report.seconds, held=report.generated
    )


def _ingest(options: SpeedOptions, facts: Sequence[Fact], emit: Emit) -> IngestTime:
    parts: dict[str, float] = {}

    def adding(event: Event) -> None:
        if isinstance(event, EditReport):
            for name, spent in event.timings.items():
                parts[name] = parts.get(name, 0.0) + spent
        emit(event)

    with new_store(own_store(options, "ingest"), adding) as knowledge:
        began = time.monotonic()
        knowledge.protect_for(len(facts))
        parts[SEARCH] = time.monotonic() - began
        report = ingest(knowledge, facts, IngestOptions(skip_invalid=True), emit)
        seconds = time.monotonic() - began
        parts["other"] = max(0.0, seconds - sum(parts.values()))
        task = _group_lesson(knowledge, emit)
    return IngestTime(
        facts=len(facts),
        committed=report.count("committed"),
        seconds=seconds,
        parts=parts,
        task=task,
    )


# ---- one lesson taken apart


def _task(knowledge: KnowledgeBase, fact: Fact, emit: Emit) -> LessonTime:
    """A lesson for one fact."""
    engine = engine_of(knowledge)
    earlier = [engine.examples(row.fact) for row in knowledge.store.facts("committed")]
    task = Task([engine.examples(fact)], earlier[-REHEARSED:], engine.reference_texts)
    emit(Status(phase="taking a lesson apart", key=fact.key))
    return _taken_apart(engine, task)


def _group_lesson(knowledge: KnowledgeBase, emit: Emit) -> LessonTime | None:
    """A lesson for the newest facts together, the others rehearsed; None of a single fact.

    What is taught is known already: a step of it costs what a step costs.
    """
    engine = engine_of(knowledge)
    facts = [engine.examples(row.fact) for row in knowledge.store.facts("committed")]
    new, earlier = facts[-REHEARSED:], facts[:-REHEARSED]
    if len(new) < 2:
        return None
    emit(Status(phase=f"taking a lesson of {len(new)} facts apart"))
    task = Task(new, earlier, engine.reference_texts, len(earlier))
    return _taken_apart(
        engine, task, replace(knowledge.store.config.group, passes=PASSES, rounds=0)
    )


def _taken_apart(engine: Engine, task: Task, group: GroupConfig | None = None) -> LessonTime:
    """A lesson that is not merged, four times: to warm up, timed, with time hooks, counted."""
    engine.teach(task, group=group)
    began = time.monotonic()
    taught = engine.teach(task, group=group)
    seconds = time.monotonic() - began
    parts: dict[str, float] = {}
    with _hooked(engine, parts):
        began = time.monotonic()
        engine.teach(task, group=group)
        parts["other"] = time.monotonic() - began - sum(parts.values())
    with counting() as counter:
        engine.teach(task, group=group)
    return LessonTime(
        facts=len(task.new),
        steps=taught.trained.steps,
        rehearsal=len(task.rehearsal),
        seconds=seconds,
        parts=parts,
        operations=counter.get_total_flops(),
    )


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Inside, floating-point operations are counted: each matrix product (m x k by k x n), those of
    attention too, as 2 m k n.

    Of a GPU's kernels for attention torch's counter knows nothing where keys are fewer than
    queries.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


class _Stopwatch:
    """Adds up the seconds between starts and stops; waits for a GPU at both."""

    def __init__(self, parts: dict[str, float], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._began: dict[str, float] = {}

    def start(self, name: str) -> None:
        self._began[name] = self._now()

    def stop(self, name: str) -> None:
        spent = self._now() - self._began[name]
        self._parts[name] = self._parts.get(name, 0.0) + spent

    def _now(self) -> float:
        _wait(self._device)
        return time.monotonic()


@contextmanager
def _hooked(engine: Engine, parts: dict[str, float]) -> Iterator[None]:
    """Time the model's forward pass, the backward pass and the optimizer's step."""
    watch = _Stopwatch(parts, engine.base.device)
    model = engine.base.model
    handles: list[Any] = []
    for module in filter(None, (forward.backbone(model), forward.head(model))):
        # A pass that hands on what was kept of the lower blocks may end early, by an exception.
        handles.append(module.register_forward_pre_hook(lambda *_: watch.start("forward")))
        handles.append(
            module.register_forward_hook(lambda *_: watch.stop("forward"), always_call=True)
        )
    handles.append(register_optimizer_step_pre_hook(lambda *_: watch.start("optimizer")))
    handles.append(register_optimizer_step_post_hook(lambda *_: watch.stop("optimizer")))
    backward = torch.autograd.backward

    def timed(*given: Any, **more: Any) -> None:
        watch.start("backward")
        backward(*given, **more)
        watch.stop("backward")

    setattr(torch.autograd, "backward", timed)  # noqa: B010 - there is no hook for it
    try:
        yield
    finally:
        setattr(torch.autograd, "backward", backward)  # noqa: B010
        for handle in handles:
            handle.remove()


# ---- the machine


def matmul_rate(
    dtype: torch.dtype,
    device: torch.device,
    side: int | None = None,
    seconds: float = MATMUL_SECONDS,
) -> float:
    """Operations a second (2 side^3 a product) of the fastest of many square products."""
    side = side or matmul_side(device)
    one = torch.randn(side, side).to(device, dtype)
    fastest, until = float("inf"), time.monotonic() + seconds
    while fastest == float("inf") or time.monotonic() < until:
        _wait(device)
        began = time.perf_counter()
        one @ one
        _wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * side**3 / fastest


def matmul_side(device: torch.device) -> int:
    """Of the square products that tell what a device can do."""
    return MATMUL_SIDE if device.type == "cpu" else ACCELERATED_SIDE


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _dtypes(served: torch.dtype) -> list[torch.dtype]:
    return list(dict.fromkeys((served, torch.float32)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
