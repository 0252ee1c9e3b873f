"""Slices of protected text: what is asked of the base model at a time, and how much of it fits.

How many questions go into a slice, and where their answers are cut, follows from the measured time
of a decoding step: a fast model answers whole, a slow one answers many questions briefly.

Invariants:
- Locality probes and control texts are disjoint, and no two texts have the same prompt.
- Where time does not run short, the same model, settings and seed give the same texts on the same
  machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from kvedit.config import ProtectConfig
from kvedit.model.devices import first_device, generator, is_accelerated
from kvedit.model.forward import vocabulary_size
from kvedit.model.generation import Decoding, cache_bytes_per_token, max_batch_rows
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Renderer
from kvedit.replay import general_texts, questions
from kvedit.replay.protected_texts import INVENTED, Protected, ProtectedSet
from kvedit.replay.questions import Answered, Limits

SHIPPED_PROMPTS = Path(__file__).parents[1] / "data" / "protected_prompts.txt"
GENERAL_QUESTIONS = SHIPPED_PROMPTS.with_name("general_questions.txt")
INVENTED_NAMES = SHIPPED_PROMPTS.with_name("invented_names.txt")
INVENTED_SHARE = 3  # shipped questions to each one about an invented name
LONG_ANSWER_TOKENS = 16  # from which on an answer counts as long
LONG_LOCALITY_RATIO = 0.5  # of the locality probes whose answers are whole are long
TIMED_ROWS = 32  # of the batch whose decoding is timed
MAX_LOGITS = 16 * 1024 * 1024  # of a decoding step
MAX_CACHE_BYTES = 512 * 1024 * 1024  # of the keys and values of a slice
ACCELERATOR_CACHE_BYTES = 4 * MAX_CACHE_BYTES
SHORT = Limits(rows=8, question=36, answer=16)  # of a slow model, which gets as many rows as fit
MIN_SLICES = 3  # that a fast model's whole time must be enough for
FREE_SEED = 10_000  # apart from the numbers of slices, which are seeds
SHIPPED_SLICES = 3  # in which the shipped questions are asked
GIVEN_TOKENS = 12  # of a general question, about


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a decoding step: those it takes for one row, and those for each more."""

    one: float
    more: float

    def step(self, rows: int) -> float:
        """Seconds of a step of so many rows."""
        return self.one + self.more * (rows - 1)

    @classmethod
    @torch.no_grad()
    def measure(cls, base: BaseModel, renderer: Renderer) -> Pace:
        """Time two steps, each after one that warms up."""
        turn = renderer.empty_user_turn()
        run = Decoding(base.model, [turn[0] if turn else renderer.prefix("Who are you?")])
        times = {}
        for rows in (1, TIMED_ROWS):
            for _ in range(2):
                index = torch.arange(rows, device=first_device(base.model)).clamp_max(run.rows - 1)
                run.append(torch.full_like(index, renderer.end), index)
                start = time.perf_counter()
                run.next_logits().sum().item()
                times[rows] = time.perf_counter() - start
        return cls(times[1], max(0.0, times[TIMED_ROWS] - times[1]) / (TIMED_ROWS - 1))


