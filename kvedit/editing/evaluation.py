"""What the model is asked before and after an edit, and how it answers.

Invariants:
- Nothing is changed here, neither weights nor store.
- A fact that was lost before the edit is asked and reported, but the edit is not blamed for it; nor
  for a locality probe whose answer the model did not give before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvedit.editing.gate import Checks
from kvedit.editing.plan import Plan
from kvedit.editing.study import answers
from kvedit.editing.study.examples import StudyExamples
from kvedit.events import Score
from kvedit.facts.keys import similar
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.revisions.session import Session
from kvedit.store.rows import FactRow, ProbeRow

_FORGET = "forget"


@dataclass(frozen=True, slots=True)
class RetentionCandidate:
    """An earlier fact to check: the prompts drawn for it, and all of them, for rehearsal; ``study``
    was trained of it besides its text.
    """

    row: FactRow
    probes: tuple[Example, ...]
    all: tuple[Example, ...]
    study: tuple[Example, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How the merged model answers; ``learned`` are the edit's facts that pass by themselves,
    ``lost`` the earlier facts that are not recalled; ``loss`` on ordinary text, nats a token.
    ``gaps`` are the perturbation gaps of those of the edit's facts that have one.  The unseen
    phrasings of facts in ``reported_only`` are reported and not judged.
    """

    checks: Checks
    rows: tuple[ProbeRow, ...]
    lost: tuple[RetentionCandidate, ...]
    learned: frozenset[int]
    loss: float | None = None
    gaps: Mapping[int, float] = field(default_factory=dict)
    reported_only: frozenset[int] = frozenset()

    @property
    def generalization(self) -> Score:
        """How many unseen phrasings were answered exactly, of all facts."""
        return _score(self.rows, "paraphrase")

    @property
    def answers(self) -> Score:
        """How many held-out questions were answered freely."""
        return answers.score(self.rows)

    def without(self, fact_ids: frozenset[int]) -> Evaluation:
        """The same, had some facts not been part of the edit."""
        rows = tuple(row for row in self.rows if row.fact_id not in fact_ids)
        judged = [row for row in rows if row.fact_id not in self.reported_only]
        recall, paraphrase = _score(rows, "recall"), _score(judged, "paraphrase")
        checks = replace(self.checks, recall=recall, paraphrase=paraphrase)
        gaps = {fact_id: gap for fact_id, gap in self.gaps.items() if fact_id not in fact_ids}
        return replace(self, checks=checks, rows=rows, gaps=gaps)


