"""Checks of what a model still answers: the committed facts (ERR), and what it knew before (TRR).

Invariants:
- Every probe is recorded in the store, under the protocol that it was asked by; where the store
  cannot be written, the check is made all the same and a warning says that it was not recorded.
- A check changes no weight; a repair is an edit like any other.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from kvedit.editing.evaluation import probe_row
from kvedit.editing.group_edit import GroupEditor
from kvedit.editing.study import answers
from kvedit.editing.study.examples import StudyExamples
from kvedit.errors import CorruptStoreError, DiskFullError, NotWritableError
from kvedit.events import EditReport, RetentionCheck, Score, Warning_
from kvedit.facts.keys import facts_text, naming
from kvedit.metrics import ngram_entropy
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome
from kvedit.replay import protected_texts
from kvedit.revisions import base_model
from kvedit.revisions.session import Session
from kvedit.store import integrity
from kvedit.store.rows import FactRow, ProbeRow

REPAIR_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseKnowledgeReport:
    """TRR: of what the base model knew, how much is still answered exactly.

    ``generated`` counts free answers, ``score`` teacher-forced ones; ``lost`` are the questions
    whose free answer is another now.  ``fluency`` is the mean n-gram entropy of the free answers in
    bits (``metrics.ngram_entropy``), ``base_fluency`` that of the base model's answers to the same
    questions; None where nothing was asked.
    """

    score: Score
    generated: Score
    lost: tuple[str, ...] = ()
    fluency: float | None = None
    base_fluency: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """How a verification went.

    ``score`` counts facts recalled under all their training prompts (teacher-forced, numerical ties
    decided by free generation), ``generated`` facts whose free answer to one of them is exact.
    ``answers`` counts the facts' held-out questions that were answered freely, whatever was
    recalled; ``perturbation_gap`` is how many times as perplexing the texts are in another order
    (the geometric mean).  ``base`` is how much of the base model's own knowledge is left, if that
    was asked.
    """

    revision: int
    checks: tuple[RetentionCheck, ...]
    score: Score
    generated: Score
    answers: Score
    perturbation_gap: float | None = None
    base: BaseKnowledgeReport | None = None
    repaired: tuple[EditReport, ...] = ()
    seconds: float = 0.0


def verify(
    session: Session,
    groups: GroupEditor,
    rows: Sequence[FactRow],
    *,
    repair: bool = False,
    base_knowledge: int = 0,
) -> VerifyReport:
    """Check facts; ``repair`` trains again what was lost, ``base_knowledge`` is how many questions
    to ask besides of what the model knew before the first edit.
    """
    began = time.monotonic()
    session.require_texts()
    if repair:
        _require_sound(session)
    report = check_facts(session, rows)
    repaired: list[EditReport] = []
    for _ in range(REPAIR_ROUNDS if repair else 0):
        lost_keys = {check.key for check in report.checks if not check.passed}
        lost = [row for row in rows if row.fact.key in lost_keys]
        if not lost:
            break
        repaired += groups.repair(lost)
        report = check_facts(session, rows)
    base = check_base_knowledge(session, base_knowledge) if base_knowledge else None
    seconds = time.monotonic() - began
    return replace(report, base=base, repaired=tuple(repaired), seconds=seconds)


def _require_sound(session: Session) -> None:
    """Raise CorruptStoreError if ``doctor`` would fault the store: a repair would train that in."""
    session.say("checking the files of the store, in case something has to be repaired")
    findings = [*integrity.check(session.store), base_model.check(session.store)]
    for finding in findings:
        if finding.level == "error":
            raise CorruptStoreError(
                f"nothing is repaired in a damaged store: {finding.what}",
                hint="Run `kvedit doctor`.",
            )


def check_facts(session: Session, rows: Sequence[FactRow]) -> VerifyReport:
    """Probe facts under all training prompts, and generate one answer each besides."""
    engine, revision = session.engine, session.revision
    examples = [engine.examples(row.fact) for row in rows]
    session.say(f"checking {facts_text(len(rows))}")
    outcomes = iter(engine.judge([example for of_fact in examples for example in of_fact]))
    rng = random.Random(revision)
    asked = [rng.choice(of_fact) for of_fact in examples]
    session.say("generating an answer of each")
    generated = engine.generated_recall(asked)
    answered = _held_out_answers(session, rows)
    checks, results, recalled = [], list(answered), []
    for row, of_fact, question, exact in zip(rows, examples, asked, generated, strict=True):
        probed = [(example, next(outcomes)) for example in of_fact]
        results += [probe_row(row.id, "retention", *probe) for probe in probed]
        results.append(_generated_row(row.id, "retention", question, exact))
        recalled.append(all(outcome.passed for _, outcome in probed))
        check = _check(row.fact.key, revision, [outcome for _, outcome in probed], exact)
        of_row = [one for one in answered if one.fact_id == row.id]
        checks.append(replace(check, answers=answers.score(of_row)))
        session.emit(checks[-1])
    _record(session, results)
    gaps = answers.perturbation_gaps(engine, [row.fact for row in rows])
    return VerifyReport(
        revision=revision, checks=tuple(checks), score=Score(sum(recalled), len(recalled)),
        generated=Score(sum(generated), len(generated), "generated"),
        answers=answers.score(answered), perturbation_gap=answers.mean_gap(gaps),
    )  # fmt: skip


def _held_out_answers(session: Session, rows: Sequence[FactRow]) -> list[ProbeRow]:
    """The facts' held-out questions, freely answered."""
    study = StudyExamples(session)
    probes = [(row.id, example) for row in rows for example in study.probes(row.fact)]
    if probes:
        session.say(f"asking {len(probes)} held-out questions")
    return answers.ask(session.engine, probes)


