"""Facts trained together: a group is one edit, and what it does not learn is tried in smaller ones.

Invariants:
- No fact costs its neighbours: what a group has not learned is trained again by itself or in
  halves, and a group that is refused, or that does not fit into memory, is split.
- A fact that does not fit even alone is reported as failed, and the others go on.
- If of two similar keys only one is committed, a warning says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvedit.editing.edit import Edit
from kvedit.editing.group_size import GroupSize
from kvedit.editing.plan import Planner, should_compact
from kvedit.editing.single_edit import SingleEditor
from kvedit.editing.study.writing import StudyWriter
from kvedit.errors import OutOfMemoryError
from kvedit.events import EditReport, Warning_
from kvedit.facts.fact import Fact
from kvedit.facts.similarity import find_pairs
from kvedit.revisions.session import Session
from kvedit.store.rows import FactRow
from kvedit.training.loops.turns import FACTS_TOGETHER

REPAIR_GROUP = 64  # facts
SPLIT_PAIRS_NAMED = 20  # warnings of similar keys that did not end alike, at most


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """``force`` commits what the gate refuses; with ``carry`` facts that a group did not learn stay
    pending, for the caller to put into a later group; from ``deadline`` (``time.monotonic``) on
    training ends where it stands, with OutOfTimeError, and can be resumed.
    """

    force: bool = False
    carry: bool = False
    deadline: float | None = None


class GroupEditor:
    """Adds groups, and repairs facts in groups."""

    def __init__(self, session: Session, single: SingleEditor) -> None:
        self._session, self._store, self._engine = session, session.store, session.engine
        self._single, self._planner = single, Planner(session)
        self._writer = StudyWriter(session)
        self._size = GroupSize(session.engine, session.config.group, self._warn_of_memory)
        self._compaction_refused = False

    @property
    def largest(self) -> int | None:
        """The most facts that are trained together since memory ran out; None if it never did."""
        return self._size.largest

    def add(self, facts: Sequence[Fact], options: GroupOptions) -> tuple[EditReport, ...]:
        """Train some facts; see ``KnowledgeBase.add_group``."""
        if len(facts) == 1:
            return (self._single.add(facts[0], force=options.force),)
        parts = self._size.parts(facts, FACTS_TOGETHER if self._engine.reads else None)
        if len(parts) > 1:
            return self._add_parts(parts, options)
        report = self._size.attempt(facts, lambda: self._add_together(facts, options))
        if report is None:
            return self._add_parts(self._size.parts(facts), options)
        if report.outcome == "committed" and options.carry:
            return (report,)
        missing = [fact for fact in facts if not self._is_committed(fact)]
        few = report.outcome == "committed" and len(missing) <= len(facts) // 4
        half = (len(missing) + 1) // 2
        parts = [[f] for f in missing] if few else [missing[:half], missing[half:]]
        more = self._add_parts([part for part in parts if part], options)
        self._warn_of_split_pairs(facts)
        return (report, *more)

    def repair(self, rows: Sequence[FactRow]) -> list[EditReport]:
        """Train facts once more that were lost, in groups as large as memory allows."""
        parts = self._size.parts(rows, FACTS_TOGETHER if self._engine.reads else REPAIR_GROUP)
        if len(parts) > 1:
            return [report for part in parts for report in self.repair(part)]
        facts = [row.fact for row in rows]
        try:
            report = self._size.attempt(facts, lambda: self._repair_together(rows))
        except OutOfMemoryError as error:
            return [self._did_not_fit("repair", rows[0].fact.key, error)]
        return self.repair(rows) if report is None else [report]

    def should_compact(self, facts: Sequence[Fact]) -> bool:
        """Whether they are so many (see ``plan.should_compact``), and all fit into memory."""
        if self._compaction_refused:
            return False
        committed = [row.fact for row in self._store.facts("committed")]
        incremental = self._store.added_since_compaction()
        ratio = self._session.config.group.compaction_ratio
        enough = should_compact(len(facts), len(committed), incremental, ratio)
        return enough and self._size.fits([*committed, *facts])

    def _add_parts(
        self, parts: Sequence[Sequence[Fact]], options: GroupOptions
    ) -> tuple[EditReport, ...]:
        """``add`` for each; a fact that does not fit into memory does not keep the others."""
        reports: list[EditReport] = []
        for part in parts:
            try:
                reports += self.add(part, options)
            except OutOfMemoryError as error:  # of one fact: more than one are split
                reports.append(self._did_not_fit("add", part[0].key, error))
        return tuple(reports)

    def _add_together(self, facts: Sequence[Fact], options: GroupOptions) -> EditReport:
        """One edit for all of the facts."""
        for fact in facts:
            self._planner.check([fact])
        with self._session.editing():
            facts = self._writer.extended(facts)
            if not self._engine.reads and self.should_compact(facts):
                report = self._compact(facts, options)
                if report.outcome == "committed":
                    return report
                self._compaction_refused = True
            self._session.protection.prepare_group(len(facts))
            return self._run(facts, options)

    def _compact(self, facts: Sequence[Fact], options: GroupOptions) -> EditReport:
        """The facts and all that are committed, as one edit of the base model."""
        self._session.protection.prepare_texts(len(facts))
        committed = len(self._store.keys("committed"))
        what = f"{len(facts)} facts and the {committed} committed ones"
        self._session.say(f"compaction: training {what} from the base model")
        with self._session.compacting():
            return self._run(facts, options, compaction=True)

    def _run(
        self, facts: Sequence[Fact], options: GroupOptions, *, compaction: bool = False
    ) -> EditReport:
        plan = self._planner.add_group(facts, compaction=compaction)
        return Edit(self._session, plan, force=options.force, deadline=options.deadline).run()

    def _repair_together(self, rows: Sequence[FactRow]) -> EditReport:
        with self._session.editing():
            self._session.protection.prepare_group(0)
            return Edit(self._session, self._planner.repair(rows)).run()

    def _is_committed(self, fact: Fact) -> bool:
        row = self._store.find(fact.key)
        return row is not None and row.state == "committed"

    def _warn_of_split_pairs(self, facts: Sequence[Fact]) -> None:
        """Say so when of two similar keys only one was committed."""
        keys = {True: list[str](), False: list[str]()}
        for fact in facts:
            keys[self._is_committed(fact)].append(fact.key)
        near = find_pairs(keys[False], keys[True], among=False, most=SPLIT_PAIRS_NAMED)
        for i, j, score in near.closest:
            key, other = keys[False][i], keys[True][j - len(keys[False])]
            text = f"{key} was not committed; {other}, much like it ({score:.0f}), was"
            self._session.emit(Warning_(text=text, code="apart", key=key))

    def _warn_of_memory(self, text: str) -> None:
        self._session.emit(Warning_(text=text, code="out-of-memory"))

    def _did_not_fit(self, kind: str, key: str, error: OutOfMemoryError) -> EditReport:
        """A fact's failure, as a report."""
        report = EditReport(
            kind=kind, outcome="failed", key=key, keys=(key,), parent=self._store.head(),
            reasons=(f"{error.message}. {error.hint}",),
        )  # fmt: skip
        self._session.emit(report)
        return report
