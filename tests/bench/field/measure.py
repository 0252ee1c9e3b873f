"""Asking a model everything at one time.

Invariant: all methods are asked the same questions in the same order, by the same protocols.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvedit.events import Event
from tests.bench.field.asked import Asked, Forced
from tests.bench.field.records import LOCALITY, PORTABILITY, Question, Record, questions
from tests.bench.field.scores import State
from tests.bench.quality_material import Choice

Emit = Callable[[Event], None]
MORE_TOKENS = 16  # beyond the longest target's: enough to see that an answer goes on
KNOWN_TOKENS = 32  # of answers about unedited keys


@dataclass(frozen=True, slots=True)
class Material:
    """What is edited and asked: ``known`` are records that nobody edits."""

    records: tuple[Record, ...]
    known: tuple[Record, ...]
    abilities: tuple[Choice, ...]


def ask(
    asked: Asked, material: Material, count: int, emit: Emit, *, abilities: bool = False
) -> State:
    """Ask about the first ``count`` records, the unedited keys, and the choices where wanted."""
    began = time.monotonic()
    records = material.records[:count]
    asked_questions = questions(records)
    limit = answer_limit(asked, records)
    rows = material.abilities if abilities else ()
    return State(
        answers=tuple(asked.answers([one.prompt for one in asked_questions], limit)),
        new=_forced(asked, asked_questions, [_new(one, records) for one in asked_questions]),
        old=_forced(asked, asked_questions, [_old(one, records) for one in asked_questions]),
        known=tuple(asked.answers([one.prompts[0] for one in material.known], KNOWN_TOKENS)),
        right=asked.choose(rows, emit),
        seconds=time.monotonic() - began,
    )  # fmt: skip


def answer_limit(asked: Asked, records: Sequence[Record]) -> int:
    """Tokens that an answer may have."""
    longest = max((len(asked.renderer.tokens(record.target)) for record in records), default=0)
    return longest + MORE_TOKENS


def _new(question: Question, records: Sequence[Record]) -> str | None:
    """The target, where a question is scored by likelihood."""
    return None if question.kind == PORTABILITY else records[question.record].target


def _old(question: Question, records: Sequence[Record]) -> str | None:
    """The true answer; of a locality question its own."""
    if question.kind == PORTABILITY:
        return None
    return question.expected if question.kind == LOCALITY else records[question.record].truth


def _forced(
    asked: Asked, asked_questions: Sequence[Question], answers: Sequence[str | None]
) -> tuple[Forced | None, ...]:
    pairs = [
        (question.prompt, answer)
        for question, answer in zip(asked_questions, answers, strict=True)
        if answer is not None
    ]
    rest = iter(asked.forced(pairs))
    return tuple(None if answer is None else next(rest) for answer in answers)
