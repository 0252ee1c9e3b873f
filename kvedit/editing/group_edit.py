"""Facts taught together: a group is one edit, and what it does not take is tried in smaller ones.

Invariants:
- No fact costs its neighbours: what a group has not learned is taught again by itself or in halves,
  and a group that is refused, or that memory does not suffice for, is split.
- A fact that does not fit even alone is reported as failed, and the others go on.
- Of two close keys one never goes in without the other unsaid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvedit.editing.compaction import should_compact
from kvedit.editing.group_size import Room
from kvedit.editing.plan import Plan, Planner
from kvedit.errors import OutOfMemoryError
from kvedit.events import EditReport, Warning_
from kvedit.facts.fact import Fact
from kvedit.facts.keys import similar_pairs
from kvedit.revisions.session import Session
from kvedit.store.store import FactRow

REPAIR_GROUP = 64


class Alone(Protocol):
    """Teaches one fact by itself."""

    def __call__(self, fact: Fact, *, force: bool = False) -> EditReport: ...


class Together:
    """Teaches groups, and repairs in groups; ``run`` carries out a plan, by force or not."""

    def __init__(
        self,
        work: Session,
        plans: Planner,
        run: Callable[[Plan, bool], EditReport],
        alone: Alone,
    ) -> None:
        self._session, self._store, self._engine = work, work.store, work.engine
        self._plans, self._run, self._alone = plans, run, alone
        self._room = Room(work.engine, work.config.group, self._warn_of_room)
        self._compaction_refused = False

    @property
    def largest(self) -> int | None:
        """How many facts are taught together at most since memory ran out; None if it never did."""
        return self._room.largest

    def add(self, facts: Sequence[Fact], *, force: bool, carry: bool) -> tuple[EditReport, ...]:
        """Teach some facts; see ``KnowledgeBase.add_group``."""
        if len(facts) == 1:
            return (self._alone(facts[0], force=force),)
        parts = self._room.parts(facts)
        if len(parts) > 1:
            return self._add_parts(parts, force, carry)
        report = self._room.attempt(facts, lambda: self._teach(facts, force))
        if report is None:
            return self._add_parts(self._room.parts(facts), force, carry)
        missing = [fact for fact in facts if not self._holds(fact)]
        if report.outcome == "committed" and carry:
            return (report,)
        half = (len(missing) + 1) // 2
        few = report.outcome == "committed" and len(missing) <= len(facts) // 4
        parts = [[f] for f in missing] if few else [missing[:half], missing[half:]]
        more = self._add_parts([part for part in parts if part], force, carry)
        self._warn_apart(facts)
        return (report, *more)

    def repair(self, rows: Sequence[FactRow]) -> list[EditReport]:
        """Teach facts once more that were lost, in groups as large as there is memory for."""
        parts = self._room.parts(rows, REPAIR_GROUP)
        if len(parts) > 1:
            return [report for part in parts for report in self.repair(part)]
        try:
            report = self._room.attempt([row.fact for row in rows], lambda: self._retrain(rows))
        except OutOfMemoryError as error:
            return [self._did_not_fit("repair", rows[0].fact.key, error)]
        return self.repair(rows) if report is None else [report]

    def should_compact(self, facts: Sequence[Fact]) -> bool:
        """Whether they are so many (see ``groups.should_compact``), and there is memory for all."""
        if self._compaction_refused:
            return False
        held = [row.fact for row in self._store.facts("committed")]
        on_top, share = (
            self._store.added_since_compaction(),
            self._session.config.group.compaction_ratio,
        )
        enough = should_compact(len(facts), len(held), on_top, share)
        return enough and self._room.fits([*held, *facts])

    def _add_parts(
        self, parts: Sequence[Sequence[Fact]], force: bool, carry: bool
    ) -> tuple[EditReport, ...]:
        """``add`` for each; a fact that there is no memory for does not keep the others."""
        found: list[EditReport] = []
        for part in parts:
            try:
                found += self.add(part, force=force, carry=carry)
            except OutOfMemoryError as error:  # of one fact: more than one are split
                found.append(self._did_not_fit("add", part[0].key, error))
        return tuple(found)

    def _teach(self, facts: Sequence[Fact], force: bool) -> EditReport:
        """One edit for all facts that the store does not hold yet."""
        for fact in facts:
            self._engine.examples(fact)  # raises before anything is written
        with self._session.editing():
            if self.should_compact(facts):
                report = self._train_compaction(facts, force)
                if report.outcome == "committed":
                    return report
                self._compaction_refused = True
            self._session.prepare_group(len(facts))
            return self._run(self._plans.add_group_plan(facts), force)

    def _train_compaction(self, facts: Sequence[Fact], force: bool) -> EditReport:
        """A group and all that is held, as one edit of the base model."""
        self._session.prepare_group(len(facts), measured=False)
        held = len(self._store.keys("committed"))
        self._session.say(
            f"{len(facts)} facts and the {held} that are held, from the base model on"
        )
        with self._session.from_base():
            return self._run(self._plans.add_group_plan(facts, compaction=True), force)

    def _retrain(self, rows: Sequence[FactRow]) -> EditReport:
        with self._session.editing():
            self._session.prepare_group(0)
            return self._run(self._plans.repair(rows), False)

    def _holds(self, fact: Fact) -> bool:
        row = self._store.find(fact.key)
        return row is not None and row.state == "committed"

    def _warn_apart(self, facts: Sequence[Fact]) -> None:
        """Say so when of two close keys only one went in."""
        keys = [fact.key for fact in facts]
        held = [self._holds(fact) for fact in facts]
        for one, other, score in similar_pairs(keys, keys):
            if held[one] and not held[other]:
                text = f"{keys[other]} did not go in, {keys[one]}, much like it ({score:.0f}), did"
                self._session.emit(Warning_(text=text, code="apart", key=keys[other]))

    def _warn_of_room(self, text: str) -> None:
        self._session.emit(Warning_(text=text, code="out-of-memory"))

    def _did_not_fit(self, kind: str, key: str, error: OutOfMemoryError) -> EditReport:
        """A fact's failure, as a report."""
        report = EditReport(
            kind=kind, outcome="failed", key=key, keys=(key,), parent=self._store.head(),
            reasons=(f"{error.message}. {error.hint}",),
        )  # fmt: skip
        self._session.emit(report)
        return report
