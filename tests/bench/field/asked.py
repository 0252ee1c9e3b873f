"""A model with its tokenizer, as every method hands it back: something that can be asked.

Invariant: a question is rendered as the model's users send it (its chat template, if it has one),
by the same ``Renderer`` for every method, in training and in asking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvedit.events import Event
from kvedit.model import generation, scoring
from kvedit.model.prompts import Example, Renderer
from tests.bench import quality_probes
from tests.bench.asking import AskedModel
from tests.bench.quality_material import Choice


@dataclass(frozen=True, slots=True)
class Forced:
    """An answer under teacher forcing: its tokens without an end token, those that the model ranks
    first in their places, and the mean negative log-likelihood, nats a token.
    """

    tokens: tuple[int, ...]
    predicted: tuple[int, ...]
    nats: float


def _unchanged(prompt: str) -> str:
    return prompt


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that is asked; ``rewrite`` puts what a method writes into the prompt."""

    model: Any
    renderer: Renderer
    rewrite: Callable[[str], str] = _unchanged

    def answers(self, prompts: Sequence[str], limit: int) -> list[str]:
        """Free greedy answers of up to ``limit`` tokens, each to the end token."""
        prefixes = [self.renderer.prefix(self.rewrite(prompt)) for prompt in prompts]
        rows = self._generate(prefixes, limit)
        return [self.renderer.answer_text(row).strip() for row in rows]

    @torch.no_grad()
    def forced(self, pairs: Sequence[tuple[str, str]]) -> list[Forced]:
        """Each prompt with its answer read in one pass."""
        examples = [
            self.renderer.example(self.rewrite(prompt), answer, ended=False)
            for prompt, answer in pairs
        ]
        rows: dict[int, Forced] = {}
        for batch in scoring.batches(self.model, examples):
            some = [examples[at] for at in batch]
            for at, example, logits in zip(batch, some, self._logits(some), strict=True):
                rows[at] = _forced(example, logits)
        return [rows[at] for at in range(len(examples))]

    def choose(self, rows: Sequence[Choice], emit: Callable[[Event], None]) -> tuple[bool, ...]:
        """Whether each multiple-choice question is answered rightly (``quality_probes.choose``);
        what a method writes into prompts stands before these too.
        """
        asked = [replace(row, prompt=self.rewrite(row.prompt)) for row in rows]
        return self._choose(asked, emit)

    def _choose(self, rows: Sequence[Choice], emit: Callable[[Event], None]) -> tuple[bool, ...]:
        return quality_probes.choose(AskedModel(self.model, self.renderer), rows, emit)

    def _generate(self, prefixes: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        return generation.generate(self.model, prefixes, end=self.renderer.stops, limit=limit)

    def _logits(self, examples: Sequence[Example]) -> list[Tensor]:
        """For each example (answer tokens, vocabulary)."""
        answers = scoring.answer_logits(self.model, examples)
        return list(answers.logits.split([len(e.ids) - e.start for e in examples]))


def _forced(example: Example, logits: Tensor) -> Forced:
    targets = torch.tensor(example.ids[example.start :], device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits.float(), targets)
    return Forced(tuple(targets.tolist()), tuple(logits.argmax(-1).tolist()), float(nats))
