"""Asking a model what it holds: the measures that all benchmarks share.

Invariants:
- What counts is free greedy generation; teacher-forced recall stands beside it, labelled.
- A model is asked the same way, whatever taught it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvedit import probes
from kvedit.events import Score
from kvedit.prompts import Example, Renderer


@dataclass(frozen=True, slots=True)
class Both:
    """One measure under both protocols."""

    generated: Score
    forced: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What holds after a number of facts.

    ``tried`` are the facts so far, ``committed`` those among them that were committed (``ERR``);
    each counts only if all its training phrasings are recalled.  ``phrasings`` are the
    never-trained phrasings of the committed facts.
    """

    method: str
    after: int
    tried: Both
    committed: Both
    phrasings: Both
    poets: Both
    relations: Both


@dataclass(frozen=True, slots=True)
class Lesson:
    """A fact that was taught: what it was trained on, what it was not, and whether it was kept."""

    trained: Sequence[Example]
    phrasings: Sequence[Example]
    kept: bool


@dataclass(frozen=True, slots=True)
class Student:
    """A model that is asked, whatever taught it."""

    model: Any
    renderer: Renderer

    def spoken(self, examples: Sequence[Example]) -> list[bool]:
        """Exact recall by free greedy generation, the end token included."""
        limit = max((len(e.ids) - e.start for e in examples), default=0) + 1
        end = self.renderer.end
        prefixes = [e.ids[: e.start] for e in examples]
        rows = probes.generate(self.model, prefixes, end=end, limit=limit)
        return [
            (*row, end)[: len(e.ids) - e.start] == e.ids[e.start :]
            for row, e in zip(rows, examples, strict=True)
        ]

    def ask(self, examples: Sequence[Example]) -> tuple[list[bool], list[bool]]:
        """Recall under both protocols: generated, teacher-forced."""
        forced = [outcome.passed for outcome in probes.recall(self.model, examples)]
        return self.spoken(examples), forced


@dataclass(frozen=True, slots=True)
class Kept:
    """The base facts that the model answered before the first edit."""

    poets: Sequence[Example]
    relations: Sequence[Example]


def marks(count: int) -> list[int]:
    """After how many facts to measure: 1, 2, 5, 10, 20, 50, ... and the last."""
    steps = {digit * 10**power for power in range(6) for digit in (1, 2, 5)}
    return sorted({mark for mark in steps if mark < count} | {count})


def measure(
    method: str, after: int, student: Student, lessons: Sequence[Lesson], kept: Kept
) -> Point:
    """Ask a model all that it should still know."""
    held = [lesson.kept for lesson in lessons]
    spoken, forced = _whole(student, lessons)
    phrasings = [e for lesson in lessons if lesson.kept for e in lesson.phrasings]
    return Point(
        method=method,
        after=after,
        tried=both(spoken, forced),
        committed=both(_only(spoken, held), _only(forced, held)),
        phrasings=both(*student.ask(phrasings)),
        poets=both(*student.ask(kept.poets)),
        relations=both(*student.ask(kept.relations)),
    )


def _whole(student: Student, lessons: Sequence[Lesson]) -> tuple[list[bool], list[bool]]:
    """For each lesson whether all its training prompts are recalled, under both protocols."""
    answers = student.ask([e for lesson in lessons for e in lesson.trained])
    found = []
    for flat in answers:
        rest = iter(flat)
        found.append([all(list(islice(rest, len(lesson.trained)))) for lesson in lessons])
    return found[0], found[1]


def _only(values: Sequence[bool], chosen: Sequence[bool]) -> list[bool]:
    return [value for value, take in zip(values, chosen, strict=True) if take]


def both(spoken: Sequence[bool], forced: Sequence[bool]) -> Both:
    return Both(Score(sum(spoken), len(spoken), "generated"), Score(sum(forced), len(forced)))
