"""Thousands of facts: a run that can be stopped at any moment and resumed.

Invariants:
- Nothing is edited before every fact was checked against the store and the model.
- How a fact ended is read from the store, never guessed from what was attempted; so a fact is
  trained once, however often the run is stopped and started.
- An error with one fact is that fact's outcome; an error that every further fact would meet (a full
  disk, a damaged store) ends the run.
- However a run ends, its report says what was committed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from kvedit.facts.keys import facts_text
from kvedit.ingest.preflight import inspect_facts
from kvedit.ingest.report import FactOutcome, IngestOptions, IngestReport
from kvedit.ingest.scheduler import Scheduler

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.training.engine import Engine

Emit = Callable[[Event], None]

ENDS_THE_RUN = (
    LockedError, DiskFullError, CorruptStoreError, Interrupted, ProcessLostError,
    ProcessesDifferError,
)  # fmt: skip
ERRORS_IN_A_ROW = 10  # failed facts; after so many the cause is not the facts
STATUS_EVERY = 200  # facts checked against the model, between two status events
MAX_NAMED = 20  # facts, in an error
VERIFY_WITHIN = 256  # commits between two verifications, at most


def ingest(
    knowledge: KnowledgeBase,
    facts: Sequence[Fact],
    options: IngestOptions | None = None,
    emit: Emit = lambda event: None,
) -> IngestReport:
    """Add the facts that are not committed yet; running it again resumes.

    Raises InvalidFactError, and changes nothing, if facts contradict each other or the store, or,
    without ``skip_invalid``, do not fit the model.  Once there is something to report, an error
    that ends the run (LockedError, DiskFullError, CorruptStoreError, ...) is in the report, as
    ``error``, with ``stopped`` ``"error"``; Ctrl-C ends it with a report, too.
    """
    with knowledge.store.lock():
        return _Run(knowledge, options or IngestOptions(), emit).run(facts)


def unfit(engine: Engine, facts: Sequence[Fact], emit: Emit) -> dict[str, str]:
    """Facts, by key, that this model cannot take, and why: too long for its context, or with an end
    token in them.
    """
    problems = {}
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
            problems[fact.key] = _message(error)
    return problems


class _Run:
    """One run, and its outcomes so far."""

    def __init__(self, knowledge: KnowledgeBase, options: IngestOptions, emit: Emit) -> None:
        self._knowledge, self._options, self._emit = knowledge, options, emit
        self._outcomes: dict[str, FactOutcome] = {}
        self._repaired: list[EditReport] = []
        self._retention = Score()
        self._lost: tuple[str, ...] = ()
        self._errors = 0
        self._error: Exception | None = None
        self._next_check = options.first_check
        self._began = self._started = time.monotonic()
        self._deadline: float | None = None
        if options.max_seconds is not None:
            self._deadline = self._began + options.max_seconds

    def run(self, facts: Sequence[Fact]) -> IngestReport:
        """Check everything, train, verify, report."""
        located = [Located(fact.key, fact) for fact in facts]
        preflight = inspect_facts(located, self._knowledge.store)
        if preflight.problems:
            raise self._invalid({p.key or p.where: p.reason for p in preflight.problems})
        before = preflight.rejected_before
        rejected = [FactOutcome(one.entry.fact, "rejected", one.reasons) for one in before]
        again = [one.fact for one in rejected] if self._options.retry_rejected else []
        to_add = self._fitting([*(entry.fact for entry in preflight.new), *again])
        chosen = to_add[: self._options.limit]
        self._unchanged, self._total = len(preflight.unchanged), len(chosen)
        self._mark_pending(chosen)
        largest = self._knowledge.store.config.group.max_size
        stopped = self._add_all(Scheduler(chosen, self._options.group, largest=largest))
        tried = len(self._tried())
        return IngestReport(
            outcomes=tuple(self._outcomes.values()), unchanged=self._unchanged,
            rejected_before=() if again else tuple(rejected), remaining=len(to_add) - tried,
            stopped=stopped or ("limit" if len(to_add) > len(chosen) else ""),
            retention=self._retention, lost=self._lost, repaired=tuple(self._repaired),
            error=self._error, revision=self._revision(), seconds=time.monotonic() - self._began,
        )  # fmt: skip

    def _fitting(self, facts: Sequence[Fact]) -> list[Fact]:
        """The facts that the model can take; the others are ``invalid``."""
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
        more = [f"... and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
        hint = "\n".join([*lines[:MAX_NAMED], *more])
        return InvalidFactError(
            f"{facts_text(len(lines))} cannot go in; nothing was changed", hint=hint
        )

    def _mark_pending(self, facts: Sequence[Fact]) -> None:
        """Write the facts to the store as pending; known keys first, for they may free an alias."""
        store = self._knowledge.store
        form = store.key_form
        known = {form(row.fact.key) for row in store.facts()}
        ordered = sorted(facts, key=lambda fact: form(fact.key) not in known)
        store.put_pending_many(ordered)

    def _add_all(self, scheduler: Scheduler) -> str:
        """Add group by group; returns why it stopped, or nothing."""
        self._started = time.monotonic()
        group: tuple[Fact, ...] = ()
        self._emit_progress()
        try:
            if self._options.group != 1 and self._total > 1:
                self._knowledge.protect_for(self._total)
            while not (stopped := self._why_stop()) and (group := scheduler.next_group()):
                carried, rejected = self._add(group)
                scheduler.put_back(carried)
                scheduler.adapt(rejected=rejected)
                scheduler.limit(self._knowledge.largest_group)
                self._verify_if_due()
                self._emit_progress()
            self._verify_at_end(stopped)
        except OutOfTimeError:
            self._record_committed(group)
            stopped = "time"
            self._verify_at_end(stopped)
        except (KeyboardInterrupt, Interrupted):
            self._record_committed(group)
            return "interrupted"
        except Exception as error:  # the border of a run: what was committed is said all the same
            self._error = error
            self._record_committed(group)
            return "error"
        return stopped if self._total > len(self._tried()) else ""

    def _verify_at_end(self, stopped: str) -> None:
        """All facts, or a sample when time is up."""
        if self._count("committed"):
            self._verify(self._options.sample if stopped == "time" else None)

    def _why_stop(self) -> str:
        options, deadline = self._options, self._deadline
        failures = self._count("rejected") + self._count("failed")
        if options.max_failures is not None and failures >= options.max_failures:
            return "failures"
        if self._errors >= ERRORS_IN_A_ROW:
            return "errors"
        if deadline is None:
            return ""
        on_main = self._knowledge.engine.worker.on_main  # all processes must stop at one point
        return "time" if on_main(lambda: time.monotonic() >= deadline) else ""

    def _add(self, group: Sequence[Fact]) -> tuple[list[Fact], bool]:
        """Add a group; one that fails as a whole is halved.

        Returns the facts to try in a later group, and whether an edit was rejected.
        """
        try:
            reports = self._knowledge.add_group(group, carry=True, deadline=self._deadline)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # the border of a fact: the others go on without it
            if len(group) > 1:
                return self._add_halves(group), True
            self._errors += 1
            self._record(group[0], (), _message(error))
            return [], True
        all_failed = all(report.outcome == "failed" for report in reports)
        self._errors = self._errors + len(reports) if all_failed else 0
        not_learned = {key for report in reports for key in report.not_learned}
        carried = [f for f in group if f.key in not_learned and not self._is_committed(f)]
        for fact in group:
            if fact not in carried:
                self._record(fact, reports, "no edit was made for it")
        return carried, any(report.outcome == "rejected" for report in reports)

    def _add_halves(self, group: Sequence[Fact]) -> list[Fact]:
        """Returns the facts to try in a later group."""
        carried: list[Fact] = []
        half = (len(group) + 1) // 2
        for part in (group[:half], group[half:]):
            hopeless = self._errors >= ERRORS_IN_A_ROW
            carried += part if hopeless else self._add(part)[0]
        return carried

    def _is_committed(self, fact: Fact) -> bool:
        row = self._knowledge.store.find(fact.key)
        return row is not None and row.state == "committed"

    def _record(self, fact: Fact, reports: Sequence[EditReport], error: str) -> None:
        """Note how a fact ended, as the store has it."""
        row = self._knowledge.store.find(fact.key)
        edits = [report for report in reports if fact.key in report.keys]
        if row is not None and row.state == "committed":
            outcome = FactOutcome(fact, "committed", revision=row.revision)
            # A rejected edit was undone: its retention says nothing about the model.
            scores = [one.retention for one in edits if one.outcome == "committed"]
            self._retention = [self._retention, *(score for score in scores if score.n)][-1]
        elif edits and edits[-1].outcome != "committed":
            outcome = FactOutcome(fact, edits[-1].outcome, edits[-1].reasons)
        else:
            outcome = FactOutcome(fact, "failed", (error,))
        self._outcomes[fact.key] = outcome

    def _record_committed(self, group: Sequence[Fact]) -> None:
        """After an interruption: note which facts of the group were committed, as far as the store
        can be read; the others are among those that remain.
        """
        with suppress(KveditError, OSError):
            for fact in group:
                if self._is_committed(fact):
                    self._record(fact, (), "")

    def _revision(self) -> int:
        """The head; where it cannot be read, the latest revision that was committed here."""
        try:
            return self._knowledge.store.head()
        except (KveditError, OSError):
            return max((one.revision or 0 for one in self._outcomes.values()), default=0)

    def _verify_if_due(self) -> None:
        """Verify at growing intervals, so that its cost stays a small share of the whole."""
        committed = self._count("committed")
        if committed < self._next_check or committed == self._total:  # verified at the end
            return
        self._next_check = committed + min(committed, VERIFY_WITHIN)
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

    def _emit_progress(self) -> None:
        counts = Counter(one.outcome for one in self._tried())
        done = counts.total()
        pace = (time.monotonic() - self._started) / done if done else None
        self._emit(IngestProgress(
            done=done, total=self._total, committed=counts["committed"],
            rejected=counts["rejected"], failed=counts["failed"], unchanged=self._unchanged,
            retention=self._retention, seconds_per_fact=pace,
            seconds_left=None if pace is None else pace * (self._total - done),
        ))  # fmt: skip


def _message(error: Exception) -> str:
    if isinstance(error, KveditError):
        return f"{error.message}. {error.hint}".rstrip(". ")
    return f"{type(error).__name__}: {error}"
