"""From what models said to scores: before against after, with intervals.

Invariants:
- Differences are paired: the same question before and after.
- A method is compared with what the base model said in the same run, never with a figure from
  elsewhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from kvedit.bench.speed import EditTime
from kvedit.events import Score
from kvedit.metrics import Z_95, bootstrap, words
from tests.bench.asking import Both
from tests.bench.quality_material import Material, Phrasing, tasks_of
from tests.bench.quality_probes import FIRST_TOKENS, Recalled, State

if TYPE_CHECKING:
    from tests.bench.quality import Part

GRAM = 8  # words, or Chinese characters, that make a leak
EXAMPLES = 10  # answers that are kept of each kind
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A task of multiple choice before and after; the difference and its interval are shares.

    ``interval`` is the 95% interval of Agresti and Min for paired shares (Statistics in Medicine 24
    (2005) 729-740): Wald's, with half a pair added to each of the four cells.
    """

    task: str
    before: Score
    after: Score
    gained: int
    lost: int
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Perplexity of natural text, and its ratio to the base model's with a 95% interval, bootstrap
    over the texts.
    """

    tokens: int
    value: float
    ratio: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unexpected:
    """An answer that is kept to be looked at."""

    prompt: str
    answer: str
    expected: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodScores:
    """What one method came to; seconds and steps are those of all facts, ``peak`` is in bytes.

    ``kept`` counts facts that are recalled under all their trained phrasings at the end, of all;
    ``retained`` the same of those that counted as learned when they were trained (ERR).
    ``unseen_own`` leaves out phrasings in other languages.  ``likeness`` is the median share of
    characters that answers to unseen phrasings have in common with the text, ``near_miss`` the
    median of those that are not exact.  ``leaked`` are answers with ``GRAM`` words in a row of a
    description, to general questions and about keys never taught; ``leaked_keys`` counts keys.
    """

    method: str
    learned: Score
    outcomes: Mapping[str, int]
    trained: Both
    unseen: Both
    unseen_own: Both
    kept: Both
    retained: Both
    likeness: float | None
    near_miss: float | None
    first_tokens: Score
    whole: Score
    leaked: Score
    leaked_untaught: Score
    leaked_keys: Score
    perplexity: Perplexity | None
    abilities: tuple[Change, ...]
    seconds: float
    steps: int
    peak: int
    asking_seconds: float
    edits: tuple[EditTime, ...] = ()
    misses: tuple[Unexpected, ...] = ()
    leaks: tuple[Unexpected, ...] = ()


def scores(material: Material, base: State, counted: Sequence[int], part: Part) -> MethodScores:
    """The scores of a part; ``counted`` are the general questions that count, by index."""
    state, learned = part.state, part.learned
    if not learned:  # the base model is not asked for the facts
        material = replace(material, trained=(), unseen=())
    said = [(material.questions[at], state.general_answers[at]) for at in counted]
    about = [
        (prompt, text)
        for (_, prompt), text in zip(material.untaught, state.untaught_answers, strict=True)
    ]
    grams = {gram for fact in material.facts for gram in word_grams(fact.description)}
    leaks, untaught = leaking(said, grams), leaking(about, grams)
    keys = {key for key, prompt in material.untaught if prompt in {p for p, _ in untaught}}
    own = [not one.other for one in material.unseen]
    likeness = state.unseen.likeness
    missed = [
        value for value, exact in zip(likeness, state.unseen.generated, strict=True) if not exact
    ]
    return MethodScores(
        method=part.name, learned=Score(sum(learned), len(learned)), outcomes=part.outcomes,
        trained=_both(state.trained), unseen=_both(state.unseen),
        unseen_own=_both(state.unseen, own), kept=_facts(material, state.trained),
        retained=_facts(material, state.trained, learned),
        likeness=median(likeness) if likeness else None,
        near_miss=median(missed) if missed else None,
        first_tokens=_unchanged(base, state, counted, FIRST_TOKENS),
        whole=_unchanged(base, state, counted, None),
        leaked=Score(len(leaks), len(said), "generated"),
        leaked_untaught=Score(len(untaught), len(about), "generated"),
        leaked_keys=Score(len(keys), len({key for key, _ in material.untaught}), "generated"),
        perplexity=_perplexity(base, state), abilities=_changes(material, base, state),
        seconds=part.seconds, steps=part.steps, peak=part.peak, asking_seconds=state.seconds,
        edits=part.edits, misses=_misses(material, state.unseen, material.unseen),
        leaks=tuple(Unexpected(prompt=p, answer=a) for p, a in (*leaks, *untaught))[:EXAMPLES],
    )  # fmt: skip


def _both(recalled: Recalled, taken: Sequence[bool] | None = None) -> Both:
    """Of all phrasings, or of those taken."""

    def score(values: Sequence[bool], protocol: str) -> Score:
        some = (
            [v for v, take in zip(values, taken, strict=True) if take]
            if taken and values
            else values
        )
        return Score(sum(some), len(some), protocol)

    return Both(score(recalled.generated, "generated"), score(recalled.forced, "teacher-forced"))


def _facts(material: Material, recalled: Recalled, learned: Sequence[bool] | None = None) -> Both:
    """Facts recalled under all phrasings that were asked, of all or of those learned."""

    def score(values: Sequence[bool], protocol: str) -> Score:
        lost = {p.fact for p, value in zip(material.trained, values, strict=True) if not value}
        count = len(material.facts) if values else 0
        taken = [at for at in range(count) if learned is None or learned[at]]
        return Score(sum(at not in lost for at in taken), len(taken), protocol)

    return Both(score(recalled.generated, "generated"), score(recalled.forced, "teacher-forced"))


def _unchanged(base: State, state: State, counted: Sequence[int], size: int | None) -> Score:
    """Answers whose first ``size`` tokens are the base model's."""
    same = sum(base.general[at][:size] == state.general[at][:size] for at in counted)
    return Score(same, len(counted), "generated")