class Evaluator:
    """Asks what one plan is judged by; made with the weights that the edit starts from.

    ``committed`` are the earlier facts, but for those that the plan erases; ``candidates`` those
    of them to check and rehearse.
    """

    def __init__(self, session: Session, plan: Plan) -> None:
        self._store, self._engine, self._config = session.store, session.engine, session.config
        self._session, self._plan = session, plan
        # A relation is trained on its own prompt alone: other wordings are a matter of luck.
        facts = [(change.fact_id, change.after or change.before) for change in plan.changes]
        self._relations = frozenset(i for i, fact in facts if fact and fact.relation_of)
        rows = self._store.facts("committed")
        self.committed = [row for row in rows if row.id not in plan.erases]
        self.candidates = self._choose_candidates()
        self._locality = self._answered_locality()
        self._reading = session.reading
        self._losses = self._reading.of(0), self._reading.of(session.store.head())

    def _choose_candidates(self) -> list[RetentionCandidate]:
        """Earlier facts, with a few prompts each to be probed, drawn again for every edit."""
        settings = self._config.retention
        committed = self.committed
        probed = max(settings.checked_facts, len(self._plan.targets))
        if self._plan.compaction:
            probed = len(committed)
        # A group rehearses all of them in turn: what no step speaks for is lost.
        count = len(committed) if self._plan.group else probed
        rng = random.Random(self._store.head())
        study = StudyExamples(self._session)
        candidates = []
        for number, row in enumerate(at_risk(committed, self._plan.keys, count)):
            examples = tuple(self._engine.examples(row.fact))
            drawn = rng.sample(examples, min(settings.prompts_per_fact, len(examples)))
            probes = tuple(drawn) if number < probed else ()
            candidates.append(RetentionCandidate(row, probes, examples, study.trained(row.fact)))
        return candidates

    def _answered_locality(self) -> list[Example]:
        """The locality probes whose answers the model gives before the edit; those that the edit
        before has asked are not asked twice, since the weights are the same.
        """
        head = self._store.head()
        asked = {} if self._plan.compaction else self._store.locality_at(head)
        probes = {(e.prompt, e.answer): e for e in self._plan.locality}
        unasked = {which: e for which, e in probes.items() if which not in asked}
        outcomes = self._engine.judge(list(unasked.values()))
        asked |= {which: o.passed for which, o in zip(unasked, outcomes, strict=True)}
        return [example for which, example in probes.items() if asked[which]]

    def evaluate(self) -> Evaluation:
        """Probe the merged, cast weights: the facts, paraphrases, locality, earlier facts."""
        probed = [candidate for candidate in self.candidates if candidate.probes]
        rows = self._ask(probed)
        loss = None if None in self._losses else self._reading.now()
        kept = _passed(rows, "retention")
        lost = [candidate for candidate in probed if kept[candidate.row.id] < 1]
        # A fact that was lost before this edit is reported and rehearsed, but blames nobody.
        blamed = [candidate for candidate in lost if candidate.row.health != "regressed"]
        judged = [candidate for candidate in probed if candidate.row.health != "regressed"]
        checks = Checks(
            _score(rows, "recall"),
            _score([row for row in rows if row.fact_id not in self._relations], "paraphrase"),
            _score(rows, "locality"),
            Score(len(judged) - len(blamed), len(judged)),
            tuple(candidate.row.fact.key for candidate in blamed),
            *(grown(loss, before) for before in self._losses),
        )
        return Evaluation(
            checks,
            tuple(rows),
            tuple(lost),
            self._learned(rows),
            loss,
            reported_only=self._relations,
        )

    def ask_answers(self, evaluation: Evaluation) -> Evaluation:
        """With the facts' held-out questions and perturbation gaps, which no gate looks at."""
        targets = self._plan.targets
        asked = answers.ask(self._engine, [(t.fact_id, e) for t in targets for e in t.probes])
        facts = [(c.fact_id, c.after) for c in self._plan.changes if c.after is not None]
        gaps = answers.perturbation_gaps(self._engine, [fact for _, fact in facts])
        measured = {i: gap for (i, _), gap in zip(facts, gaps, strict=True) if gap is not None}
        return replace(evaluation, rows=(*evaluation.rows, *asked), gaps=measured)

    def _ask(self, probed: Sequence[RetentionCandidate]) -> list[ProbeRow]:
        """Every probe of the edit, one row each."""
        probes = [*self._questions(), *((None, "locality", e) for e in self._locality)]
        probes += [(c.row.id, "retention", e) for c in probed for e in c.probes]
        outcomes = self._engine.judge([example for _, _, example in probes])
        rows = [probe_row(*probe, outcome) for probe, outcome in zip(probes, outcomes, strict=True)]
        # An unseen phrasing of a removed fact passes when the answer is gone.
        return [
            replace(row, kind="paraphrase", passed=not row.passed) if row.kind == _FORGET else row
            for row in rows
        ]

    def _questions(self) -> list[tuple[int | None, str, Example]]:
        """What the facts of the edit are asked: fact, kind, question."""
        questions: list[tuple[int | None, str, Example]] = []
        for target in self._plan.targets:
            questions += [(target.fact_id, "recall", e) for e in target.recall]
            questions += [(target.fact_id, "paraphrase", e) for e in target.paraphrases]
            questions += [(target.fact_id, _FORGET, e) for e in target.forget]
        return questions

    def _learned(self, rows: Sequence[ProbeRow]) -> frozenset[int]:
        """The facts of the edit that pass the gate by themselves."""
        judged = [row for row in rows if row.fact_id not in self._relations]
        recall, paraphrase = _passed(rows, "recall"), _passed(judged, "paraphrase")
        gate = self._config.gate
        recalled = {fact_id for fact_id, share in recall.items() if share >= gate.min_recall}
        return frozenset(i for i in recalled if paraphrase.get(i, 1.0) >= gate.min_paraphrase)


def at_risk(rows: Sequence[FactRow], keys: Sequence[str], count: int) -> list[FactRow]:
    """The earlier facts most likely to be lost: nearest keys, lowest margins, longest unchecked.

    Regressed facts come first; the three orders then take turns, so that none crowds out another.
    ``keys`` are those being edited, which are not among the answer.
    """
    others = [row for row in rows if row.fact.key not in keys]
    by_key = {row.fact.key: row for row in others}
    nearest = [by_key[hit.key] for key in keys for hit in similar(key, by_key, limit=count)]
    weakest = sorted(others, key=lambda row: (row.margin is not None, row.margin or 0.0, row.id))
    oldest = sorted(others, key=lambda row: (row.last_checked_revision or -1, row.id))
    chosen = {row.id: row for row in others if row.health == "regressed"}
    for turn in range(len(others)):
        for order in (nearest, weakest, oldest):
            if turn < len(order) and len(chosen) < count:
                chosen.setdefault(order[turn].id, order[turn])
    return list(chosen.values())[:count]


def probe_row(fact_id: int | None, kind: str, example: Example, outcome: Outcome) -> ProbeRow:
    """An outcome for the journal; an infinite margin is none."""
    return ProbeRow(
        fact_id=fact_id, kind=kind, protocol="generated" if outcome.generated else "teacher-forced",
        prompt=example.prompt, expected=example.answer, answer=None, passed=outcome.passed,
        margin=outcome.margin if math.isfinite(outcome.margin) else None,
    )  # fmt: skip


def grown(loss: float | None, before: float | None) -> float | None:
    """The perplexity of a loss as a multiple of that of another one, nats a token."""
    return None if loss is None or before is None else math.exp(loss - before)


def _passed(rows: Sequence[ProbeRow], kind: str) -> dict[int, float]:
    """For each fact the share of its probes of a kind that passed."""
    by_fact: dict[int, list[bool]] = {}
    for row in rows:
        if row.kind == kind and row.fact_id is not None:
            by_fact.setdefault(row.fact_id, []).append(row.passed)
    return {fact_id: sum(passed) / len(passed) for fact_id, passed in by_fact.items()}


def _score(rows: Sequence[ProbeRow], kind: str) -> Score:
    passed = [row.passed for row in rows if row.kind == kind]
    return Score(sum(passed), len(passed))
