"""Why a model says what it says: the facts near a question, and the edits that changed the answer.

Revisions between the base model and the one explained are bisected twice: for the step from which
on the answer is the same to the letter, and, where that step changed only its wording, for the one
from which on it is nearly the same.

Invariants:
- No weight is changed for good: the model comes back to the revision that it had.
- A change is a step of the journal at which the answer went over from one side to the other.  An
  answer that went over several times has several such steps, of which one is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvedit.asking.mentions import EXACT, NameIndex
from kvedit.asking.nearness import nearest
from kvedit.events import JsonDict
from kvedit.facts.fact import Fact

if TYPE_CHECKING:
    from kvedit.revisions.session import Session

SHOWN_FACTS = 5
NEARLY_SAME = 90.0  # of two answers, rapidfuzz's ratio from which on only the wording differs


@dataclass(frozen=True, slots=True, kw_only=True)
class NearFact:
    """A fact that an answer may come from.

    ``named``: how alike the question spells its name (0 to 100; 0: not at all); ``nearness``: the
    words it shares with question and answer, 0 to 1; ``edited``: the edit that changed the answer
    changed it; ``state`` and ``description`` are those at the revision explained.
    """

    key: str
    named: float
    nearness: float
    edited: bool
    state: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The step at which an answer changed: the revisions, the edit, and what the model said."""

    before: int
    revision: int
    kind: str
    keys: tuple[str, ...]
    finished_at: str | None
    answer_before: str
    answer_after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where an answer comes from: the ``changes`` that made it, the latest first; none where the
    base model says the same.

    ``asked`` counts the revisions at which the model was asked.
    """

    question: str
    revision: int
    answer: str
    base_answer: str
    changes: tuple[Change, ...]
    facts: tuple[NearFact, ...]
    asked: int

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        changes, facts = map(_fields, self.changes), map(_fields, self.facts)
        return {**fields, "changes": list(changes), "facts": list(facts)}


def _fields(row: NearFact | Change) -> JsonDict:
    document = {name: getattr(row, name) for name in row.__slots__}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in document.items()}


def explain(
    session: Session, question: str, *, at: int | None = None, max_new_tokens: int = 96,
    limit: int = SHOWN_FACTS,
) -> Explanation:  # fmt: skip
    """Explain the answer to a question at a revision, by default the one in memory.

    About log2 of the number of revisions are rebuilt and asked; those that were erased or pruned
    are passed over.  Raises UsageError for a revision that does not exist or is not there any more,
    CorruptStoreError for one that cannot be rebuilt.
    """
    start = session.revision
    revision = start if at is None else at
    session.store.require_kept(revision)
    gaps = session.store.gaps()
    line = [0, *(row.id for row in session.store.lineage(revision) if row.id not in gaps)]
    answers: dict[int, str] = {}

    def answer(number: int) -> str:
        if number not in answers:
            session.say(f"asking revision {number}")
            session.go_to(number)
            answers[number] = session.engine.generate([question], limit=max_new_tokens)[0]
        return answers[number]

    try:
        now, base = answer(line[-1]), answer(0)
        changes = _changes(session, line, answer) if now != base else ()
    finally:
        if session.revision != start:
            session.go_to(start)
    return Explanation(
        question=question, revision=revision, answer=now, base_answer=base, changes=changes,
        facts=_near_facts(session, revision, question, now, changes)[:limit], asked=len(answers),
    )  # fmt: skip


def _changes(
    session: Session, line: Sequence[int], answer: Callable[[int], str]
) -> tuple[Change, ...]:
    """The steps in a line of revisions, whose ends answer differently, that made its answer."""
    from rapidfuzz import fuzz

    final = answer(line[-1])

    def nearly(number: int) -> bool:
        return fuzz.ratio(answer(number), final) >= NEARLY_SAME

    step = _bisect(line, lambda number: answer(number) == final)
    steps = [step]
    if nearly(line[step - 1]) and not nearly(0):
        steps.append(_bisect(line[:step], nearly))
    return tuple(_change(session, line[at - 1], line[at], answer) for at in steps)


def _bisect(line: Sequence[int], reached: Callable[[int], bool]) -> int:
    """A place in a line at which something is reached that was not just before it; it is at the
    end, and not at the start.
    """
    low, high = 0, len(line) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(line[middle]) else (middle, high)
    return high


def _change(session: Session, before: int, revision: int, answer: Callable[[int], str]) -> Change:
    row = session.store.revision(revision)
    edit = None if row.edit_id is None else session.store.edit(row.edit_id)
    return Change(
        before=before, revision=revision, kind=row.kind, keys=edit.keys if edit else (),
        finished_at=edit.finished_at if edit else None, answer_before=answer(before),
        answer_after=answer(revision),
    )  # fmt: skip


def _near_facts(
    session: Session, revision: int, question: str, answer: str, changes: Sequence[Change]
) -> tuple[NearFact, ...]:
    """Facts that the question names, then those of the edit, then those that share its words."""
    known = session.store.facts_at(revision).values()
    state = {fact.key: (state, fact.description) for state, fact in known}
    facts = [fact for _, fact in known]
    edited = {key for change in changes for key in change.keys}
    names = NameIndex((name, fact.key) for fact in facts for name in (fact.key, *fact.aliases))
    named = {m.key: m.score for m in names.mentioned(question, limit=len(facts))}
    nearness = {fact.key: score for fact, score in nearest(f"{question}\n{answer}", facts)}

    def rank(fact: Fact) -> tuple[bool, bool, float, float]:
        score = named.get(fact.key, 0.0)
        return score == EXACT, fact.key in edited, score, nearness.get(fact.key, 0.0)

    keys = {*edited, *named, *nearness}
    ranked = sorted((f for f in facts if f.key in keys), key=rank, reverse=True)
    return tuple(
        NearFact(
            key=fact.key, named=named.get(fact.key, 0.0),
            nearness=round(nearness.get(fact.key, 0.0), 3), edited=fact.key in edited,
            state=state[fact.key][0], description=state[fact.key][1],
        )
        for fact in ranked
    )  # fmt: skip
