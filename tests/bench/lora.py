"""LoRA as most people would use it: PEFT's own, on all linear layers, until every example of a set
is recalled; then the adapter is merged.

The set is one fact under all its training phrasings, or all facts mixed.  Nothing is protected.

Invariants:
- Training ends where a pass over all examples finds each recalled and so changes nothing, or after
  ``max_epochs``.
- Nothing of PEFT is left in the model; the global random state is as before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.model.prompts import Example
from tests.bench.baseline import batch_of, merged_afterwards, recalled_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochSettings:
    """Of training until all is recalled; ``batch`` examples are read in a step."""

    learning_rate: float = 1e-3
    batch: int = 8
    max_epochs: int = 60
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings(EpochSettings):
    """The same with the adapter's."""

    rank: int = 16
    alpha: int = 32


@dataclass(frozen=True, slots=True)
class LoraEpoch:
    """Where the loop stands: batches of the running epoch, and of its examples those recalled."""

    epoch: int
    batch: int
    batches: int
    loss: float
    recalled: int
    n: int


@dataclass(frozen=True, slots=True)
class LoraResult:
    """How it went: updates made, seconds with wrapping and merging, and whether the last pass found
    every example recalled.
    """

    steps: int
    epochs: int
    seconds: float
    recalled: bool


OnBatch = Callable[[LoraEpoch], None]


def train_lora(
    model: Any,
    examples: Sequence[Example],
    settings: LoraSettings | None = None,
    on_batch: OnBatch = lambda epoch: None,
) -> LoraResult:
    """Train a set of examples to a bare model in fp32, and merge."""
    settings, began = settings or LoraSettings(), time.monotonic()
    with merged_afterwards(model, settings.seed, lambda: _lora(settings)) as wrapped:
        steps, epochs, recalled = learn(wrapped, examples, settings, on_batch)
    return LoraResult(steps, epochs, time.monotonic() - began, recalled)


def _lora(settings: LoraSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def learn(
    wrapped: Any,
    examples: Sequence[Example],
    settings: EpochSettings,
    on_batch: OnBatch = lambda epoch: None,
) -> tuple[int, int, bool]:
    """Train the parameters that require gradients, in place, until an epoch finds all recalled:
    updates and epochs made, and whether that happened.
    """
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate)
    rng, steps = random.Random(settings.seed), 0
    wrapped.train()
    for epoch in range(1, settings.max_epochs + 1):
        order, recalled = rng.sample(list(examples), len(examples)), 0
        batches = [order[at : at + settings.batch] for at in range(0, len(order), settings.batch)]
        for number, batch in enumerate(batches, 1):
            loss, right = _step(wrapped, optimizer, batch)
            steps, recalled = steps + (right < len(batch)), recalled + right
            on_batch(LoraEpoch(epoch, number, len(batches), loss, recalled, len(examples)))
        if recalled == len(examples):
            return steps, epoch, True
    return steps, settings.max_epochs, False


def _step(wrapped: Any, optimizer: Any, examples: Sequence[Example]) -> tuple[float, int]:
    """Loss and examples recalled of one batch; an update follows unless all are."""
    inputs = batch_of(examples, wrapped.device)
    out = wrapped(**inputs, use_cache=False)
    right = recalled_rows(out.logits.detach(), inputs["labels"])
    if right < len(examples):
        torch.autograd.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
    return float(out.loss.detach()), right
