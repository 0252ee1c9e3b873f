"""Why a model says what it says: the facts near a question, and the edit that changed the answer.

Revisions between the base model and the one explained are bisected: of the revision in the middle
it is asked whether its answer is nearer to the answer explained or to the base model's.

Invariants:
- No weight is changed for good: the model comes back to the revision that it had.
- ``changed`` is a step of the journal at which the answer went over from one side to the other.  An
  answer that went over several times has several such steps, of which one is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvedit.asking.mentions import EXACT, NameIndex
from kvedit.asking.nearness import nearest
from kvedit.events import JsonDict
from kvedit.facts.fact import Fact
from kvedit.revisions.session import Session

SHOWN_FACTS = 5


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
    """Where an answer comes from; ``changed`` is None where the base model says the same.

    ``asked`` counts the revisions at which the model was asked.
    """

    question: str
    revision: int
    answer: str
    base_answer: str
    changed: Change | None
    facts: tuple[NearFact, ...]
    asked: int

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        changed = self.changed and _fields(self.changed)
        return {**fields, "changed": changed, "facts": [_fields(fact) for fact in self.facts]}


def _fields(row: NearFact | Change) -> JsonDict:
    document = {name: getattr(row, name) for name in row.__slots__}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in document.items()}


def explain(
    session: Session, question: str, *, at: int | None = None, max_new_tokens: int = 96,
    limit: int = SHOWN_FACTS,
) -> Explanation:  # fmt: skip
    """Explain the answer to a question at a revision, by default the one in memory.

    About log2 of the number of revisions are rebuilt and asked.  Raises UsageError for a revision
    that does not exist, CorruptStoreError for one that cannot be rebuilt.
    """
    start = session.revision
    revision = start if at is None else at
    line = [0, *(row.id for row in session.store.lineage(revision))]
    answers: dict[int, str] = {}

    def answer(number: int) -> str:
        if number not in answers:
            session.say(f"asking revision {number}")
            session.go_to(number)
            answers[number] = session.engine.generate([question], limit=max_new_tokens)[0]
        return answers[number]

    try:
        now, base = answer(line[-1]), answer(0)
        changed = _change(session, line, answer) if now != base else None
    finally:
        if session.revision != start:
            session.go_to(start)
    return Explanation(
        question=question, revision=revision, answer=now, base_answer=base, changed=changed,
        facts=_near_facts(session, revision, question, now, changed)[:limit], asked=len(answers),
    )  # fmt: skip


def _change(session: Session, line: Sequence[int], answer: Callable[[int], str]) -> Change:
    """Bisect a line of revisions whose ends answer differently."""
    low, high = 0, len(line) - 1
    first, last = answer(line[low]), answer(line[high])
    while high - low > 1:
        middle = (low + high) // 2
        if _nearer(answer(line[middle]), last, first):
            high = middle
        else:
            low = middle
    row = session.store.revision(line[high])
    edit = None if row.edit_id is None else session.store.edit(row.edit_id)
    return Change(
        before=line[low], revision=line[high], kind=row.kind, keys=edit.keys if edit else (),
        finished_at=edit.finished_at if edit else None, answer_before=answer(line[low]),
        answer_after=answer(line[high]),
    )  # fmt: skip


def _nearer(answer: str, one: str, other: str) -> bool:
    """Whether an answer has more in common with one than with the other."""
    from rapidfuzz import fuzz

    return fuzz.ratio(answer, one) > fuzz.ratio(answer, other)


def _near_facts(
    session: Session, revision: int, question: str, answer: str, changed: Change | None
) -> tuple[NearFact, ...]:
    """Facts that the question names, then those of the edit, then those that share its words."""
    known = session.store.facts_at(revision).values()
    state = {fact.key: (state, fact.description) for state, fact in known}
    facts = [fact for _, fact in known]
    edited = set(changed.keys) if changed else set()
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
