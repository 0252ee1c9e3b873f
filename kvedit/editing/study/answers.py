"""How much of a fact can be used: its held-out questions by free generation, and the gap between
its text and the same text in another order.

Invariants:
- An answer passes when it contains the expected one, in normal form, within a length that a whole
  recitation seldom has.
- Nothing here decides whether an edit is committed.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from kvedit.events import Score
from kvedit.facts.fact import Fact
from kvedit.facts.keys import contains_answer
from kvedit.facts.parts import sentences
from kvedit.model.prompts import Example
from kvedit.replay.protected_texts import mean_losses
from kvedit.store.rows import ProbeRow
from kvedit.training.engine import Engine

KIND = "portability"
PROTOCOL = "generated"
SLACK = 24  # tokens that an answer may have more than the expected one


def ask(engine: Engine, probes: Sequence[tuple[int, Example]]) -> list[ProbeRow]:
    """Held-out questions, each with its fact's id, answered freely and greedily."""
    examples = [example for _, example in probes]
    limits = [len(example.ids) - example.start + SLACK for example in examples]
    prefixes = [example.ids[: example.start] for example in examples]
    longest = max(limits, default=0)
    rows = engine.proceed(prefixes, end=engine.renderer.stops, limit=longest) if probes else []
    answers = [
        engine.renderer.answer_text(row[:limit]) for row, limit in zip(rows, limits, strict=True)
    ]
    return [
        ProbeRow(
            fact_id=fact_id, kind=KIND, protocol=PROTOCOL, prompt=example.prompt,
            expected=example.answer, answer=answer, passed=contains_answer(answer, example.answer),
        )
        for (fact_id, example), answer in zip(probes, answers, strict=True)
    ]  # fmt: skip


def score(rows: Sequence[ProbeRow]) -> Score:
    """How many of the held-out questions among some results were answered."""
    passed = [row.passed for row in rows if row.kind == KIND]
    return Score(sum(passed), len(passed), PROTOCOL)


def perturbation_gaps(engine: Engine, facts: Sequence[Fact]) -> list[float | None]:
    """For each fact the perplexity of its text with the sentences in another order, over that of
    the text, both under its first training prompt; None for a text of one sentence.

    A text that was learned by rote is likely in its own order alone: the gap is large.
    """
    texts = [engine.examples(fact)[0] for fact in facts]
    orders = [reordered(fact) for fact in facts]
    pairs = [
        (at, text, engine.renderer.example(text.prompt, order))
        for at, (text, order) in enumerate(zip(texts, orders, strict=True))
        if order and len(text.ids) < engine.renderer.context - SLACK
    ]
    losses = mean_losses(engine.base, [e for _, *pair in pairs for e in pair]).tolist()
    gaps: list[float | None] = [None] * len(facts)
    for number, (at, *_) in enumerate(pairs):
        own, other = losses[2 * number : 2 * number + 2]
        gaps[at] = math.exp(min(other - own, 700.0))
    return gaps


def mean_gap(gaps: Sequence[float | None]) -> float | None:
    """The geometric mean of those that were measured."""
    logs = [math.log(gap) for gap in gaps if gap is not None]
    return math.exp(fmean(logs)) if logs else None


def reordered(fact: Fact) -> str:
    """The description with its second half of sentences first; empty for one sentence."""
    whole = sentences(fact.description)
    half = (len(whole) + 1) // 2
    space = " " if fact.lang == "en" else ""
    return space.join([*whole[half:], *whole[:half]]) if len(whole) > 1 else ""
