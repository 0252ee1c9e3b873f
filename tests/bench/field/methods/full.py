"""Fine-tuning of the weights themselves: of all of them, or of the last blocks alone.

AdamW at the default rate of transformers' ``TrainingArguments`` (5e-5) without decay, until every
prompt is recalled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kvedit.model.prompts import Example
from kvedit.model.targets import blocks
from tests.bench.field.asked import Asked
from tests.bench.field.method import Method, examples, trainable
from tests.bench.field.records import Record
from tests.bench.lora import EpochSettings, learn


@dataclass(kw_only=True)
class FullTuning(Method):
    """All parameters."""

    learning_rate: float = 5e-5
    batch: int = 8
    max_epochs: int = 60

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records together."""
        parameters = self.parameters(asked.model)
        settings = EpochSettings(
            learning_rate=self.learning_rate, batch=self.batch, max_epochs=self.max_epochs,
            seed=self.setup.seed,
        )  # fmt: skip
        with trainable(asked.model, parameters, self.setup.seed):
            learn(asked.model, examples(asked, records), settings)
        return asked

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those that are trained."""
        return list(model.parameters())

    def passes(self, example: Example) -> float:
        """One an epoch."""
        return self.max_epochs


@dataclass(kw_only=True)
class LastBlocks(FullTuning):
    """The decoder blocks at the end alone: partial tuning."""

    last: int = 2

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those of the last blocks."""
        layers = blocks(model)[1]
        return [p for block in list(layers)[-self.last :] for p in block.parameters()]
