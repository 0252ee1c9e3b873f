"""Asking a model what it holds: the measures that all benchmarks share.

Invariants:
- What counts is free greedy generation; teacher-forced recall stands beside it, labelled.
- A model is asked the same way, whatever trained it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from kvedit.events import Score
from kvedit.model import generation, scoring
from kvedit.model.prompts import Example, Renderer
from kvedit.training.engine import Engine


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
    never-trained phrasings of the committed facts.  ``asked`` is how many phrasings of each kind
    each fact was asked by generation (None: all of them), ``seconds`` what a fact took so far.
    """

    method: str
    after: int
    tried: Both
    committed: Both
    phrasings: Both
    poets: Both
    relations: Both
    any_poets: Both
    asked: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A fact that was trained: what it was trained on, what it was not, and whether it was kept."""

    trained: Sequence[Example]
    phrasings: Sequence[Example]
    kept: bool
    key: str = ""


@dataclass(frozen=True, slots=True)
class Recalled:
    """For each task whether all its training phrasings that were asked are recalled."""

    generated: Sequence[bool]
    forced: Sequence[bool]


@dataclass(frozen=True, slots=True)
class AskedModel:
    """A model that is asked, whatever trained it."""

    model: Any
    renderer: Renderer

    def generated(self, examples: Sequence[Example]) -> list[bool]:
        """Exact recall by free greedy generation, the end token included."""
        proceed = partial(generation.generate, self.model)
        return generation.generated_recall(examples, self.renderer.end, proceed)[0]

    def ask(self, examples: Sequence[Example]) -> tuple[list[bool], list[bool]]:
        """Recall under both protocols: generated, teacher-forced."""
        return self.generated(examples), self.forced(examples)

    def forced(self, examples: Sequence[Example]) -> list[bool]:
        """Exact recall by one forward pass."""
        return [outcome.passed for outcome in scoring.recall(self.model, examples)]


@dataclass(frozen=True, slots=True)
class AskedEngine(AskedModel):
    """The same of an engine: where it leads several processes, they share the questions."""

    engine: Engine

    @classmethod
    def of(cls, engine: Engine) -> AskedEngine:
        """The engine's model, as it is at the time of each question."""
        return cls(engine.base.model, engine.renderer, engine)

    def generated(self, examples: Sequence[Example]) -> list[bool]:
        """As for ``AskedModel``."""
        return self.engine.generated_recall(examples)

    def forced(self, examples: Sequence[Example]) -> list[bool]:
        """As for ``AskedModel``."""
        return [outcome.passed for outcome in self.engine.recall(examples)]


@dataclass(frozen=True, slots=True)
class Kept:
    """The base facts that the model answered before the first edit.

    ``poets`` and ``relations`` are in nothing that training sees; ``any_poets`` are drawn from all
    that the model was pretrained on.
    """

    poets: Sequence[Example]
    relations: Sequence[Example]
    any_poets: Sequence[Example] = ()


def marks(count: int) -> list[int]:
    """After how many facts to measure: 1, 2, 5, 10, 20, 50, ... and the last."""
    steps = {digit * 10**power for power in range(6) for digit in (1, 2, 5)}
    return sorted({mark for mark in steps if mark < count} | {count})


def measure(
    method: str,
    after: int,
    asked_model: AskedModel,
    tasks: Sequence[Task],
    kept: Kept,
    draw: random.Random | None = None,
    training_answers: Recalled | None = None,
) -> Point:
    """Ask a model all that it should still know; ``training_answers``: the training phrasings'.

    Generation takes long: with ``draw`` each fact is asked so under one training phrasing and one
    never-trained one, drawn by it.  The base facts and all that is teacher-forced are asked whole.
    """
    held = [task.kept for task in tasks]
    training_answers = training_answers or recalled(asked_model, tasks, draw)
    generated, forced = training_answers.generated, training_answers.forced
    untrained = [task.phrasings for task in tasks if task.kept]
    return Point(
        method=method,
        after=after,
        tried=both(generated, forced),
        committed=both(_only(generated, held), _only(forced, held)),
        phrasings=both(
            asked_model.generated(_flat(_some(untrained, draw))),
            asked_model.forced(_flat(untrained)),
        ),
        poets=both(*asked_model.ask(kept.poets)),
        relations=both(*asked_model.ask(kept.relations)),
        any_poets=both(*asked_model.ask(kept.any_poets)),
        asked=None if draw is None else 1,
    )


def recalled(
    asked_model: AskedModel, tasks: Sequence[Task], draw: random.Random | None = None
) -> Recalled:
    """Ask the training phrasings of each fact; by generation all, or the one that is drawn."""
    trained = [task.trained for task in tasks]
    generated = _whole(asked_model.generated, _some(trained, draw))
    return Recalled(generated, _whole(asked_model.forced, trained))


def _some(
    examples: Sequence[Sequence[Example]], draw: random.Random | None
) -> Sequence[Sequence[Example]]:
    """One of each, drawn; all where nothing draws."""
    if draw is None:
        return examples
    return [[draw.choice(list(own))] if own else [] for own in examples]


def _flat(examples: Sequence[Sequence[Example]]) -> list[Example]:
    return [e for own in examples for e in own]


def _whole(
    ask: Callable[[Sequence[Example]], list[bool]], examples: Sequence[Sequence[Example]]
) -> list[bool]:
    """For each fact whether all its examples are recalled."""
    rest = iter(ask(_flat(examples)))
    return [all(list(islice(rest, len(own)))) for own in examples]


def _only(values: Sequence[bool], chosen: Sequence[bool]) -> list[bool]:
    return [value for value, take in zip(values, chosen, strict=True) if take]


def both(generated: Sequence[bool], forced: Sequence[bool]) -> Both:
    return Both(Score(sum(generated), len(generated), "generated"), Score(sum(forced), len(forced)))
