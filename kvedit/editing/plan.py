"""What an edit is to do: which facts change, what must be answered after it, and what must not.

Invariants:
- A plan is made with the weights in memory that the edit starts from (the head's, or for a
  compaction the base model's): what the model answers with them is part of it.
- Making one changes no weights and commits nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kvedit.editing.study.examples import StudyExamples
from kvedit.events import Similar
from kvedit.facts.fact import Fact
from kvedit.facts.keys import facts_text
from kvedit.model.prompts import Example
from kvedit.replay import questions
from kvedit.replay.protected_texts import example
from kvedit.revisions.session import Session
from kvedit.store.forget.plans import ErasePlan
from kvedit.store.rows import FactChange, FactRow

LOCALITY_TOKENS = 64  # of answers to a fact's own locality probes, where it gives none


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one fact's prompts are to answer after the edit.

    ``forget`` are answers that must be gone under prompts that were never trained; ``study`` is
    trained besides the text, ``probes`` are held-out questions: neither is a reason to refuse.
    """

    fact_id: int
    recall: tuple[Example, ...]
    paraphrases: tuple[Example, ...] = ()
    forget: tuple[Example, ...] = ()
    study: tuple[Example, ...] = ()
    probes: tuple[Example, ...] = ()


NEAREST = 2
"""Earlier facts with similar keys that are trained beside a single new one: they would be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An edit to carry out.

    The facts of a ``group`` pass or fail one by one; those of another plan all together.  A
    ``compaction`` trains all committed facts once more beside the new ones, from the base model.
    ``restores`` is the revision that a rollback goes back to.  ``erases`` are facts of which
    neither the model nor the store keeps anything; the plan does not name them.  ``similar`` are
    the keys most like the new one, the nearest first.
    """

    kind: str
    keys: tuple[str, ...]
    changes: tuple[FactChange, ...]
    targets: tuple[Target, ...] = ()
    locality: tuple[Example, ...] = ()
    similar: tuple[Similar, ...] = ()
    text_before: str | None = None
    text_after: str | None = None
    group: bool = False
    compaction: bool = False
    restores: int | None = None
    erases: tuple[int, ...] = ()

    @property
    def trained_beside(self) -> tuple[str, ...]:
        """The keys of earlier facts that are trained beside the new one from the start."""
        return tuple(hit.key for hit in self.similar[:NEAREST])

    def only(self, fact_ids: Container[int]) -> Plan:
        """The part of the plan that is about some of its facts."""
        chosen = [i for i, target in enumerate(self.targets) if target.fact_id in fact_ids]
        return replace(
            self,
            keys=tuple(self.keys[i] for i in chosen),
            changes=tuple(self.changes[i] for i in chosen),
            targets=tuple(self.targets[i] for i in chosen),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What questions call the facts."""
        facts = (change.after or change.before for change in self.changes)
        return tuple(fact.name for fact in facts if fact is not None)

    @property
    def key(self) -> str:
        """The key to show: of one fact, of the first of several, or where a rollback goes."""
        if self.erases:
            return facts_text(len(self.erases))
        if self.restores is not None:
            return f"to {self.restores}"
        return (
            self.keys[0] if len(self.keys) == 1 else f"{self.keys[0]} and {len(self.keys) - 1} more"
        )


def should_compact(facts: int, committed: int, incremental: int, ratio: float) -> bool:
    """Whether a group is trained together with all that is committed, from the base model.

    On top of earlier groups a group learns less and harms more.  ``incremental`` counts the facts
    that were added since the last compaction, of those ``committed``.  As long as they are a fixed
    ``ratio`` of the rest, compaction trains a fact a fixed number of times on average.
    """
    rest = max(0, committed - incremental)
    return committed > 0 and facts + min(committed, incremental) >= rest * ratio


class Planner:
    """Makes plans for a session's store and model."""

    def __init__(self, session: Session) -> None:
        self._store, self._engine = session.store, session.engine
        self._protection = session.protection
        self._study = StudyExamples(session)

    def check(self, facts: Sequence[Fact]) -> None:
        """Raise what an untrainable text or question raises, before anything is written."""
        for fact in facts:
            self._target(0, fact)

    def add(self, fact: Fact, near: tuple[Similar, ...]) -> Plan:
        """Train one fact, which is then pending; ``near`` are close keys."""
        fact_id = self._store.put_pending(fact)
        before = self._engine.answer_now(fact)
        return self._plan(
            "add", [FactChange(fact_id, None, fact)], similar=near,
            text_before=before, text_after=fact.description,
        )  # fmt: skip

    def add_group(self, facts: Sequence[Fact], *, compaction: bool = False) -> Plan:
        """Train several facts, which are then pending, each of which may fail by itself."""
        ids = self._store.put_pending_many(facts)
        changes = [FactChange(i, None, fact) for i, fact in zip(ids, facts, strict=True)]
        return self._plan("add", changes, group=True, compaction=compaction)

    def update(self, row: FactRow, fact: Fact) -> Plan:
        """Give a committed fact what ``fact`` has."""
        texts = {"text_before": row.fact.description, "text_after": fact.description}
        return self._plan("update", [FactChange(row.id, row.fact, fact)], **texts)

    def remove(self, row: FactRow, prior: Mapping[str, str]) -> Plan:
        """Train a committed fact's prompts back to their ``prior`` answers."""
        recall = tuple(self._engine.prior_examples(row.fact, prior))
        forget = tuple(self._engine.paraphrases(row.fact))
        target = Target(fact_id=row.id, recall=recall, forget=forget)
        after = next(iter(prior.values()), None)
        return self._plan(
            "remove", [FactChange(row.id, row.fact, None)], targets=(target,),
            text_before=row.fact.description, text_after=after,
        )  # fmt: skip

    def repair(self, rows: Sequence[FactRow]) -> Plan:
        """Train committed facts once more."""
        changes = [FactChange(row.id, row.fact, row.fact) for row in rows]
        locality = self._locality([rows[0].fact])
        return self._plan("repair", changes, locality=locality, group=len(rows) > 1)

    def rollback(self, revision: int) -> Plan:
        """Go back to an earlier revision."""
        changes = tuple(self._store.rollback_changes(revision))
        return Plan(kind="rollback", keys=(), changes=changes, restores=revision)

    def erase(self, plan: ErasePlan) -> Plan:
        """Train all other facts from the base model, or restore a revision that has just them."""
        erases, restores = plan.fact_ids, plan.restores
        if restores is not None:
            return Plan(kind="erase", keys=(), changes=(), restores=restores, erases=erases)
        locality = self._locality([])
        return self._plan(
            "erase", [], targets=(), locality=locality, group=True, compaction=True, erases=erases
        )

    def _plan(self, kind: str, changes: Sequence[FactChange], **parts: Any) -> Plan:
        """By default the facts are to be recalled as they are after it, their locality kept."""
        facts = [fact for change in changes if (fact := change.after or change.before)]
        if "targets" not in parts:
            pairs = zip(changes, facts, strict=True)
            parts["targets"] = tuple(self._target(change.fact_id, fact) for change, fact in pairs)
        if "locality" not in parts:
            parts["locality"] = self._locality(facts)
        keys = tuple(fact.key for fact in facts)
        return Plan(kind=kind, keys=keys, changes=tuple(changes), **parts)

    def _target(self, fact_id: int, fact: Fact) -> Target:
        recall, paraphrases = self._engine.examples(fact), self._engine.paraphrases(fact)
        study, probes = self._study.trained(fact), self._study.probes(fact)
        return Target(
            fact_id=fact_id, recall=tuple(recall), paraphrases=tuple(paraphrases), study=study,
            probes=probes,
        )  # fmt: skip

    def _locality(self, facts: Sequence[Fact]) -> tuple[Example, ...]:
        """The store's locality probes and those of the facts."""
        shared = self._protection.locality_examples()
        return (*shared, *(e for fact in facts for e in self._locality_of(fact)))

    def _locality_of(self, fact: Fact) -> list[Example]:
        """A fact's own locality probes, whose answers default to today's."""
        base, renderer = self._engine.base, self._engine.renderer
        given = [(one.prompt, one.answer) for one in fact.locality if one.answer is not None]
        prompts = [one.prompt for one in fact.locality if one.answer is None]
        if not prompts:
            return renderer.examples(given)
        ask = partial(questions.asked_now, base, renderer, prompts, LOCALITY_TOKENS)
        asked = self._engine.worker.on_main(ask)
        return [*(example(renderer, text) for text in asked), *renderer.examples(given)]
