"""One run of ``ingest`` that is measured in passing.

Invariants:
- The clock stands still while something is measured: seconds are those of training alone.
- The last measurement comes after the run's own last verification and its repairs.
- A run that goes on in a store where another was stopped counts the seconds of both; of the group
  that was broken off, those up to where its task goes on.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import EditReport, Event, IngestProgress, Score, Status, Warning_
from kvedit.facts.fact import Fact
from kvedit.files import write_atomic
from kvedit.ingest.report import IngestOptions, IngestReport
from kvedit.ingest.run import ingest
from tests.bench.asking import AskedEngine, Kept, Point, Recalled, Task, measure, recalled
from tests.bench.retain import Emit, engine_of

EARLY_MARKS = (16, 32, 64, 128, 256, 300, 512)
WINDOW = 500
LOG = "course.json"
NOISE = ("similar-key", "apart")
"""Warnings that a run over poets' names gives by the hundred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRun:
    """One way, to its end.

    ``seconds`` are those of the whole run; ``parts`` divide them: the edits, what lies between
    them (``other``: checks at intervals, choosing), and the last verification with its repairs.
    ``first`` and ``last`` are seconds a fact over the first and the last ``window`` facts (what a
    group took is shared evenly by its facts).  ``trail`` are the facts done and the seconds so far.
    ``retention`` and ``lost`` are what the last verification counted, after its repairs.
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


class Observer(Protocol):
    """Looks at single facts where the measurements only count them."""

    def begin(self, knowledge: KnowledgeBase) -> None:
        """Before the first edit."""

    def look(
        self, knowledge: KnowledgeBase, done: int, tasks: Sequence[Task], answers: Recalled
    ) -> None:
        """At each measurement, the clock stopped."""


def group_marks(count: int) -> list[int]:
    """After how many facts to measure: 16, 32, ... 512, every thousand, and the last."""
    steps = {*EARLY_MARKS, *range(1000, count, 1000)}
    return sorted({mark for mark in steps if mark < count} | {count})


class Course:
    """One way of training: takes its events, keeps its clock, measures in passing."""

    def __init__(
        self,
        name: str,
        seed: int,
        emit: Emit,
        add: Callable[[Point], None],
        observer: Observer | None,
    ) -> None:
        self._observer = observer
        self._name, self._seed, self._emit, self._add = name, seed, emit, add
        self._clock = _Clock()
        self._parts: dict[str, float] = {}
        self._after_training: dict[str, float] = {}
        self._trail: list[tuple[int, float]] = []
        self._progress = IngestProgress(done=0, total=0)
        self._before = self._held = 0  # decided, and committed, by a run that was stopped
        self._measure: Callable[[int, bool], None] | None = None
        self._marks: list[int] = []
        self._log: Path | None = None

    def keep_in(self, folder: Path) -> None:
        """Keep the clock in the store's folder, and go on from what another run left there."""
        self._log = folder / LOG
        if self._log.is_file():
            left = json.loads(self._log.read_text(encoding="utf-8"))
            self._trail = [(done, at) for done, at in left["trail"]]
            self._parts = dict(left["parts"])

    def run(
        self, knowledge: KnowledgeBase, facts: Sequence[Fact], size: int | None, kept: Kept
    ) -> StrategyRun:
        """Ingest everything; measured at each mark, and once more after the last verification."""
        before = tasks_of(knowledge, facts)
        self._before, self._held = len(before), sum(task.kept for task in before)
        self._marks = [mark for mark in group_marks(len(facts)) if mark > self._before]
        self._measure = lambda done, last: self._ask(knowledge, facts, kept, done, last)
        self._clock.start(self._trail[-1][1] if self._trail else 0.0)
        report = ingest(
            knowledge, facts, IngestOptions(group=size, skip_invalid=True), self
        ).require_end()
        seconds = self._clock.seconds
        self._ask(knowledge, facts, kept, self._progress.done, last=True)
        return self._summary(report, seconds)

    def __call__(self, event: Event) -> None:
        """Take an event of the store or of the run."""
        if isinstance(event, EditReport):
            self._clock.add(event.resumed_seconds)
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
        """Take the run's word; what a stopped run did before counts as done."""
        event = replace(
            event,
            done=event.done + self._before,
            total=event.total + self._before,
            committed=event.committed + self._held,
            rejected=event.rejected + self._before - self._held,
        )
        self._progress = event
        self._trail.append((event.done, self._clock.seconds))
        self._after_training = dict(self._parts)  # the repairs of the last verification follow
        if self._log is not None:
            left = {"trail": self._trail, "parts": self._parts}
            write_atomic(self._log, json.dumps(left).encode())
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
        asked_model = AskedEngine.of(engine)
        draw = None if last else random.Random(f"{self._seed} {done}")
        tasks = tasks_of(knowledge, facts)
        answers = recalled(asked_model, tasks, draw)
        point = measure(self._name, done, asked_model, tasks, kept, draw, answers)
        if self._observer is not None:
            self._observer.look(knowledge, done, tasks, answers)
        self._add(replace(point, seconds=seconds / done if done else None))

    def _summary(self, report: IngestReport, seconds: float) -> StrategyRun:
        outcomes = Counter(one.outcome for one in (*report.outcomes, *report.rejected_before))
        outcomes.update(committed=report.unchanged)  # by a run that was stopped
        facts = outcomes.total()
        window = max(1, min(WINDOW, facts // 2))
        first, last = paces(self._trail, window)
        trained = self._trail[-1][1] if self._trail else seconds
        parts = dict(self._after_training)
        parts["other"] = max(0.0, trained - sum(parts.values()))
        parts["last verification"] = seconds - trained
        return StrategyRun(
            strategy=self._name,
            facts=facts,
            outcomes={outcome: count for outcome, count in outcomes.items() if count},
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
    """Seconds since ``start``, and those from before it, without those in which it was stopped."""

    _began: float = field(default_factory=time.monotonic)
    _stopped: float = 0.0

    def start(self, at: float) -> None:
        self._began, self._stopped = time.monotonic() - at, 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began - self._stopped

    def add(self, seconds: float) -> None:
        """Seconds of a process that ended."""
        self._stopped -= seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stopped += time.monotonic() - began


def tasks_of(knowledge: KnowledgeBase, facts: Sequence[Fact]) -> list[Task]:
    """The facts that are decided, as the store has them: committed or rejected."""
    engine = engine_of(knowledge)
    wanted = {fact.key for fact in facts}
    rows = [row for row in knowledge.store.facts() if row.fact.key in wanted]
    return [
        Task(
            engine.examples(row.fact),
            engine.paraphrases(row.fact),
            row.state == "committed",
            row.fact.key,
        )
        for row in rows
        if row.state in ("committed", "rejected")
    ]


def paces(trail: Sequence[tuple[int, float]], window: int) -> tuple[float | None, float | None]:
    """Seconds a fact over the first and the last ``window`` facts; None of no facts.

    What a group took is shared evenly by its facts; what is learned late is dear for the last ones.
    """
    total, end = trail[-1] if trail else (0, 0.0)
    if total < window:
        return None, None
    return _reached(trail, window) / window, (end - _reached(trail, total - window)) / window


def _reached(trail: Sequence[tuple[int, float]], facts: int) -> float:
    """After how many seconds this number of facts was first done."""
    before, since = 0, 0.0
    for done, at in trail:
        if done >= facts:
            return since + (at - since) * ((facts - before) / max(1, done - before))
        before, since = done, at
    raise ValueError(f"{facts} facts are not in the trail")
