"""What training costs: seconds a fact, where they go, memory, and arithmetic against the machine.

Invariants:
- Everything is measured in one process on one machine, one thing after the other.
- What is timed is not instrumented: the parts of a task, and its floating-point operations, come
  from repeating one task, which changes no weights and draws the same numbers each time.
"""

from __future__ import annotations

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

from kvedit.bench.memory import peak_memory
from kvedit.bench.speed import (
    EXTRACTION,
    EditTime,
    EditTimings,
    IngestTime,
    time_ingest,
    time_single,
)
from kvedit.config import GroupConfig
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import InvalidFactError
from kvedit.events import Score, Status
from kvedit.facts.fact import Fact
from kvedit.metrics import bootstrap
from kvedit.model import forward, loading
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Task
from tests.bench import questions
from tests.bench.asking import Kept
from tests.bench.retain import (
    BenchOptions,
    Emit,
    engine_of,
    new_store,
    pair_ratios,
    run_baseline,
)
from tests.bench.strategies import own_store

MATMUL_SIDE = 1024
ACCELERATED_SIDE = 8192
"""Of a product on an accelerator, which 1024 would not fill."""
MATMUL_SECONDS = 0.5
REHEARSED = 16
EPOCHS = 6
"""Of a group's task that is profiled: its steps are alike, a few tell what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions(BenchOptions):
    """``ingest_facts`` are trained by ingest, ``facts`` of them one by one, ``baseline_facts`` of
    those by the baseline; drawn evenly, since texts differ in length.
    """

    ingest_facts: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTime:
    """A task for some facts, beside ``rehearsal`` earlier ones: ``seconds`` without instruments,
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

    ``ratios`` pair the baseline's seconds with kvedit's, for facts that both learned; ``ratio``
    is their median.  ``ingest_ratio`` is the baseline's median over ingest's mean, in seconds a
    fact that was learned; there is one run of ingest, so its interval is that of the baseline.
    """

    model: str
    dtype: str
    setup_seconds: float
    edits: tuple[EditTime, ...]
    ingested: IngestTime
    group_task: TaskTime | None
    baseline: tuple[EditTime, ...]
    ratios: tuple[float, ...]
    ratio: Estimate | None
    ingest_ratio: Estimate | None
    task: TaskTime
    matmul: dict[str, float]
    verified: VerifyTime
    peaks: dict[str, int]


def speed(options: SpeedOptions, emit: Emit) -> SpeedResult:
    """Add one by one, ingest, and the baseline, on the same facts; then one task in parts."""
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    count = max(options.facts + 1, options.ingest_facts)
    facts = questions.new_facts(data, count, options.facts_file, options.kind)
    if len(facts) < 2:
        raise InvalidFactError("two facts are needed: one to add, one to take a task apart")
    single = spread(facts, min(options.facts, len(facts) - 1))
    other = next(fact for fact in facts if fact not in single)
    peaks: dict[str, int] = {}
    began = time.monotonic()
    with new_store(own_store(options, "one-by-one"), emit) as knowledge:
        setup = time.monotonic() - began
        edits = time_single(knowledge, single, emit)
        peaks["one by one"] = peak_memory()
        verified = _verify(knowledge)
        task = _task(knowledge, other, emit)
        base = engine_of(knowledge).base
        matmul = {_name(dtype): matmul_rate(dtype, base.device) for dtype in _dtypes(base.dtype)}
    ingested, group_task = _ingest(options, facts[: options.ingest_facts], emit)
    peaks["ingest"] = peak_memory()
    some = spread(single, min(options.baseline_facts, len(single)))
    baseline = run_baseline(source, some, Kept((), ()), emit)[0] if some else []
    if baseline:
        peaks["baseline"] = peak_memory()
    ratios = pair_ratios(edits, baseline)
    return SpeedResult(
        model=base.name,
        dtype=_name(base.dtype),
        setup_seconds=setup,
        edits=tuple(edits),
        ingested=ingested,
        group_task=group_task,
        baseline=tuple(baseline),
        ratios=tuple(ratios),
        ratio=middle(ratios),
        ingest_ratio=ingest_ratio(ingested, baseline),
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
    ingested: IngestTime, baseline: Sequence[EditTime], *, extracted: bool = True
) -> Estimate | None:
    """The baseline's median over ingest's mean, in seconds a fact that was learned; without the
    extraction where the store is not ``extracted`` by this run.
    """
    if not ingested.committed:
        return None
    learned = [edit.seconds for edit in baseline if edit.outcome == "learned"]
    apart = 0.0 if extracted else ingested.parts.get(EXTRACTION, 0.0)
    return middle(learned, ingested.committed / (ingested.seconds - apart))


def _verify(knowledge: KnowledgeBase) -> VerifyTime:
    engine = engine_of(knowledge)
    rows = knowledge.store.facts("committed")
    asked = sum(len(engine.examples(row.fact)) for row in rows)
    report = knowledge.verify()
    return VerifyTime(
        facts=len(rows), phrasings=asked, seconds=report.seconds, held=report.generated
    )


def _ingest(
    options: SpeedOptions, facts: Sequence[Fact], emit: Emit
) -> tuple[IngestTime, TaskTime | None]:
    """An ingest, and its last facts trained once more together, in fewer epochs, as profiled."""
    timings = EditTimings(emit)
    with new_store(own_store(options, "ingest"), timings) as knowledge:
        timed = time_ingest(knowledge, facts, timings, emit)
        return timed, _group_task(knowledge, emit)


# ---- one task profiled


def _task(knowledge: KnowledgeBase, fact: Fact, emit: Emit) -> TaskTime:
    """A task for one fact."""
    engine = engine_of(knowledge)
    earlier = [engine.examples(row.fact) for row in knowledge.store.facts("committed")]
    task = Task([engine.examples(fact)], earlier[-REHEARSED:], engine.reference_texts)
    emit(Status(phase="taking a task apart", key=fact.key))
    return _profile(engine, task)


def _group_task(knowledge: KnowledgeBase, emit: Emit) -> TaskTime | None:
    """A task for the newest facts together, the others rehearsed; None of a single fact.

    What is trained is known already: a step of it costs what a step costs.
    """
    engine = engine_of(knowledge)
    facts = [engine.examples(row.fact) for row in knowledge.store.facts("committed")]
    new, earlier = facts[-REHEARSED:], facts[:-REHEARSED]
    if len(new) < 2:
        return None
    emit(Status(phase=f"taking a task of {len(new)} facts apart"))
    task = Task(new, earlier, engine.reference_texts, len(earlier))
    return _profile(
        engine, task, replace(knowledge.store.config.group, epochs=EPOCHS, refine_rounds=0)
    )


def _profile(engine: Engine, task: Task, group: GroupConfig | None = None) -> TaskTime:
    """A task that is not merged, four times: to warm up, timed, with time hooks, counted."""
    engine.train(task, group=group)
    began = time.monotonic()
    trained = engine.train(task, group=group)
    seconds = time.monotonic() - began
    parts: dict[str, float] = {}
    with _hooked(engine, parts):
        began = time.monotonic()
        engine.train(task, group=group)
        parts["other"] = time.monotonic() - began - sum(parts.values())
    with counting() as counter:
        engine.train(task, group=group)
    return TaskTime(
        facts=len(task.new),
        steps=trained.trained.steps,
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


def _dtypes(served: torch.dtype) -> list[torch.dtype]:
    return list(dict.fromkeys((served, torch.float32)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
