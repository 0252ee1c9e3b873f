"""What a model is asked before and after an edit, and what was found.

Invariants:
- Nothing is changed here, neither weights nor store.
- A fact that was lost before the edit is asked and reported, but the edit is not blamed for it; nor
  for a locality probe whose answer the model did not have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvedit.config import Config
from kvedit.editing.gate import Checks, at_risk
from kvedit.editing.plan import Plan
from kvedit.events import Score
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.store.store import FactRow, ProbeRow, Store
from kvedit.training.engine import Engine

_FORGET = "forget"


@dataclass(frozen=True, slots=True)
class RetentionCandidate:
    """An earlier fact to check: the prompts drawn for it, and all of them to rehearse, or to teach
    once more.
    """

    row: FactRow
    probes: tuple[Example, ...]
    all: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """One look at the merged model; ``learned`` are the edit's facts that pass by themselves."""

    checks: Checks
    rows: tuple[ProbeRow, ...]
    lost: tuple[RetentionCandidate, ...]
    learned: frozenset[int]

    def without(self, fact_ids: frozenset[int]) -> Found:
        """The same, had some facts not been part of the edit."""
        rows = tuple(row for row in self.rows if row.fact_id not in fact_ids)
        recall, paraphrase = _score(rows, "recall"), _score(rows, "paraphrase")
        checks = replace(self.checks, recall=recall, paraphrase=paraphrase)
        return replace(self, checks=checks, rows=rows)


class Evaluator:
    """Asks what one plan is to be judged by."""

    def __init__(self, store: Store, engine: Engine, config: Config, plan: Plan) -> None:
        self._store, self._engine, self._config, self._plan = store, engine, config, plan

    def candidates(self) -> list[RetentionCandidate]:
        """Earlier facts to check and rehearse, with a few prompts each, drawn anew every edit."""
        settings = self._config.retention
        committed = self._store.facts("committed")
        probed = max(settings.checked_facts, len(self._plan.targets))
        if self._plan.compaction:
            probed = len(committed)
        # A group rehearses all of them in turn: what no step speaks for is lost.
        count = len(committed) if self._plan.group else probed
        rows = at_risk(committed, self._plan.keys, count)
        rng = random.Random(self._store.head())
        candidates = []
        for number, row in enumerate(rows):
            examples = tuple(self._engine.examples(row.fact))
            drawn = rng.sample(examples, min(settings.prompts_per_fact, len(examples)))
            candidates.append(
                RetentionCandidate(row, tuple(drawn) if number < probed else (), examples)
            )
        return candidates

    def answered_locality(self) -> list[Example]:
        """The locality probes whose answers the model has before the edit."""
        outcomes = self._engine.judge(self._plan.locality)
        return [e for e, o in zip(self._plan.locality, outcomes, strict=True) if o.passed]

    def look(self, candidates: Sequence[RetentionCandidate], held: Sequence[Example]) -> Found:
        """Probe the merged, cast weights: the fact, its paraphrases, locality, earlier facts."""
        asked = [*self._questions(), *((None, "locality", e) for e in held)]
        probed = [candidate for candidate in candidates if candidate.probes]
        asked += [
            (candidate.row.id, "retention", e) for candidate in probed for e in candidate.probes
        ]
        outcomes = self._engine.judge([example for _, _, example in asked])
        rows = [
            probe_row(fact_id, kind, example, outcome)
            for (fact_id, kind, example), outcome in zip(asked, outcomes, strict=True)
        ]
        rows = [_turned(row) if row.kind == _FORGET else row for row in rows]
        kept = _passed(rows, "retention")
        lost = [candidate for candidate in probed if kept[candidate.row.id] < 1]
        # A fact that was lost before this edit is reported and rehearsed, but blames nobody.
        blamed = [candidate for candidate in lost if candidate.row.health != "regressed"]
        judged = [candidate for candidate in probed if candidate.row.health != "regressed"]
        checks = Checks(
            _score(rows, "recall"),
            _score(rows, "paraphrase"),
            _score(rows, "locality"),
            Score(len(judged) - len(blamed), len(judged)),
            tuple(candidate.row.fact.key for candidate in blamed),
        )
        return Found(checks, tuple(rows), tuple(lost), self._learned(rows))

    def _questions(self) -> list[tuple[int | None, str, Example]]:
        """What the facts of the edit are asked: fact, kind, question."""
        return [
            (target.fact_id, kind, example)
            for target in self._plan.targets
            for kind, examples in (
                ("recall", target.recall),
                ("paraphrase", target.paraphrases),
                (_FORGET, target.forget),
            )
            for example in examples
        ]

    def _learned(self, rows: Sequence[ProbeRow]) -> frozenset[int]:
        """The facts of the edit that pass the gate by themselves."""
        recall, other = _passed(rows, "recall"), _passed(rows, "paraphrase")
        gate = self._config.gate
        return frozenset(
            fact_id
            for fact_id, share in recall.items()
            if share >= gate.min_recall and other.get(fact_id, 1.0) >= gate.min_paraphrase
        )


def probe_row(fact_id: int | None, kind: str, example: Example, outcome: Outcome) -> ProbeRow:
    """An outcome for the journal; an infinite margin is none."""
    margin = outcome.margin if abs(outcome.margin) != float("inf") else None
    return ProbeRow(
        fact_id=fact_id,
        kind=kind,
        protocol="generated" if outcome.generated else "teacher-forced",
        prompt=example.prompt,
        expected=example.answer,
        answer=None,
        passed=outcome.passed,
        margin=margin,
    )


def _turned(row: ProbeRow) -> ProbeRow:
    """A never-trained phrasing that passes when the answer is gone."""
    return replace(row, kind="paraphrase", passed=not row.passed)


def _passed(rows: Sequence[ProbeRow], kind: str) -> dict[int, float]:
    """For each fact the share of its probes of a kind that passed."""
    found: dict[int, list[bool]] = {}
    for row in rows:
        if row.kind == kind and row.fact_id is not None:
            found.setdefault(row.fact_id, []).append(row.passed)
    return {fact_id: sum(passed) / len(passed) for fact_id, passed in found.items()}


def _score(rows: Sequence[ProbeRow], kind: str) -> Score:
    chosen = [row.passed for row in rows if row.kind == kind]
    return Score(sum(chosen), len(chosen))
