"""The same facts taught in different ways: one by one, in groups, all at once, by the plain recipe.

Each way gets a new store and one uninterrupted run of ``ingest``; what is held is measured in
passing, when so many facts are done.

Invariants:
- The clock stands still while something is measured: seconds are those of teaching alone.
- What was measured so far is told after every measurement, so that a run that ends early has left
  it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from kvedit import models
from kvedit.bench import questions
from kvedit.bench.asking import Kept, Lesson, Point, Student, measure
from kvedit.bench.retain import (
    BaseScore,
    BenchOptions,
    Edit,
    Emit,
    base_facts,
    engine_of,
    new_store,
    plain_all,
    seen_texts,
)
from kvedit.editor import KnowledgeBase
from kvedit.errors import Interrupted
from kvedit.events import EditReport, Event, IngestProgress, Score, Status, Warning_
from kvedit.facts import Fact
from kvedit.ingest import IngestOptions, IngestReport, ingest

EARLY_MARKS = (16, 32, 64, 128, 256, 300, 512)
WINDOW = 500
NOISE = ("similar-key", "apart")
"""Warnings that a run over poets' names gives by the hundred."""
_NAMES = {"1": "one by one", "all": "one group", "auto": "automatic groups"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions(BenchOptions):
    """``groups`` are sizes: a number, ``all`` or ``auto``."""

    groups: tuple[str, ...] = ("1", "16", "all", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRun:
    """One way, to its end.

    ``seconds`` are those of the whole run; ``parts`` divide them: the edits, what lies between
    them (``other``: checks at intervals, choosing), and the last verification with its repairs.
    ``first`` and ``last`` are seconds a fact over the first and the last ``window`` facts (whole
    groups), None where no group ends there.  ``trail`` are the facts done and the seconds so far.
    ``retention`` and ``lost`` are what the last verification found, after its repairs.
    """

    strategy: str
    facts: int
    outcomes: dict[str, int]
    seconds: float
    setup_seconds: float
    parts: dict[str, float]
    window: int
    first: float | None
    last: float | None
    trail: tuple[tuple[int, float], ...]
    retention: Score
    lost: tuple[str, ...]
    repaired: int
    stopped: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategiesResult:
    """All that was measured so far; ``points`` run ahead of ``runs`` until a way has ended."""

    model: str
    facts: int
    base: tuple[BaseScore, ...] = ()
    protected: int = 0
    points: tuple[Point, ...] = ()
    runs: tuple[StrategyRun, ...] = ()
    plain: tuple[Edit, ...] = ()


Tell = Callable[[StrategiesResult, Point], None]


def group_marks(count: int) -> list[int]:
    """After how many facts to measure: 16, 32, ... 512, every thousand, and the last."""
    steps = {*EARLY_MARKS, *range(1000, count, 1000)}
    return sorted({mark for mark in steps if mark < count} | {count})


def name_of(group: str) -> str:
    """A way of teaching in words."""
    return _NAMES.get(group, f"groups of {group}")


def strategies(
    options: StrategyOptions, emit: Emit, tell: Tell = lambda result, point: None
) -> StrategiesResult:
    """Teach the same facts in each way; ``tell`` gets all results so far after each measurement.

    Raises Interrupted when a run was stopped by the user.
    """
    source = models.locate(options.model)
    data = questions.load(options.data, source)
    facts = questions.new_facts(data, options.facts, options.facts_file)
    whole = _Whole(options, data, facts, emit, tell)
    for group in options.groups:
        whole.teach(group)
    some = facts[: options.plain_facts]
    if some:
        whole.plain(source, some)
    return whole.result


class _Whole:
    """All ways, one after the other, and what they have come to so far."""

    def __init__(
        self,
        options: StrategyOptions,
        data: questions.BenchData,
        facts: Sequence[Fact],
        emit: Emit,
        tell: Tell,
    ) -> None:
        self._options, self._data, self._facts = options, data, facts
        self._emit, self._tell = emit, tell
        self._asked_beside: tuple[str, ...] | None = None
        self._kept = Kept((), ())
        self.result = StrategiesResult(model="", facts=len(facts))

    def teach(self, group: str) -> None:
        """One way, in a store of its own."""
        options = _own_store(self._options, group)
        course = _Course(name_of(group), self._options.seed, self._emit, self._add)
        began = time.monotonic()
        with new_store(options, course) as knowledge:
            setup = time.monotonic() - began
            self._prepare(knowledge)
            run = course.run(knowledge, self._facts, _size(group, self._facts), self._kept)
        run = replace(run, setup_seconds=setup)
        self.result = replace(self.result, runs=(*self.result.runs, run))
        self._tell(self.result, self.result.points[-1])
        if run.stopped == "interrupted":
            raise Interrupted(f"interrupted in {name_of(group)}; what was measured was kept")

    def plain(self, source: str, facts: Sequence[Fact]) -> None:
        """The plain recipe on some of the facts."""
        edits, points = plain_all(source, facts, self._kept, self._emit)
        self.result = replace(self.result, plain=tuple(edits))
        for point in points:
            self._add(point)

    def _add(self, point: Point) -> None:
        self.result = replace(self.result, points=(*self.result.points, point))
        self._tell(self.result, point)

    def _prepare(self, knowledge: KnowledgeBase) -> None:
        """What the base model knows: asked once, as long as every store protects the same text."""
        rows = [row for role in ("control", "locality") for row in knowledge.store.protected(role)]
        beside = tuple(f"{row.prompt}\n{row.answer}" for row in rows)
        if beside == self._asked_beside:
            return
        engine = engine_of(knowledge)
        student = Student(engine.base.model, engine.renderer)
        seen, texts = seen_texts(knowledge, self._facts)
        base, self._kept = base_facts(student, self._data, seen, self._options, self._emit)
        self._asked_beside = beside
        self.result = replace(self.result, model=engine.base.name, base=base, protected=texts)


class _Course:
    """One way of teaching: takes its events, keeps its clock, measures in passing."""

    def __init__(self, name: str, seed: int, emit: Emit, add: Callable[[Point], None]) -> None:
        self._name, self._seed, self._emit, self._add = name, seed, emit, add
        self._clock = _Clock()
        self._parts: dict[str, float] = {}
        self._taught: dict[str, float] = {}
        self._trail: list[tuple[int, float]] = []
        self._progress = IngestProgress(done=0, total=0)
        self._measure: Callable[[int, bool], None] | None = None
        self._marks: list[int] = []

    def run(
        self, knowledge: KnowledgeBase, facts: Sequence[Fact], size: int | None, kept: Kept
    ) -> StrategyRun:
        """Ingest everything; measured at each mark, and once more after the last verification."""
        self._marks = group_marks(len(facts))
        self._measure = lambda done, last: self._ask(knowledge, facts, kept, done, last)
        self._clock.start()
        report = ingest(knowledge, facts, IngestOptions(group=size, skip_invalid=True), self)
        seconds = self._clock.seconds
        self._ask(knowledge, facts, kept, self._progress.done, last=True)
        return self._summary(report, seconds)

    def __call__(self, event: Event) -> None:
        """Take an event of the store or of the run."""
        if isinstance(event, EditReport):
            for name, spent in event.timings.items():
                self._parts[name] = self._parts.get(name, 0.0) + spent
        elif isinstance(event, Status):
            self._emit(replace(event, phase=self._place(), key=None, text=event.phase))
        elif isinstance(event, IngestProgress):
            self._advance(event)
        elif isinstance(event, Warning_) and event.code not in NOISE:
            self._emit(event)

    def _place(self) -> str:
        at = self._progress
        counts = f"{at.committed} committed, {at.rejected} rejected, {at.failed} failed"
        return f"{self._name}: {at.done} of {at.total}, {counts}" if at.total else self._name

    def _advance(self, event: IngestProgress) -> None:
        self._progress = event
        self._trail.append((event.done, self._clock.seconds))
        self._taught = dict(self._parts)  # the last verification's repairs come after the last
        pace = f"{self._clock.seconds / event.done:.2f} s a fact" if event.done else ""
        self._emit(Status(phase=self._place(), step=event.done, total=event.total, text=pace))
        passed = [mark for mark in self._marks if mark <= event.done]
        self._marks = self._marks[len(passed) :]
        if passed and self._marks and event.done < event.total and self._measure is not None:
            with self._clock.stopped():
                self._measure(event.done, False)

    def _ask(
        self, knowledge: KnowledgeBase, facts: Sequence[Fact], kept: Kept, done: int, last: bool
    ) -> None:
        self._emit(Status(phase=f"{self._name}: measuring after {done} facts"))
        seconds = self._clock.seconds
        engine = engine_of(knowledge)
        student = Student(engine.base.model, engine.renderer)
        draw = None if last else random.Random(f"{self._seed} {done}")
        point = measure(self._name, done, student, lessons_of(knowledge, facts), kept, draw)
        self._add(replace(point, seconds=seconds / done if done else None))

    def _summary(self, report: IngestReport, seconds: float) -> StrategyRun:
        facts = len(report.outcomes)
        window = max(1, min(WINDOW, facts // 2))
        first, last = paces(self._trail, window)
        taught = self._trail[-1][1] if self._trail else seconds
        parts = dict(self._taught)
        parts["other"] = max(0.0, taught - sum(parts.values()))
        parts["last verification"] = seconds - taught
        return StrategyRun(
            strategy=self._name,
            facts=facts,
            outcomes=dict(Counter(one.outcome for one in report.outcomes)),
            seconds=seconds,
            setup_seconds=0.0,
            parts=parts,
            window=window,
            first=first,
            last=last,
            trail=tuple((done, round(at, 3)) for done, at in self._trail),
            retention=report.retention,
            lost=report.lost,
            repaired=len(report.repaired),
            stopped=report.stopped,
        )


@dataclass(slots=True)
class _Clock:
    """Seconds since ``start``, without those in which it was stopped."""

    _began: float = field(default_factory=time.monotonic)
    _stopped: float = 0.0

    def start(self) -> None:
        self._began, self._stopped = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began - self._stopped

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stopped += time.monotonic() - began


def lessons_of(knowledge: KnowledgeBase, facts: Sequence[Fact]) -> list[Lesson]:
    """The facts that are decided, as the store has them: committed or rejected."""
    engine = engine_of(knowledge)
    wanted = {fact.key for fact in facts}
    rows = [row for row in knowledge.store.facts() if row.fact.key in wanted]
    return [
        Lesson(engine.examples(row.fact), engine.paraphrases(row.fact), row.state == "committed")
        for row in rows
        if row.state in ("committed", "rejected")
    ]


def paces(trail: Sequence[tuple[int, float]], window: int) -> tuple[float | None, float | None]:
    """Seconds a fact over the first and the last ``window`` facts, from whole groups."""
    if not trail:
        return None, None
    total, end = trail[-1]
    early = [(done, at) for done, at in trail if window <= done < total]
    late = [(done, at) for done, at in trail if 0 < done <= total - window]
    first = early[0][1] / early[0][0] if early else None
    last = (end - late[-1][1]) / (total - late[-1][0]) if late else None
    return first, last


def _size(group: str, facts: Sequence[Fact]) -> int | None:
    if group == "auto":
        return None
    return max(1, len(facts)) if group == "all" else int(group)


def _own_store(options: StrategyOptions, group: str) -> StrategyOptions:
    """A folder of its own below ``store_dir``, with the settings that lie there."""
    if options.store_dir is None:
        return options
    folder = options.store_dir / f"group-{group}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = options.store_dir / "kvedit.toml"
    if settings.is_file():
        shutil.copy(settings, folder)
    return replace(options, store_dir=folder)
