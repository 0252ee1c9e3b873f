"""Edits of one fact, and rollbacks: what is checked before each, then the edit itself."""

from collections.abc import Sequence
from dataclasses import replace

from kvedit.editing.edit import Edit
from kvedit.editing.plan import Planner
from kvedit.editing.study.examples import trained_questions
from kvedit.errors import DuplicateKeyError, UnknownKeyError
from kvedit.events import EditReport, Similar, Warning_
from kvedit.facts.fact import Fact
from kvedit.facts.keys import in_words, similar
from kvedit.revisions.session import Session
from kvedit.store.rows import FactRow


class SingleEditor:
    """Adds, updates and removes one fact at a time, and goes back to earlier revisions."""

    def __init__(self, session: Session) -> None:
        self._session, self._store, self._engine = session, session.store, session.engine
        self._planner = Planner(session)

    def add(self, fact: Fact, *, force: bool = False) -> EditReport:
        """See ``KnowledgeBase.add``."""
        self._planner.check([fact])
        with self._session.editing():
            known = self._store.find(fact.key)
            if known is not None and known.state == "committed":
                return self._add_again(known, fact, force=force)
            near = tuple(similar(fact.key, self._store.keys()))
            self._warn_of_similar(fact.key, near)
            self._session.protection.prepare()
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
            return Edit(self._session, self._planner.update(row, fact), force=force).run()

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
            self._store.revision(revision)  # raises for one that there is not
            return Edit(self._session, self._planner.rollback(revision)).run()

    def committed(self, key: str) -> FactRow:
        """A fact that the model holds; raises UnknownKeyError for any other."""
        row = self._store.require(key)
        if row.state != "committed":
            raise UnknownKeyError(
                f"the model does not hold {row.fact.key!r}: it is {row.state}",
                hint=f"Add it with: kvedit add {row.fact.key} FILE",
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
        trained = trained_questions(row.fact, self._session.config.study)
        prompts = [question.prompt for question in trained]
        return self._session.at(before, lambda: self._engine.prior_answers(row.fact, prompts))

    def _add_again(self, row: FactRow, fact: Fact, *, force: bool) -> EditReport:
        """The same text changes nothing; with other questions or statements it is an update."""
        if row.fact.description == fact.description:
            more = replace(row.fact, questions=fact.questions, statements=fact.statements)
            if more == row.fact or not (fact.questions or fact.statements):
                return self._unchanged("add", row)
            self._session.protection.prepare()
            return Edit(self._session, self._planner.update(row, more), force=force).run()
        raise DuplicateKeyError(
            f"{row.fact.key} is in the store with another text",
            hint=f"To change it: kvedit update {row.fact.key} FILE",
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
        kept = {*new.questions, *new.statements}
        dropped = [one.prompt for one in old.questions if one not in kept]
        dropped += [statement for statement in old.statements if statement not in kept]
        if dropped:
            text = f"{old.key}: the new text does not say, so it was dropped: {in_words(dropped)}"
            self._session.emit(Warning_(text=text, code="dropped", key=old.key))

    def _warn_of_similar(self, key: str, near: Sequence[Similar]) -> None:
        for hit in near:
            text = f"{key} is much like {hit.key} ({hit.score:.0f}): its retention is checked first"
            self._session.emit(Warning_(text=text, code="similar-key", key=hit.key))