def word_grams(text: str) -> set[tuple[str, ...]]:
    """All runs of ``GRAM`` words or Chinese characters."""
    row = words(text)
    return {tuple(row[at : at + GRAM]) for at in range(len(row) - GRAM + 1)}


def leaking(said: Iterable[tuple[str, str]], grams: set[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The prompts and answers that have one of these runs."""
    return [(prompt, answer) for prompt, answer in said if word_grams(answer) & grams]


def _misses(
    material: Material, recalled: Recalled, phrasings: Sequence[Phrasing]
) -> tuple[Unexpected, ...]:
    """Answers to unseen phrasings that are not exact, the nearest ones first."""
    rows = zip(phrasings, recalled.generated, recalled.answers, recalled.likeness, strict=True)
    missed = [(like, one, said) for one, exact, said, like in rows if not exact]
    missed.sort(key=lambda row: row[0], reverse=True)
    return tuple(
        Unexpected(prompt=one.prompt, answer=said, expected=material.facts[one.fact].description)
        for _, one, said in missed[:EXAMPLES]
    )


def _perplexity(base: State, state: State) -> Perplexity | None:
    """Over the texts together; the ratio's interval by resampling texts."""
    rows = [
        (before, after, n)
        for (before, _), (after, n) in zip(base.losses, state.losses, strict=True)
    ]
    if not rows:
        return None

    def ratio(some: Sequence[tuple[float, float, int]]) -> float:
        return math.exp(sum(a - b for b, a, _ in some) / sum(n for *_, n in some))

    def draw(rng: random.Random) -> float:
        return ratio(rng.choices(rows, k=len(rows)))

    tokens = sum(n for *_, n in rows)
    value = math.exp(sum(after for _, after, _ in rows) / tokens)
    return Perplexity(tokens=tokens, value=value, ratio=ratio(rows), interval=bootstrap(draw))


def _changes(material: Material, base: State, state: State) -> tuple[Change, ...]:
    """Every task, and all together."""
    tasks = tasks_of(material.abilities)
    names = (*tasks, ALL) if len(tasks) > 1 else tasks
    pairs = list(zip(material.abilities, base.right, state.right, strict=True))
    return tuple(
        change(task, [(b, a) for one, b, a in pairs if task in (one.task, ALL)]) for task in names
    )


def change(task: str, pairs: Sequence[tuple[bool, bool]]) -> Change:
    """Right before and after, pair by pair."""
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    n = len(pairs)
    center = (gained - lost) / (n + 2)
    spread = (
        Z_95 * math.sqrt(max(0.0, gained + lost + 1 - (gained - lost) ** 2 / (n + 2))) / (n + 2)
    )
    return Change(
        task=task, gained=gained, lost=lost, difference=(gained - lost) / n,
        before=Score(sum(before for before, _ in pairs), n, "log-likelihood"),
        after=Score(sum(after for _, after in pairs), n, "log-likelihood"),
        interval=(max(-1.0, center - spread), min(1.0, center + spread)),
    )  # fmt: skip


def seconds_a_fact(method: MethodScores) -> float | None:
    """The mean; None for a method that trained nothing."""
    return method.seconds / method.learned.n if method.learned.n else None


def median_seconds(method: MethodScores) -> float | None:
    """The median over single edits; None where facts are trained together."""
    return median(edit.seconds for edit in method.edits) if method.edits else None


def mean_steps(method: MethodScores) -> float | None:
    """Updates a fact, the mean."""
    return method.steps / method.learned.n if method.learned.n else None
