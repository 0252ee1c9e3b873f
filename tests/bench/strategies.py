"""The same facts trained in different ways: one by one, in groups, all at once, by the baseline.

Each way gets a new store and one uninterrupted run of ``ingest``; what is held is measured in
passing, at certain numbers of facts.

Invariants:
- Every measurement reports all results so far, so a run that ends early has left them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kvedit.bench.speed import EditTime
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import Interrupted, UsageError
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.replay.protected_texts import EXTRACTED
from tests.bench import questions
from tests.bench.asking import AskedModel, Kept, Point
from tests.bench.course import Course, Observer, StrategyRun
from tests.bench.retain import (
    Asked,
    BaseScore,
    BenchOptions,
    Emit,
    base_facts,
    engine_of,
    new_store,
    protected_rows,
    run_baseline,
    seen_texts,
    store_folder,
)

_Options = TypeVar("_Options", bound=BenchOptions)
_NAMES = {"1": "one by one", "all": "one group", "auto": "automatic groups"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions(BenchOptions):
    """``groups`` are sizes: a number, ``all`` or ``auto``; ``resume`` goes on with runs that were
    stopped, where ``store_dir`` has their stores.
    """

    groups: tuple[str, ...] = ("1", "16", "all", "auto")
    resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategiesResult:
    """All that was measured so far; ``points`` run ahead of ``runs`` until a way has ended."""

    model: str
    facts: int
    base: tuple[BaseScore, ...] = ()
    protected: int = 0
    points: tuple[Point, ...] = ()
    runs: tuple[StrategyRun, ...] = ()
    baseline: tuple[EditTime, ...] = ()


Tell = Callable[[StrategiesResult, Point | None], None]
"""Gets all results so far, and the measurement that is new; None when only a way has ended."""


def name_of(group: str) -> str:
    """A way of training in words."""
    return _NAMES.get(group, f"groups of {group}")


def strategies(
    options: StrategyOptions, emit: Emit, tell: Tell = lambda result, point: None
) -> StrategiesResult:
    """Train the same facts in each way; ``tell`` gets all results so far after each measurement.

    Raises Interrupted when a run was stopped by the user.
    """
    data = questions.load(options.data, loading.locate(options.model))
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    ways = Ways(options, data, facts, emit, tell)
    for group in options.groups:
        ways.train(group)
    ways.baseline()
    return ways.result


class Ways:
    """Several ways, one after the other, and what they have come to so far."""

    def __init__(
        self,
        options: StrategyOptions,
        data: questions.BenchData,
        facts: Sequence[Fact],
        emit: Emit,
        tell: Tell,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._options, self._data, self._facts = options, data, facts
        self._emit, self._tell = emit, tell
        self._asked_beside: tuple[str, ...] | None = None
        self._asked = Asked((), Kept((), ()), frozenset())
        self.result = StrategiesResult(model="", facts=len(facts))

    def make(self, name: str) -> None:
        """A store below ``store_dir`` that is ready to be trained in groups."""
        with new_store(own_store(self._options, name), self._emit) as knowledge:
            self._make_ready(knowledge, search=True)

    def train(self, group: str, folder: Path | None = None) -> None:
        """One way, in a store of its own; ``folder`` is one that is ready, and names the way."""
        if folder is None:
            options, name = own_store(self._options, f"group-{group}"), name_of(group)
        else:
            options, name = replace(self._options, store_dir=folder), folder.name
        course = Course(name, self._options.seed, self._emit, self._add, self._observer)
        began = time.monotonic()
        with new_store(options, course, go_on=self._options.resume) as knowledge:
            course.keep_in(knowledge.store.path)
            made = time.monotonic() - began
            setup = made + self._make_ready(knowledge, search=group != "1")
            if self._observer is not None:
                self._observer.begin(knowledge)
            run = course.run(knowledge, self._facts, _size(group, self._facts), self._asked.kept)
        run = replace(run, setup_seconds=setup)
        self.result = replace(self.result, runs=(*self.result.runs, run))
        self._tell(self.result, None)
        if run.stopped == "interrupted":
            raise Interrupted(f"interrupted in {name}; what was measured was kept")

    def baseline(self) -> None:
        """The baseline on as many of the facts as the options say, which may be none."""
        some = self._facts[: self._options.baseline_facts]
        if not some:
            return
        source = loading.locate(self._options.model)
        edits, points = run_baseline(source, some, self._asked.kept, self._emit)
        self.result = replace(self.result, baseline=tuple(edits))
        for point in points:
            self._add(point)

    def _add(self, point: Point) -> None:
        self.result = replace(self.result, points=(*self.result.points, point))
        self._tell(self.result, point)

    def _make_ready(self, knowledge: KnowledgeBase, *, search: bool) -> float:
        """Choose what is asked, then search for more to protect; the seconds of the search."""
        asked = self._choose(knowledge)
        began = time.monotonic()
        held = len(knowledge.store.keys("committed"))  # by a run that is gone on with
        if search and held < len(self._facts):
            knowledge.protect_for(len(self._facts) - held, leave_out=asked)
        spent = time.monotonic() - began
        self._check(knowledge)
        return spent

    def _choose(self, knowledge: KnowledgeBase) -> frozenset[str]:
        """What the base model knows, and the names in it that training must never see.

        Asked once, as long as every store begins with the same protected text.
        """
        rows = [row for row in protected_rows(knowledge) if row.source != EXTRACTED]
        beside = tuple(f"{row.prompt}\n{row.answer}" for row in rows)
        if beside != self._asked_beside:
            engine = engine_of(knowledge)
            base = loading.load(
                loading.locate(self._options.model)
            )  # the engine's may know facts already
            asked_model = AskedModel(base.model, engine.renderer)
            seen = seen_texts(rows, self._facts)
            self._asked = base_facts(
                asked_model, self._data, seen, self._options, self._emit, any_poets=True
            )
            self._asked_beside = beside
            self.result = replace(self.result, model=base.name, base=self._asked.scores)
        return self._asked.names

    def _check(self, knowledge: KnowledgeBase) -> None:
        """Nothing that is asked may be in a protected text; a store from before may have some."""
        rows = protected_rows(knowledge)
        seen = seen_texts(rows, ())
        named = [name for name in self._asked.names if name in seen]
        if named:
            raise UsageError(
                f"{knowledge.store.path} protects text that names {named[0]}, which is to be asked",
                hint="Give a new --store-dir.",
            )
        self.result = replace(self.result, protected=len(rows))


def _size(group: str, facts: Sequence[Fact]) -> int | None:
    if group == "auto":
        return None
    return max(1, len(facts)) if group == "all" else int(group)


def own_store(options: _Options, name: str) -> _Options:
    """A folder of its own below ``store_dir``, with the settings that lie there."""
    if options.store_dir is None:
        return options
    folder = store_folder(options.store_dir / name, options.store_dir)
    return replace(options, store_dir=folder)
