"""A model with its prefix cache, as the training loops and the engine use it.

A ``Worker`` does all of the work in one process.  The one in ``kvedit.distributed`` does a share of
it: texts are dealt out over the processes, each runs the model on its own, and the results are
gathered in all of them.  A loss is a sum over tokens, and its gradient in each process is that of
the process's own tokens: summed, they are the gradient of the whole loss.

Invariants:
- With one process nothing is exchanged, and no bit differs from calling the model directly.
- Scores and outcomes are the same in all processes, so loops that decide by them stay in step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.model import generation, scoring
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome, TokenScores
from kvedit.replay.kl import ReferenceTexts, Teacher, robust_mean

_T = TypeVar("_T")


class Worker:
    """All of the work, in one process."""

    def __init__(self, model: Any, prefix_cache: PrefixCache | None = None) -> None:
        self.model, self.prefix_cache = model, prefix_cache

    @cached_property
    def accelerator(self) -> Accelerator:
        """Of accelerate; it knows the precision that a launcher has asked for."""
        return Accelerator()

    def backward(
        self,
        examples: Sequence[Example],
        loss: Callable[[TokenScores], Tensor],
        teacher: Teacher | None = None,
    ) -> TokenScores:
        """Add the gradients of a loss that is a sum over answer tokens; returns their scores, those
        of a ``teacher`` where it has any.

        Each batch has a forward and a backward pass of its own, so that only its activations are in
        memory, however many examples there are.
        """
        parts = []
        instead = partial(teacher.losses, self.model) if teacher else None
        for batch in scoring.step_batches(self.model, examples):
            with self.accelerator.autocast():
                scores = scoring.batch_scores(
                    self.model, examples, batch, self.prefix_cache, instead
                )
            self.accelerator.backward(loss(scores))
            parts.append(replace(scores, losses=scores.losses.detach()))
        return scoring.joined(parts)

    def backward_divergence(
        self, reference_texts: ReferenceTexts, chosen: Sequence[int], weight: float
    ) -> None:
        """Add the gradients of ``weight`` times the KL divergence from the base model on the chosen
        texts, a robust mean over their answer tokens.
        """
        tokens = answer_tokens([reference_texts.examples[i] for i in chosen])
        self._add_divergence(reference_texts, chosen, weight / tokens)

    def _add_divergence(
        self, reference_texts: ReferenceTexts, chosen: Sequence[int], weight: float
    ) -> None:
        """The same, of the sum over tokens."""
        texts = [reference_texts.examples[i] for i in chosen]
        for batch in scoring.step_batches(self.model, texts):
            part = [chosen[i] for i in batch]
            with self.accelerator.autocast():
                values = reference_texts.divergences(self.model, part, self.prefix_cache)
            self.accelerator.backward(weight * len(values) * robust_mean(values))

    def recall(self, examples: Sequence[Example]) -> list[Outcome]:
        """``scoring.recall``."""
        return scoring.recall(self.model, examples, self.prefix_cache)

    def generate(
        self, prefixes: Sequence[Sequence[int]], *, end: int | frozenset[int], limit: int
    ) -> list[list[int]]:
        """``generation.generate``, greedy."""
        return generation.generate(self.model, prefixes, end=end, limit=limit)

    def once(self, loss: Tensor) -> Tensor:
        """A loss that every process computes in full, so that it counts in one of them only."""
        return loss

    def agreed(self, value: float) -> float:
        """Rank 0's value, of something that every process has computed."""
        return value

    def on_main(self, work: Callable[[], _T]) -> _T:
        """Do something on rank 0 alone; all processes get its result, or what it raised.

        For decisions that depend on time or free memory, and for what only rank 0 keeps.
        """
        return work()

    def in_step(self) -> AbstractContextManager[None]:
        """Inside, an error of one process is raised in all of them."""
        return nullcontext()

    def same_weights(self, digest: str) -> str:
        """The digest of the weights; raises ProcessesDifferError where processes differ."""
        return digest

    def align(self, adapter: Adapter) -> None:
        """Let the adapter start from the same values everywhere."""

    def sum_gradients(self, adapter: Adapter) -> None:
        """After a backward pass: add up the gradients of all processes."""


def answer_tokens(examples: Sequence[Example]) -> int:
    """How many tokens the examples' answers have."""
    return sum(len(example.ids) - example.start for example in examples)
