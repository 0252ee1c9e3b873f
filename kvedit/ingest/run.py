"""Thousands of facts: a run that can be stopped at any moment and goes on where it stopped.

Invariants:
- Nothing is edited before every fact was found to fit the store and the model.
- How a fact ended is read from the store, never guessed from what was attempted; so a fact is
  taught once, however often the run is stopped and started.
- What goes wrong with one fact is that fact's outcome; what would go wrong with every further one
  (a full disk, a damaged store) ends the run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    Interrupted,
    InvalidFactError,
    KveditError,
    LockedError,
    OutOfTimeError,
    ProcessesDifferError,
    ProcessLostError,
    TextTooLongError,
)
from kvedit.events import EditReport, Event, IngestProgress, Score, Status
from kvedit.facts.fact import Fact
from kvedit.facts.formats import Located
from kvedit.facts.keys import normalise
from kvedit.ingest.preflight import inspect_facts
from kvedit.ingest.scheduler import Scheduler

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.training.engine import Engine

Emit = Callable[[Event], None]

ENDS_THE_RUN = (
    LockedError,
    DiskFullError,
    CorruptStoreError,
    Interrupted,
    ProcessLostError,
    ProcessesDifferError,
)
ERRORS_IN_A_ROW = 10
"""So many facts that fail one after the other mean that the trouble is not with the facts."""

STATUS_EVERY = 200
NAMED = 20
LONGEST_PAUSE = 256
"""At most so many commits between two verifications."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """How to go about it: ``group`` facts at a time (None: found by success), when to stop, whether
    to try again what was ``rejected`` before, and how many earlier facts a verification samples.
    ``places`` tells messages where the fact of a key came from.
    """

    group: int | None = None
    limit: int | None = None
    max_failures: int | None = None
    max_seconds: float | None = None
    retry_rejected: bool = False
    skip_invalid: bool = False
    first_check: int = 16
    sample: int = 64
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FactOutcome:
    """How one fact ended: ``committed``, ``rejected``, ``failed``, or ``invalid`` (not tried)."""

    fact: Fact
    outcome: str
    reasons: tuple[str, ...] = ()
    revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """A run: the outcomes of what was tried, then what was not.

    ``rejected_before`` were rejected in earlier runs and not tried again, ``remaining`` counts the
    facts that were not reached;
    ``stopped`` tells why: ``limit``, ``failures``, ``errors``, ``time``, ``interrupted`` or
    nothing. ``retention`` and ``lost`` (keys) come from the last verification.
    """

    outcomes: tuple[FactOutcome, ...]
    unchanged: int = 0
    rejected_before: tuple[FactOutcome, ...] = ()
    remaining: int = 0
    stopped: str = ""
    retention: Score = field(default_factory=Score)
    lost: tuple[str, ...] = ()
    repaired: tuple[EditReport, ...] = ()
    revision: int = 0
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        """How many facts of this run ended so."""
        return sum(one.outcome == outcome for one in self.outcomes)


def ingest(
    knowledge: KnowledgeBase,
    facts: Sequence[Fact],
    options: IngestOptions | None = None,
    emit: Emit = lambda event: None,
) -> IngestReport:
    """Teach the facts that the store does not hold yet; running it again goes on.

    Raises InvalidFactError, and changes nothing, if facts contradict each other or the store, or,
    without ``skip_invalid``, do not fit the model; LockedError, DiskFullError or CorruptStoreError
    if the run cannot go on.  Ctrl-C ends it with a report.
    """
    with knowledge.store.lock():
        return _Run(knowledge, options or IngestOptions(), emit).run(facts)


def unfit(engine: Engine, facts: Sequence[Fact], emit: Emit) -> dict[str, str]:
    """Why facts, by key, are not for this model: too long for its context, or with its end mark."""
    found = {}
    for number, fact in enumerate(facts):
        if number % STATUS_EVERY == 0:
            phase = "checking that every text fits the model"
            emit(Status(phase=phase, step=number, total=len(facts)))
        try:
            engine.examples(fact)
            engine.paraphrases(fact)
            pairs = [(probe.prompt, probe.answer or "") for probe in fact.locality]
            engine.renderer.examples(pairs)
        except (TextTooLongError, InvalidFactError) as error:
            found[fact.key] = f"{error.message}. {error.hint}".rstrip(". ")
    return found


class _Run:
    """One run; what it has come to so far."""

    def __init__(self, knowledge: KnowledgeBase, options: IngestOptions, emit: Emit) -> None:
        self._knowledge, self._options, self._emit = knowledge, options, emit
        self._outcomes: dict[str, FactOutcome] = {}
        self._repaired: list[EditReport] = []
        self._retention = Score()
        self._lost: tuple[str, ...] = ()
        self._errors = 0
        self._next_check = options.first_check
        self._began = self._started = time.monotonic()
        self._deadline: float | None = None
        if options.max_seconds is not None:
            self._deadline = self._began + options.max_seconds

    def run(self, facts: Sequence[Fact]) -> IngestReport:
        """Look at everything, teach, verify, report."""
        preflight = inspect_facts(
            [Located(fact.key, fact) for fact in facts], self._knowledge.store
        )
        if preflight.problems:
            raise self._invalid({p.key or p.where: p.reason for p in preflight.problems})
        again = [one.entry.fact for one in preflight.rejected_before] if self._options.retry_rejected else []
        wanted = self._fitting([*(entry.fact for entry in preflight.new), *again])
        chosen = wanted[: self._options.limit]
        self._unchanged, self._total = len(preflight.unchanged), len(chosen)
        self._mark(chosen)
        store = self._knowledge.store
        largest = store.config.group.max_size
        stopped = self._work(Scheduler(chosen, self._options.group, largest=largest))
        tried = len(self._tried())
        refused = () if again else preflight.rejected_before
        return IngestReport(
            outcomes=tuple(self._outcomes.values()),
            unchanged=self._unchanged,
            rejected_before=tuple(
                FactOutcome(r.entry.fact, "rejected", r.reasons) for r in refused
            ),
            remaining=len(wanted) - tried,
            stopped=stopped or ("limit" if len(wanted) > len(chosen) else ""),
            retention=self._retention,
            lost=self._lost,
            repaired=tuple(self._repaired),
            revision=self._knowledge.store.head(),
            seconds=time.monotonic() - self._began,
        )

    def _fitting(self, facts: Sequence[Fact]) -> list[Fact]:
        """The facts that the model can take; the others end here."""
        problems = unfit(self._knowledge.engine, facts, self._emit)
        if problems and not self._options.skip_invalid:
            raise self._invalid(problems)
        for fact in facts:
            if fact.key in problems:
                self._outcomes[fact.key] = FactOutcome(fact, "invalid", (problems[fact.key],))
        return [fact for fact in facts if fact.key not in problems]

    def _invalid(self, problems: Mapping[str, str]) -> InvalidFactError:
        """One error for all facts that cannot go in; the first few are named."""
        places = self._options.places
        lines = [f"{places.get(key, key)}: {reason}" for key, reason in problems.items()]
        more = [f"... and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        count = "1 fact" if len(lines) == 1 else f"{len(lines)} facts"
        return InvalidFactError(
            f"{count} cannot go in; nothing was changed", hint="\n".join([*lines[:NAMED], *more])
        )

    def _mark(self, facts: Sequence[Fact]) -> None:
        """Let the store know what is to come; those it knows first, for they give names free."""
        known = {normalise(row.fact.key) for row in self._knowledge.store.facts()}
        ordered = sorted(facts, key=lambda fact: normalise(fact.key) not in known)
        self._knowledge.store.put_pending_many(ordered)

    def _work(self, groups: Scheduler) -> str:
        """Teach group by group; returns why it stopped, or nothing."""
        self._started = time.monotonic()
        group: tuple[Fact, ...] = ()
        self._tell()
        try:
            if self._options.group != 1 and self._total > 1:
                self._knowledge.protect_for(self._total)
            while not (stopped := self._must_stop()) and (group := groups.take()):
                left, refused = self._teach(group)
                groups.put_back(left)
                groups.learn(refused=refused)
                groups.limit(self._knowledge.largest_group)
                self._verify_if_due()
                self._tell()
            self._verify_at_end(stopped)
        except OutOfTimeError:
            self._settle(group)
            stopped = "time"
            self._verify_at_end(stopped)
        except (KeyboardInterrupt, Interrupted):
            self._settle(group)
            return "interrupted"
        return stopped if self._total > len(self._tried()) else ""

    def _verify_at_end(self, stopped: str) -> None:
        """Everything, but where there is no time."""
        if self._count("committed"):
            self._verify(self._options.sample if stopped == "time" else None)

    def _must_stop(self) -> str:
        options, deadline = self._options, self._deadline
        failures = self._count("rejected") + self._count("failed")
        if options.max_failures is not None and failures >= options.max_failures:
            return "failures"
        if self._errors >= ERRORS_IN_A_ROW:
            return "errors"
        return "time" if deadline is not None and time.monotonic() >= deadline else ""

    def _teach(self, group: Sequence[Fact]) -> tuple[list[Fact], bool]:
        """Teach a group; one that breaks as a whole is halved.

        Returns the facts that are to be tried in a later group, and whether an edit was refused.
        """
        try:
            reports = self._knowledge.add_group(group, carry=True, deadline=self._deadline)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # the border of a fact: the others go on without it
            if len(group) > 1:
                return self._teach_halves(group), True
            self._errors += 1
            self._record(group[0], (), _said(error))
            return [], True
        without_room = all(report.outcome == "failed" for report in reports)
        self._errors = self._errors + len(reports) if without_room else 0
        carried = {key for report in reports for key in report.not_learned}
        left = [fact for fact in group if fact.key in carried and not self._committed(fact)]
        for fact in group:
            if fact not in left:
                self._record(fact, reports, "no edit was made for it")
        return left, any(report.outcome == "rejected" for report in reports)

    def _teach_halves(self, group: Sequence[Fact]) -> list[Fact]:
        """Returns the facts that are to be tried in a later group."""
        left: list[Fact] = []
        half = (len(group) + 1) // 2
        for part in (group[:half], group[half:]):
            hopeless = self._errors >= ERRORS_IN_A_ROW
            left += part if hopeless else self._teach(part)[0]
        return left

    def _committed(self, fact: Fact) -> bool:
        row = self._knowledge.store.find(fact.key)
        return row is not None and row.state == "committed"

    def _record(self, fact: Fact, reports: Sequence[EditReport], error: str) -> None:
        """Note how a fact ended, as the store has it."""
        row = self._knowledge.store.find(fact.key)
        own = [report for report in reports if fact.key in report.keys]
        if row is not None and row.state == "committed":
            found = FactOutcome(fact, "committed", revision=row.revision)
            # What a refused edit would have lost was put back: it says nothing about the model.
            self._retention = _retention(own) or self._retention
        elif own and own[-1].outcome != "committed":
            found = FactOutcome(fact, own[-1].outcome, own[-1].reasons)
        else:
            found = FactOutcome(fact, "failed", (error,))
        self._outcomes[fact.key] = found

    def _settle(self, group: Sequence[Fact]) -> None:
        """After an interruption: of the group at hand, keep what was committed."""
        for fact in group:
            row = self._knowledge.store.find(fact.key)
            if row is not None and row.state == "committed":
                self._record(fact, (), "")

    def _verify_if_due(self) -> None:
        """Verify at growing intervals, so that its cost stays a small share of the whole."""
        committed = self._count("committed")
        if committed < self._next_check or committed == self._total:  # the end has its own
            return
        self._next_check = committed + min(committed, LONGEST_PAUSE)
        self._verify(self._options.sample)

    def _verify(self, sample: int | None) -> None:
        report = self._knowledge.verify(sample=sample, repair=True)
        self._repaired += report.repaired
        self._retention = report.generated if report.generated.n else report.score
        self._lost = tuple(check.key for check in report.checks if not check.passed)

    def _tried(self) -> list[FactOutcome]:
        return [one for one in self._outcomes.values() if one.outcome != "invalid"]

    def _count(self, outcome: str) -> int:
        return sum(one.outcome == outcome for one in self._outcomes.values())

    def _tell(self) -> None:
        counts = Counter(one.outcome for one in self._tried())
        done = counts.total()
        pace = (time.monotonic() - self._started) / done if done else None
        self._emit(
            IngestProgress(
                done=done,
                total=self._total,
                committed=counts["committed"],
                rejected=counts["rejected"],
                failed=counts["failed"],
                unchanged=self._unchanged,
                retention=self._retention,
                seconds_per_fact=pace,
                seconds_left=None if pace is None else pace * (self._total - done),
            )
        )


def _retention(reports: Sequence[EditReport]) -> Score | None:
    """What the last committed edit found of earlier facts."""
    found = [one.retention for one in reports if one.outcome == "committed" and one.retention.n]
    return found[-1] if found else None


def _said(error: Exception) -> str:
    if isinstance(error, KveditError):
        return f"{error.message}. {error.hint}".rstrip(". ")
    return f"{type(error).__name__}: {error}"