def check_base_knowledge(session: Session, sample: int) -> BaseKnowledgeReport:
    """Ask some of what the base model knew, but nothing that names an edited fact: such answers are
    meant to change.  The same revision is asked the same questions.
    """
    engine, store, revision = session.engine, session.store, session.revision
    known = session.protection.known_texts()
    edited = naming(store.names())
    texts = [text for text in known if text.prompt and not edited(text.prompt)]
    drawn = random.Random(revision).sample(texts, min(sample, len(texts)))
    examples = [protected_texts.example(engine.renderer, text) for text in drawn]
    session.say(f"asking {len(examples)} questions that the base model could answer")
    outcomes = engine.judge(examples)
    exact, given = engine.answers(examples)
    probed = zip(examples, outcomes, strict=True)
    results = [probe_row(None, "locality", *probe) for probe in probed]
    answered = list(zip(examples, exact, strict=True))
    results += [_generated_row(None, "locality", *pair) for pair in answered]
    _record(session, results)
    return BaseKnowledgeReport(
        score=Score(sum(outcome.passed for outcome in outcomes), len(outcomes)),
        generated=Score(sum(exact), len(exact), "generated"),
        lost=tuple(example.prompt for example, passed in answered if not passed),
        fluency=_fluency(given),
        base_fluency=_fluency([example.answer for example in examples]),
    )


def _record(session: Session, results: Sequence[ProbeRow]) -> None:
    try:
        session.store.record_results(results, session.revision)
    except (NotWritableError, DiskFullError) as error:
        text = f"these results are not recorded: {error.message}"
        session.emit(Warning_(text=text, code="not-recorded"))


def _fluency(texts: Sequence[str]) -> float | None:
    return mean(map(ngram_entropy, texts)) if texts else None


def _generated_row(fact_id: int | None, kind: str, example: Example, passed: bool) -> ProbeRow:
    return ProbeRow(
        fact_id=fact_id, kind=kind, protocol="generated", prompt=example.prompt,
        expected=example.answer, answer=None, passed=passed,
    )  # fmt: skip


def _check(key: str, revision: int, outcomes: Sequence[Outcome], generated: bool) -> RetentionCheck:
    margin = min(outcome.margin for outcome in outcomes)
    passed = generated and all(outcome.passed for outcome in outcomes)
    return RetentionCheck(key=key, revision=revision, passed=passed, margin=margin)
