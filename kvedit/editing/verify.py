"""Checks of what a model still says: the facts that were taught (ERR), and what it knew (TRR).

Invariants:
- Every probe is recorded in the store, under the protocol that it was asked by.
- Nothing here changes a weight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from kvedit.editing.evaluation import probe_row
from kvedit.events import EditReport, RetentionCheck, Score
from kvedit.facts.keys import naming
from kvedit.metrics import ngram_entropy
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.replay import protected_texts
from kvedit.replay.protected_texts import Protected
from kvedit.store.store import FactRow, ProbeRow, Store
from kvedit.training.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseKnowledgeReport:
    """TRR: of what the base model knew, how much is still said exactly, by free ``generated``
    answers and teacher-forced (``score``); ``lost`` are the questions that are not.  ``fluency`` is
    that of the generated answers, ``base_fluency`` that of the base model's to the same questions:
    the mean n-gram entropy in bits (``metrics.ngram_entropy``), None where nothing was asked.
    """

    score: Score
    generated: Score
    lost: tuple[str, ...] = ()
    fluency: float | None = None
    base_fluency: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found: ``score`` counts facts recalled under all their training prompts
    (teacher-forced, near-ties by free generation), ``generated`` facts whose free answer to one of
    them is exact.  ``base`` is what was found of the base model's own knowledge, if asked.
    """

    revision: int
    checks: tuple[RetentionCheck, ...]
    score: Score
    generated: Score
    base: BaseKnowledgeReport | None = None
    repaired: tuple[EditReport, ...] = ()
    seconds: float = 0.0


def check_facts(
    engine: Engine,
    store: Store,
    revision: int,
    rows: Sequence[FactRow],
    emit: Callable[[RetentionCheck], None],
    say: Callable[[str], None],
) -> VerifyReport:
    """Probe facts under all training prompts, and generate one answer each anyway."""
    examples = [engine.examples(row.fact) for row in rows]
    say(f"checking {len(rows)} facts")
    outcomes = iter(engine.judge([e for own in examples for e in own]))
    rng = random.Random(revision)
    asked = [rng.choice(own) for own in examples]
    say(f"generating {len(rows)} answers")
    generated = engine.generated_recall(asked)
    checks, results, held = [], [], []
    for row, own, one, said in zip(rows, examples, asked, generated, strict=True):
        found = [next(outcomes) for _ in own]
        results += [probe_row(row.id, "retention", *pair) for pair in zip(own, found, strict=True)]
        results.append(_spoken_row(row.id, "retention", one, said))
        held.append(all(outcome.passed for outcome in found))
        checks.append(_check_of(row.fact.key, revision, found, said))
        emit(checks[-1])
    store.record_results(results, revision)
    return VerifyReport(
        revision=revision,
        checks=tuple(checks),
        score=Score(sum(held), len(held)),
        generated=Score(sum(generated), len(generated), "generated"),
    )


def check_base(
    engine: Engine,
    store: Store,
    revision: int,
    known: Sequence[Protected],
    sample: int,
    say: Callable[[str], None],
) -> BaseKnowledgeReport:
    """Ask some of what the base model had ``known``, but nothing that names an edited fact: such
    answers are to change.  The same revision is asked the same questions.
    """
    edited = naming(row.fact.key for row in store.facts("committed"))
    texts = [text for text in known if text.prompt and not edited(text.prompt)]
    drawn = random.Random(revision).sample(texts, min(sample, len(texts)))
    examples = [protected_texts.example(engine.renderer, text) for text in drawn]
    say(f"asking {len(examples)} questions that the base model could answer")
    outcomes = engine.judge(examples)
    generated, said = engine.answers(examples)
    results = [
        probe_row(None, "locality", example, outcome)
        for example, outcome in zip(examples, outcomes, strict=True)
    ]
    results += [
        _spoken_row(None, "locality", example, passed)
        for example, passed in zip(examples, generated, strict=True)
    ]
    store.record_results(results, revision)
    return BaseKnowledgeReport(
        score=Score(sum(outcome.passed for outcome in outcomes), len(outcomes)),
        generated=Score(sum(generated), len(generated), "generated"),
        lost=tuple(e.prompt for e, passed in zip(examples, generated, strict=True) if not passed),
        fluency=_fluency(said),
        base_fluency=_fluency([example.answer for example in examples]),
    )


def _fluency(texts: Sequence[str]) -> float | None:
    return mean(map(ngram_entropy, texts)) if texts else None


def _spoken_row(fact_id: int | None, kind: str, example: Example, passed: bool) -> ProbeRow:
    return ProbeRow(
        fact_id=fact_id,
        kind=kind,
        protocol="generated",
        prompt=example.prompt,
        expected=example.answer,
        answer=None,
        passed=passed,
    )


def _check_of(
    key: str, revision: int, outcomes: Sequence[Outcome], generated: bool
) -> RetentionCheck:
    margin = min(outcome.margin for outcome in outcomes)
    passed = generated and all(outcome.passed for outcome in outcomes)
    return RetentionCheck(key=key, revision=revision, passed=passed, margin=margin)