class Sampler:
    """Makes slices, each as large as its time allows."""

    def __init__(self, base: BaseModel, renderer: Renderer, config: ProtectConfig) -> None:
        self._base, self._renderer, self._config = base, renderer, config
        self._pace: Pace | None = None
        self._speedup = 1.0  # of the latest slice over its limits: rows leave when they are done
        self._turn = renderer.empty_user_turn()
        question = questions.QUESTION_TOKENS
        room = renderer.context - len(renderer.prefix("")) - question
        answer = max(1, min(questions.ANSWER_TOKENS, renderer.context // 2, room))
        self._most = Limits(self._rows(question + answer), question, answer)

    @cached_property
    def _invented(self) -> list[str]:
        """Questions about invented names, for a model that reads."""
        reads = general_texts.reads(self._base, self._renderer)
        return _lines(INVENTED_NAMES) if reads else []

    @property
    def pace(self) -> Pace:
        """Measured when it is first asked for."""
        if self._pace is None:
            self._pace = Pace.measure(self._base, self._renderer)
        return self._pace

    def _rows(self, tokens: int) -> int:
        """The most conversations of so many tokens whose logits, keys and values stay small."""
        model = self._base.model
        tokens += len(self._renderer.prefix(""))
        rows = min(max_batch_rows(model, tokens), MAX_LOGITS // vocabulary_size(model))
        room = ACCELERATOR_CACHE_BYTES if is_accelerated(model) else MAX_CACHE_BYTES
        return max(SHORT.rows, min(rows, room // (tokens * cache_bytes_per_token(model))))

    def limits(self, seconds: float, asked: int, number: int) -> Limits:
        """What slice ``number`` may take of the seconds that are left for all."""
        left, most = max(1, self._config.samples - asked), self._most
        most = replace(most, rows=min(most.rows, left))
        slices = math.ceil(left / most.rows)
        if self._speedup == 1.0:
            slices = min(slices, MIN_SLICES)
        steps = seconds / slices / self.pace.step(most.rows) * self._speedup
        answer = int(steps) - most.question
        if answer >= 2 * SHORT.answer:
            shipped = len(_lines(SHIPPED_PROMPTS)) + len(self._invented)
            given = shipped if number < SHIPPED_SLICES else 0
            return replace(most, answer=min(answer, most.answer), given=given)
        short = replace(SHORT, answer=min(SHORT.answer, most.answer))
        most_rows = self._rows(SHORT.question + SHORT.answer)
        if not number:  # a given question costs half as much as one that is sampled
            given = self._fitting(seconds, self._short_steps - SHORT.question + GIVEN_TOKENS)
            files = _lines(GENERAL_QUESTIONS), _lines(SHIPPED_PROMPTS), self._invented
            there_are = sum(map(len, files))
            given = max(SHORT.rows, min(given, most_rows, there_are))
            return replace(short, rows=0, given=given)
        rows = min(self._fitting(seconds, self._short_steps), left, most_rows)
        return replace(short, rows=max(SHORT.rows, rows))

    def sample(
        self, present: ProtectedSet, number: int, limits: Limits,
        is_over: Callable[[], bool] = lambda: False,
    ) -> ProtectedSet:  # fmt: skip
        """The new texts of slice ``number``; once ``is_over``, answers are cut where they are."""
        rng = generator(self._base.model, number)
        asked = {text.prompt for text in (*present.control, *present.locality)}
        prompts = self._given(limits, asked)
        began = time.monotonic()
        answered, others = questions.converse(
            self._base, self._renderer, prompts, limits, rng, is_over
        )
        if not is_over():
            asked |= {one.prompt for one in answered}
            again = [prompt for prompt in dict.fromkeys(others) if prompt not in asked]
            answered += self._answer(again, limits.answer, set(prompts))
            if not self.is_short(limits):
                step = self.pace.step(limits.rows + limits.given)
                planned = (limits.question + limits.answer) * step
                self._speedup = max(1.01, planned / (time.monotonic() - began))
        asked = {text.prompt for text in (*present.control, *present.locality)}
        new = [self._named(one) for one in answered if one.prompt not in asked]
        return self._sorted(new, present)

    def _named(self, one: Answered) -> Answered:
        """An answer about an invented name says so."""
        return replace(one, source=INVENTED) if one.prompt in self._invented else one

    def _given(self, limits: Limits, asked: set[str]) -> list[str]:
        """The questions of a slice that are not sampled: a slow model gets general ones first, and
        one that reads some about invented names, of which it can only guess.
        """
        prompts = _lines(SHIPPED_PROMPTS)
        if self.is_short(limits):
            prompts = [*_lines(GENERAL_QUESTIONS), *prompts]
        for number, name in enumerate(self._invented):
            prompts.insert((INVENTED_SHARE + 1) * (number + 1) - 1, name)
        return [prompt for prompt in prompts if prompt not in asked][: limits.given]

    def write_freely(self, seconds: float) -> list[Protected]:
        """Texts that begin with nothing: fewer, and cut, where time runs short."""
        count = self._config.free_texts
        steps = int(seconds / self.pace.step(max(1, count)))
        if steps < SHORT.answer:
            count = min(count, max(SHORT.rows, self._fitting(seconds, SHORT.answer)))
        limit = max(SHORT.answer, min(steps, questions.MAX_FREE_TOKENS))
        rng = generator(self._base.model, FREE_SEED)
        return questions.write_freely(self._base, self._renderer, count, rng, limit)

    def is_short(self, limits: Limits) -> bool:
        """Whether these are limits of a slow model."""
        return limits.question == SHORT.question

    @property
    def least_seconds(self) -> float:
        """Of the smallest slice."""
        return self.pace.step(SHORT.rows) * self._short_steps

    @property
    def _short_steps(self) -> int:
        """Of a short slice, with the tokens between a question and its answer."""
        turn = len(self._turn[0]) if self._turn else 0
        return SHORT.question + SHORT.answer + len(self._renderer.prefix("")) - turn

    def _fitting(self, seconds: float, steps: int) -> int:
        """How many rows can take so many steps within the seconds."""
        return int((seconds / steps - self.pace.one) / max(self.pace.more, 1e-9)) + 1

    def _answer(self, prompts: Sequence[str], limit: int, shipped: set[str]) -> list[Answered]:
        """Answers to questions that could not be answered where they were asked."""
        answered: list[Answered] = []
        for source, is_shipped in (("drawn", False), ("shipped", True)):
            asked = [prompt for prompt in prompts if (prompt in shipped) == is_shipped]
            answered += questions.answer_all(self._base, self._renderer, asked, source, limit)
        return questions.with_margins(self._base, self._renderer, answered)

    def _sorted(self, answered: Sequence[Answered], present: ProtectedSet) -> ProtectedSet:
        """Every second answer may be a probe; the others are control texts, up to their number."""
        probes = _choose(
            [(one, text) for one in answered[::2] if (text := one.probe(self._renderer))],
            max(0, self._config.locality_probes - len(present.locality)),
        )
        prompts = {text.prompt for text in probes}
        texts = [text for one in answered if (text := one.text(self._renderer))]
        wanted = {True: self._config.long_answers, False: self._config.short_answers}
        for text in present.control:
            wanted[self._is_long(text)] -= text.origin == "drawn"
        control = []
        for text in texts:
            kind = self._is_long(text)
            if text.prompt not in prompts and (text.origin != "drawn" or wanted[kind] > 0):
                wanted[kind] -= text.origin == "drawn"
                control.append(text)
        return ProtectedSet(tuple(control), tuple(probes))

    def _is_long(self, text: Protected) -> bool:
        return len(self._renderer.tokens(text.answer)) >= LONG_ANSWER_TOKENS


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _choose(candidates: Sequence[tuple[Answered, Protected]], count: int) -> list[Protected]:
    """Up to ``count`` probes: long and short whole answers alike, then parts of answers, those of
    most tokens first; what the model says again and again only where there is nothing else.
    """
    whole = [pair for pair in candidates if not pair[1].is_cut]
    long = [pair for pair in whole if len(pair[0].ids) >= LONG_ANSWER_TOKENS]
    long = long[: round(count * LONG_LOCALITY_RATIO)]
    short = [pair for pair in whole if pair not in long]
    parts = [pair for pair in candidates if pair[1].is_cut]
    parts.sort(key=lambda pair: len(pair[0].judged), reverse=True)
    different: dict[tuple[int, ...], Protected] = {}
    repeated = []
    for one, text in (*long, *short, *parts):
        if different.setdefault(one.judged, text) is not text:
            repeated.append(text)
    return [*different.values(), *repeated][:count]
