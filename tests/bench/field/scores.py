"""From answers to the field's scores: each with its formula, source, protocol, n and interval.

Invariants:
- A column has one protocol: what is generated, what is teacher-forced and what is compared by
  likelihood never stand in one.
- Every method's answers are to the same questions; what changed is compared with the base model in
  the dtype in which the method's model is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rapidfuzz import fuzz

from kvedit.events import Score
from kvedit.metrics import (
    bootstrap,
    harmonic_mean,
    ngram_entropy,
    normalised,
    normalised_exact,
    rouge_l_recall,
    words,
)
from tests.bench.field.asked import Forced
from tests.bench.field.records import (
    KINDS,
    LOCALITY,
    PARAPHRASE,
    PORTABILITY,
    PROMPT,
    Question,
    Record,
)
from tests.bench.quality_scores import Change

GENERATED = "generated, normalised exact match"
UNCHANGED = "generated, the base model's answer"
CONTAINED = "generated, contains the true answer"
LIKELIHOOD = "length-normalised likelihood"
FORCED = "teacher-forced, token by token"
OVERLAP = "generated, characters in common"
ENTROPY = "generated, n-gram entropy"
CHOICE = "log-likelihood"
VERSION = 1
"""Of the definitions below: raised when one of them changes, so that no figures are mixed."""

MISSPELT = 80.0  # rapidfuzz's ratio from which on a wrong answer is taken for a misspelt right one
REPEATS = 3  # times in a row that a run of words stands in an answer that repeats itself
EXAMPLES = 10  # wrong answers that are kept


@dataclass(frozen=True, slots=True)
class Definition:
    """What a column says."""

    title: str
    protocol: str
    formula: str
    source: str


DEFINITIONS: Mapping[str, Definition] = {
    "reliability": Definition(
        "reliability", GENERATED,
        "share of trained prompts of all edits so far whose greedy answer, up to the end token, is"
        " the target", "LocFT, eval_edit_metric.py"),
    "generalization": Definition(
        "generalization", GENERATED,
        "the same of paraphrases, none of which is a trained prompt", "LocFT, eval_edit_metric.py"),
    "locality": Definition(
        "locality", UNCHANGED,
        "share of locality prompts with the same normalised answer as before the first edit",
        "EasyEdit, evaluate_utils.py, here over whole answers"),
    "harmonic": Definition(
        "harmonic mean", "of the three generated shares",
        "3 / (1/reliability + 1/generalization + 1/locality); bootstrap over records",
        "ROME, arXiv 2202.05262"),
    "portability": Definition(
        "portability", CONTAINED,
        "share of questions that need the fact whose answer has the expected text in it",
        "EasyEdit; ripple effects, arXiv 2307.12976"),
    "err": Definition(
        "ERR", GENERATED,
        "of the edits whose trained prompts were all answered right directly after the edit, the"
        " share that still are", "edit retention rate of GRACE, arXiv 2211.11031"),
    "trr": Definition(
        "TRR", CONTAINED,
        "of questions about keys that nobody edits and that the base model answers rightly, the"
        " share that is still answered rightly", "test retention rate of GRACE, arXiv 2211.11031"),
    "es": Definition(
        "ES", LIKELIHOOD, "share of trained prompts with p(target) > p(truth), each the geometric"
        " mean over its tokens", "ROME and MEMIT, eval_utils_counterfact.py"),
    "ps": Definition("PS", LIKELIHOOD, "the same of paraphrases", "the same"),
    "ns": Definition(
        "NS", LIKELIHOOD, "share of locality prompts with p(truth) > p(target)", "the same"),
    "s": Definition(
        "S", LIKELIHOOD, "harmonic mean of ES, PS, NS; bootstrap over records",
        "ROME, arXiv 2202.05262"),
    "token_reliability": Definition(
        "tokens of trained prompts", FORCED,
        "mean share of target tokens that rank first, given those before them",
        "EasyEdit, test_prediction_acc"),
    "token_generalization": Definition(
        "tokens of paraphrases", FORCED, "the same of paraphrases", "the same"),
    "token_locality": Definition(
        "tokens of locality prompts", FORCED,
        "mean share of the true answer's places with the same token first as before the edits",
        "EasyEdit, compute_locality_quality"),
    "rouge_l": Definition(
        "ROUGE-L recall", OVERLAP,
        "longest common subsequence of characters / characters of the target, mean over paraphrases"
        " and trained prompts", "Lin 2004; rapidfuzz LCSseq"),
    "fluency": Definition(
        "fluency, bits", ENTROPY,
        "mean of weighted bigram and trigram entropies of the answers about unedited keys",
        "ROME and MEMIT, eval_utils_counterfact.py"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a model answers at one time, in the order of the questions of the edits so far.

    ``new`` and ``old`` are the target and the truth of a question's record, teacher-forced, None
    where there is no truth or the question does not need it; ``known`` answers about unedited keys.
    """

    answers: tuple[str, ...]
    new: tuple[Forced | None, ...]
    old: tuple[Forced | None, ...]
    known: tuple[str, ...]
    right: tuple[bool, ...] = ()
    seconds: float = 0.0

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> State:
        """A state that was written as JSON."""

        def forced(row: Any) -> Forced | None:
            return row and Forced(tuple(row["tokens"]), tuple(row["predicted"]), row["nats"])

        return cls(
            answers=tuple(document["answers"]), new=tuple(map(forced, document["new"])),
            old=tuple(map(forced, document["old"])), known=tuple(document["known"]),
            right=tuple(document["right"]), seconds=document["seconds"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over ``n`` values or records with its 95% interval (bootstrap); None of nothing."""

    value: float | None
    interval: tuple[float, float]
    n: int
    protocol: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A wrong answer to a trained prompt or a paraphrase, and of which kind it is."""

    kind: str
    prompt: str
    answer: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A method's scores after ``after`` edits; ``DEFINITIONS`` says what each is.

    ``at_once`` counts edits right directly after they were made, where they are made one by one.
    """

    after: int
    reliability: Score
    generalization: Score
    locality: Score
    portability: Score
    harmonic: Mean
    at_once: Score
    err: Score
    trr: Score
    es: Score
    ps: Score
    ns: Score
    s: Mean
    token_reliability: Mean
    token_generalization: Mean
    token_locality: Mean
    rouge_l: Mean
    fluency: Mean
    failures: Mapping[str, int] = field(default_factory=dict)
    misses: tuple[Failure, ...] = ()
    abilities: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """Questions with their answers, judged: the values of each score by record."""

    records: Sequence[Record]
    questions: Sequence[Question]
    state: State
    base: State

    def _of(self, kind: str) -> list[int]:
        return [at for at, question in enumerate(self.questions) if question.kind == kind]

    def generated(self, kind: str) -> list[tuple[int, float]]:
        """Record and whether the answer is right, question by question."""
        return [(self.questions[at].record, float(self._right(at))) for at in self._of(kind)]

    def _right(self, at: int) -> bool:
        question, answer = self.questions[at], self.state.answers[at]
        if question.kind == LOCALITY:
            return normalised_exact(answer, self.base.answers[at])
        expected = question.expected or ""
        contained = question.kind == PORTABILITY
        return contains(answer, expected) if contained else normalised_exact(answer, expected)

    def preferred(self, kind: str) -> list[tuple[int, float]]:
        """Record and whether the right one of target and truth is likelier."""
        values = []
        for at in self._of(kind):
            new, old = self.state.new[at], self.state.old[at]
            if new is not None and old is not None:
                right = old.nats < new.nats if kind == LOCALITY else new.nats < old.nats
                values.append((self.questions[at].record, float(right)))
        return values

    def tokens(self, kind: str) -> list[tuple[int, float]]:
        """Record and share of tokens that are right, or unchanged for locality."""
        values = []
        for at in self._of(kind):
            side = "old" if kind == LOCALITY else "new"
            now, before = getattr(self.state, side)[at], getattr(self.base, side)[at]
            if now is not None and before is not None:
                wanted = before.predicted if kind == LOCALITY else now.tokens
                pairs = list(zip(now.predicted, wanted, strict=True))
                share = sum(one == other for one, other in pairs) / max(1, len(pairs))
                values.append((self.questions[at].record, share))
        return values

    def overlap(self) -> list[tuple[int, float]]:
        """Record and ROUGE-L recall of the answers to trained prompts and paraphrases."""
        return [
            (question.record, rouge_l_recall(self.state.answers[at], question.expected or ""))
            for at, question in enumerate(self.questions)
            if question.kind in (PROMPT, PARAPHRASE)
        ]

    def edits_right(self) -> list[bool]:
        """Of each record whether all trained prompts are answered rightly."""
        wrong = {record for record, right in self.generated(PROMPT) if not right}
        return [at not in wrong for at in range(len(self.records))]

    def failures(self) -> list[Failure]:
        """The wrong answers to trained prompts and paraphrases."""
        others = {normalised(record.target) for record in self.records}
        found = []
        for kind in (PROMPT, PARAPHRASE):
            for at in (at for at in self._of(kind) if not self._right(at)):
                question, answer = self.questions[at], self.state.answers[at]
                record = self.records[question.record]
                before = [self.base.answers[at], *([record.truth] if record.truth else [])]
                sort = failure_kind(answer, record.target, before, others)
                found.append(Failure(kind=sort, prompt=question.prompt, answer=answer,
                                     expected=record.target))  # fmt: skip
        return found


def judge(
    records: Sequence[Record], asked: Sequence[Question], state: State, base: State, *,
    known: Sequence[Record], at_once: Sequence[bool] = (), abilities: tuple[Change, ...] = (),
) -> Point:  # fmt: skip
    """The scores of the edits ``records``; ``base`` is the base model's state, which may have more
    questions, those of later records, behind.
    """
    judged = Judged(records, asked, state, base)
    shares = {kind: judged.generated(kind) for kind in KINDS}
    preferred = {kind: judged.preferred(kind) for kind in KINDS}
    three = (PROMPT, PARAPHRASE, LOCALITY)
    held = [still for still, once in zip(judged.edits_right(), at_once, strict=False) if once]
    failures = judged.failures()
    kinds = [failure.kind for failure in failures]
    return Point(
        after=len(records),
        reliability=_score(shares[PROMPT], GENERATED),
        generalization=_score(shares[PARAPHRASE], GENERATED),
        locality=_score(shares[LOCALITY], UNCHANGED),
        portability=_score(shares[PORTABILITY], CONTAINED),
        harmonic=_harmonic([shares[kind] for kind in three], "of generated shares"),
        at_once=Score(sum(at_once), len(at_once), GENERATED),
        err=Score(sum(held), len(held), GENERATED), trr=retention(known, state, base),
        es=_score(preferred[PROMPT], LIKELIHOOD), ps=_score(preferred[PARAPHRASE], LIKELIHOOD),
        ns=_score(preferred[LOCALITY], LIKELIHOOD),
        s=_harmonic([preferred[kind] for kind in three], LIKELIHOOD),
        token_reliability=mean(judged.tokens(PROMPT), FORCED),
        token_generalization=mean(judged.tokens(PARAPHRASE), FORCED),
        token_locality=mean(judged.tokens(LOCALITY), FORCED),
        rouge_l=mean(judged.overlap(), OVERLAP),
        fluency=mean([(at, ngram_entropy(text)) for at, text in enumerate(state.known)], ENTROPY),
        failures={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        misses=tuple(failures[:EXAMPLES]), abilities=abilities,
    )  # fmt: skip


def retention(known: Sequence[Record], state: State, base: State) -> Score:
    """TRR: of what the base model answered rightly about unedited keys, how much still is."""
    kept = [
        contains(after, record.truth or "")
        for record, before, after in zip(known, base.known, state.known, strict=True)
        if contains(before, record.truth or "")
    ]
    return Score(sum(kept), len(kept), CONTAINED)


def contains(answer: str, expected: str) -> bool:
    """Whether an answer has a text in it as whole words, both normalised."""
    wanted, said = words(normalised(expected)), words(normalised(answer))
    size = len(wanted)
    return bool(wanted) and any(
        said[at : at + size] == wanted for at in range(len(said) - size + 1)
    )


def failure_kind(
    answer: str, expected: str, before: Iterable[str], targets: Iterable[str]
) -> str:  # fmt: skip
    """What is wrong with an answer, the first that holds of: empty, repeats itself, too long,
    the old answer, another fact's text, misspelt, other.

    ``before`` are the base model's answer and the truth, ``targets`` those of all facts.
    """
    said, wanted = normalised(answer), normalised(expected)
    if not said:
        return "empty"
    if repeats_itself(said):
        return "repeats itself"
    if wanted and words(said)[: len(words(wanted))] == words(wanted):
        return "too long"
    if any(contains(said, old) or said == normalised(old) for old in before):
        return "the old answer"
    if any(other != wanted and contains(said, other) for other in targets):
        return "another fact's text"
    return "misspelt" if fuzz.ratio(said, wanted) >= MISSPELT else "other"


def repeats_itself(text: str) -> bool:
    """Whether a run of words, of more than one character in all, comes three times in a row."""
    row = words(text)
    return any(
        run * (REPEATS - 1) == row[at + size : at + REPEATS * size] and len("".join(run)) > 1
        for size in range(1, len(row) // REPEATS + 1)
        for at in range(len(row) - REPEATS * size + 1)
        for run in [row[at : at + size]]
    )


def _score(values: Sequence[tuple[int, float]], protocol: str) -> Score:
    return Score(int(sum(value for _, value in values)), len(values), protocol)


def mean(values: Sequence[tuple[int, float]], protocol: str) -> Mean:
    """The mean of values, each with its record, and its interval over records."""
    return _statistic([values], lambda lists: fmean(lists[0]), protocol)


def _harmonic(lists: Sequence[Sequence[tuple[int, float]]], protocol: str) -> Mean:
    return _statistic(lists, lambda some: harmonic_mean([fmean(one) for one in some]), protocol)


def _statistic(
    lists: Sequence[Sequence[tuple[int, float]]],
    value_of: Callable[[list[list[float]]], float],
    protocol: str,
) -> Mean:
    """A statistic of lists of values, each with its record, and its interval over records."""
    by_record = [_by_record(values) for values in lists]
    shared = sorted(set.intersection(*(set(own) for own in by_record))) if by_record else []
    if not shared:
        return Mean(value=None, interval=(0.0, 1.0), n=0, protocol=protocol)

    def of(records: Sequence[int]) -> float:
        return value_of([[v for at in records for v in own[at]] for own in by_record])

    def draw(rng: random.Random) -> float:
        return of(rng.choices(shared, k=len(shared)))

    whole = value_of([[value for _, value in values] for values in lists])
    return Mean(value=whole, interval=bootstrap(draw), n=len(shared), protocol=protocol)


def _by_record(values: Sequence[tuple[int, float]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record, value in values:
        found.setdefault(record, []).append(value)
    return found
