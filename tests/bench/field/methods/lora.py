"""LoRA as most people would use it (``tests.bench.lora``): PEFT's own on all linear layers, until
every prompt is recalled, then merged; one adapter for each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvedit.model.prompts import Example
from tests.bench.field.asked import Asked
from tests.bench.field.method import Method, examples
from tests.bench.field.records import Record
from tests.bench.lora import LoraSettings, train_lora


@dataclass(kw_only=True)
class Lora(Method):
    """Rank 16, AdamW."""

    rank: int = 16
    alpha: int = 32
    learning_rate: float = 1e-3
    batch: int = 8
    max_epochs: int = 60

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records in one adapter."""
        settings = LoraSettings(**self.settings(), seed=self.setup.seed)
        train_lora(asked.model, examples(asked, records), settings)
        return asked

    def passes(self, example: Example) -> float:
        """One an epoch."""
        return self.max_epochs
