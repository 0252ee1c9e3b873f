"""Which part of a step's work this process does: all of it, or its share among several.

The loops and the engine ask here instead of asking the model; alone, that is the same.  Among
several, texts are dealt out, each process runs the model on its own, and what all found is put
together in every process.  A loss is then computed from all tokens everywhere, and its gradient in
each process is that of the process's own tokens: their sum is the gradient of the whole loss,
whatever mean over tokens it is.

Invariants:
- Alone nothing is exchanged and no bit differs from asking the model.
- Scores, margins and outcomes are the same in all processes: loops that decide by them stay in
  step.  Texts that differ from one process to another end the lesson.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.model import generation, scoring
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Outcome, TokenScores
from kvedit.replay.kl import ReferenceTexts, robust_mean


class Share:
    """All of the work, by one process."""

    def scores(
        self, model: Any, examples: Sequence[Example], prefix_cache: PrefixCache | None
    ) -> TokenScores:
        """``probes.token_scores``."""
        return scoring.token_scores(model, examples, prefix_cache)

    def divergence(
        self,
        reference_texts: ReferenceTexts,
        model: Any,
        chosen: Sequence[int],
        prefix_cache: PrefixCache | None,
    ) -> Tensor:
        """How far the model has left the chosen texts: ``reference_texts.robust_mean``, a scalar."""
        return robust_mean(reference_texts.divergences(model, chosen, prefix_cache))

    def recall(
        self, model: Any, examples: Sequence[Example], prefix_cache: PrefixCache | None
    ) -> list[Outcome]:
        """``probes.recall``."""
        return scoring.recall(model, examples, prefix_cache)

    def generate(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        *,
        end: int | frozenset[int],
        limit: int,
    ) -> list[list[int]]:
        """``decoding.generate``, greedy."""
        return generation.generate(model, prefixes, end=end, limit=limit)

    def once(self, loss: Tensor) -> Tensor:
        """A loss that every process computes whole: it counts in one of them."""
        return loss

    def agreed(self, value: float) -> float:
        """What all go by when each has computed the same thing."""
        return value

    def align(self, adapter: Adapter) -> None:
        """Let the adapter start from the same values everywhere."""

    def sum_gradients(self, adapter: Adapter) -> None:
        """After a backward pass: what all processes found."""
