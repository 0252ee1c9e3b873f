"""Edits of one fact, and rollbacks: what is checked before each, then the edit itself."""

import shlex
from collections.abc import Sequence
from dataclasses import replace

from kvedit.editing.edit import Edit
from kvedit.editing.plan import NEAREST, Planner
from kvedit.editing.study.examples import trained_questions
from kvedit.editing.study.filters import Filters, StudyReport, refused_all, unknown_texts
from kvedit.editing.study.writing import StudyWriter
from kvedit.errors import DuplicateKeyError, UnknownKeyError
from kvedit.events import EditReport, Similar, Warning_
from kvedit.facts.fact import Fact, Written
from kvedit.facts.forms.placeholders import placeholder
from kvedit.facts.keys import in_words, similar
from kvedit.revisions.session import Session
from kvedit.store.forget.plans import ErasePlan
from kvedit.store.forget.wording import Wording
from kvedit.store.rows import FactRow


class SingleEditor:
    """Adds, updates and removes one fact at a time, and goes back to earlier revisions."""

    def __init__(self, session: Session) -> None:
        self._session, self._store, self._engine = session, session.store, session.engine
        self._planner, self._writer = Planner(session), StudyWriter(session)

    def add(self, fact: Fact, *, force: bool = False) -> EditReport:
        """See ``KnowledgeBase.add``."""
        self._planner.check([fact])
        with self._session.editing():
            known = self._store.find(fact.key)
            if known is not None and known.state == "committed":
                return self._add_again(known, fact, force=force)
            self._warn_of_placeholder(fact)
            near = tuple(similar(fact.key, self._store.keys()))
            self._warn_of_similar(fact.key, near)
            self._session.protection.prepare()
            (fact,) = self._writer.extended([fact])
            self._session.say("asking the model first", fact.key)
            return Edit(self._session, self._planner.add(fact, near), force=force).run()

    def update(self, key: str, description: str, *, force: bool = False) -> EditReport:
        """See ``KnowledgeBase.update``."""
        with self._session.editing():
            row = self.committed(key)
            fact = row.fact.with_description(description)
            if fact == row.fact:
                return self._unchanged("update", row)
            self._warn_of_dropped(row.fact, fact)
            self._session.protection.prepare()
            (fact,) = self._writer.extended([fact])
            return Edit(self._session, self._planner.update(row, fact), force=force).run()

    def study(
        self, key: str, texts: Sequence[Written], *, of: str | None = None, force: bool = False
    ) -> StudyReport:
        """See ``KnowledgeBase.study``."""
        with self._session.editing():
            row = self.committed(key)
            new, filters = unknown_texts(row.fact, texts), Filters(self._session)
            if of is not None and of.strip() != row.fact.description:
                return StudyReport(row.fact.key, refused_all(new, "it is about another text"))
            sorted_texts = self._session.at(0, lambda: filters.sort(row.fact, new))
            if not sorted_texts.kept:
                return StudyReport(row.fact.key, sorted_texts)
            self._session.protection.prepare()
            fact = replace(row.fact, written=(*row.fact.written, *sorted_texts.kept))
            report = Edit(self._session, self._planner.update(row, fact), force=force).run()
            return StudyReport(row.fact.key, sorted_texts, report)

    def remove(self, key: str, *, force: bool = False) -> EditReport:
        """See ``KnowledgeBase.remove``."""
        with self._session.editing():
            row = self.committed(key)
            self._session.protection.prepare()
            plan = self._planner.remove(row, self._prior_answers(row))
            return Edit(self._session, plan, force=force).run()

    def rollback(self, revision: int) -> EditReport:
        """See ``KnowledgeBase.rollback``."""
        with self._session.editing():
            self._store.require_kept(revision)  # raises for one that is not there
            return Edit(self._session, self._planner.rollback(revision)).run()

    def erase(self, keys: Sequence[str], *, force: bool = False) -> EditReport:
        """See ``KnowledgeBase.erase``."""
        with self._session.editing():
            plan = self._store.erase_plan([self._store.require(key).id for key in keys])
            wording = self._store.wording(plan.fact_ids)
            self._store.clean_rejected_files(wording)
            if self._store.release_protected(wording):
                self._session.protection.start_again()
            report = self._erase(plan, force=force)
            if report.outcome == "committed":
                self._warn_of_remains(wording, plan)
        return report

    def _erase(self, plan: ErasePlan, *, force: bool) -> EditReport:
        """The edit: without training where a revision without the facts has all others."""
        if plan.restores is not None:
            return Edit(self._session, self._planner.erase(plan), force=force).run()
        self._session.protection.prepare_texts(0)
        others = "fact" if plan.retrained == 1 else "facts"
        self._session.say(f"training {plan.retrained} other {others} from the base model")
        with self._session.compacting():
            return Edit(self._session, self._planner.erase(plan), force=force).run()

    def _warn_of_remains(self, wording: Wording, plan: ErasePlan) -> None:
        """Name what still has the text and is not kvedit's to change."""
        if plan.shared_with:
            text = f"other facts have the text too: {in_words(plan.shared_with)}"
            self._session.emit(Warning_(text=text, code="text-remains"))
        elif files := [str(path) for path in self._store.files_with(wording)]:
            text = f"the text still stands in {in_words(files)}"
            self._session.emit(Warning_(text=text, code="text-remains"))

    def committed(self, key: str) -> FactRow:
        """A fact that the model holds; raises UnknownKeyError for any other."""
        row = self._store.require(key)
        if row.state != "committed":
            raise UnknownKeyError(
                f"the model does not hold {row.fact.key!r}: it is {row.state}",
                hint=f"Add it with: kvedit add {shlex.quote(row.fact.key)} FILE",
            )
        return row

    def _prior_answers(self, row: FactRow) -> dict[str, str]:
        """What the model answered before a fact came: its revision before is asked; older versions
        kept the answers.
        """
        answers = self._store.prior_answers(row.id)
        if answers:
            return answers
        self._session.say("asking the model as it was before", row.fact.key)
        before = self._store.revision_before(row.id)
        if before in self._store.gaps():
            text = f"revision {before}, before {row.fact.key} came, is no longer there: its"
            text += " questions get the base model's answers back"
            self._session.emit(Warning_(text=text, code="gone", key=row.fact.key))
            before = 0
        trained = trained_questions(row.fact, self._session.config.study)
        prompts = [question.prompt for question in trained]
        return self._session.at(before, lambda: self._engine.prior_answers(row.fact, prompts))

    def _add_again(self, row: FactRow, fact: Fact, *, force: bool) -> EditReport:
        """The same text changes nothing; with other questions or statements it is an update, which
        keeps what was written.
        """
        if row.fact.description == fact.description:
            asked = {one.prompt for one in fact.questions}
            more = replace(
                row.fact, questions=fact.questions, statements=fact.statements,
                written=tuple(one for one in row.fact.written if one.prompt not in asked),
            )  # fmt: skip
            if more == row.fact or not (fact.questions or fact.statements):
                return self._unchanged("add", row)
            self._session.protection.prepare()
            return Edit(self._session, self._planner.update(row, more), force=force).run()
        raise DuplicateKeyError(
            f"{row.fact.key} is in the store with another text",
            hint=f"To change it: kvedit update {shlex.quote(row.fact.key)} FILE",
        )

    def _unchanged(self, kind: str, row: FactRow) -> EditReport:
        report = EditReport(
            kind=kind, outcome="unchanged", key=row.fact.key, keys=(row.fact.key,),
            parent=self._store.head(),
        )  # fmt: skip
        self._session.emit(report)
        return report

    def _warn_of_dropped(self, old: Fact, new: Fact) -> None:
        """Say so when questions or statements go, because the new text does not say it."""
        kept = {*new.all_questions, *new.all_statements}
        dropped = [one.prompt for one in old.all_questions if one not in kept]
        dropped += [statement for statement in old.all_statements if statement not in kept]
        if dropped:
            text = f"{old.key}: the new text does not say, so it was dropped: {in_words(dropped)}"
            self._session.emit(Warning_(text=text, code="dropped", key=old.key))

    def _warn_of_placeholder(self, fact: Fact) -> None:
        if reason := placeholder(fact):
            text = f"{fact.key}: {reason}; it is trained all the same"
            self._session.emit(Warning_(text=text, code="placeholder", key=fact.key))

    def _warn_of_similar(self, key: str, near: Sequence[Similar]) -> None:
        for place, hit in enumerate(near):
            done = "is trained beside it, and checked" if place < NEAREST else "is checked"
            text = f"{key} is much like {hit.key} ({hit.score:.0f}), which {done} first"
            self._session.emit(Warning_(text=text, code="similar-key", key=hit.key))
