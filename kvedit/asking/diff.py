"""What differs between two revisions: the facts, and what the model answers about them.

Invariants:
- The facts that differ are read from the journal; no model is needed for them.
- A fact that is the same in both revisions is listed only if the model's answer differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvedit.events import JsonDict
from kvedit.facts.fact import Fact
from kvedit.facts.keys import facts_text

if TYPE_CHECKING:
    from kvedit.revisions.session import Session
    from kvedit.store.store import Store

ANSWER_TOKENS = 96  # at which answers are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class FactDifference:
    """How a fact differs between two revisions.

    ``change`` is ``added``, ``updated``, ``removed`` or ``none``; the descriptions are None where
    the model does not hold the fact.  ``prompt`` was asked at both revisions; it and the answers
    are None where nothing was asked.
    """

    key: str
    change: str
    before: str | None
    after: str | None
    prompt: str | None = None
    answer_before: str | None = None
    answer_after: str | None = None

    @property
    def answer_changed(self) -> bool | None:
        """Whether the answers differ; None where nothing was asked."""
        return None if self.prompt is None else self.answer_before != self.answer_after

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "answer_changed": self.answer_changed}


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionDiff:
    """``facts`` that differ in themselves or in their answers; ``asked``: how many were asked."""

    before: int
    after: int
    facts: tuple[FactDifference, ...]
    asked: int = 0

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        facts = [fact.to_json() for fact in self.facts]
        return {"before": self.before, "after": self.after, "asked": self.asked, "facts": facts}


def changed_facts(store: Store, before: int, after: int) -> list[FactDifference]:
    """The facts that one revision holds otherwise than another, in the order they came.

    Raises UsageError for a revision that does not exist.
    """
    return [one for _, one in _differences(store, before, after) if one.change != "none"]


def diff(session: Session, before: int, after: int, *, ask: int = 0) -> RevisionDiff:
    """What differs between two revisions; up to ``ask`` facts are asked at both, those that changed
    first, then those that are recalled by the smallest margin.
    """
    every = _differences(session.store, before, after)
    margins = {row.fact.key: row.margin for row in session.store.facts("committed")}
    order = sorted(
        every, key=lambda pair: (pair[1].change == "none", margins.get(pair[1].key) or 0.0)
    )
    asked = _asked(session, before, after, order[:ask])
    rows = [asked.get(one.key, one) for _, one in every]
    listed = tuple(row for row in rows if row.change != "none" or row.answer_changed)
    return RevisionDiff(before=before, after=after, facts=listed, asked=len(asked))


def _differences(store: Store, before: int, after: int) -> list[tuple[Fact, FactDifference]]:
    """Every fact that either revision holds, as the later one has it if it does, and how it
    differs.
    """
    old, new = store.held_at(before), store.held_at(after)
    pairs = [(old.get(number), new.get(number)) for number in sorted({*old, *new})]
    rows = []
    for was, now in pairs:
        fact = now or was
        if fact is not None:
            texts = [one.description if one else None for one in (was, now)]
            row = FactDifference(
                key=fact.key, change=_change(was, now), before=texts[0], after=texts[1]
            )
            rows.append((fact, row))
    return rows


def _change(was: Fact | None, now: Fact | None) -> str:
    if was is None or now is None:
        return "added" if was is None else "removed"
    return "none" if was == now else "updated"


def _asked(
    session: Session, before: int, after: int, rows: Sequence[tuple[Fact, FactDifference]]
) -> dict[str, FactDifference]:
    """The facts with what the model answers to their first training prompt at both revisions."""
    if not rows:
        return {}
    engine = session.engine
    prompts = [engine.examples(fact)[0].prompt for fact, _ in rows]
    said = []
    for number in (before, after):
        session.say(f"asking revision {number} about {facts_text(len(rows))}")
        said.append(session.at(number, lambda: engine.generate(prompts, limit=ANSWER_TOKENS)))
    return {
        row.key: replace(row, prompt=prompt, answer_before=first, answer_after=second)
        for (_, row), prompt, first, second in zip(rows, prompts, *said, strict=True)
    }
