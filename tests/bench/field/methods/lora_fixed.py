"""LoRA with fixed steps, as EasyEdit runs it: ``easyeditor/models/lora/lora_main.py`` with
``hparams/LoRA/qwen2.5-7b.yaml``.

Rank 8, alpha 32, dropout 0.1 on query and value, Adam at 5e-3, 60 steps on each fact whether it is
learned or not, and one adapter that all edits go on training.  Merging it would change nothing but
the rounding, so it stays in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.model.prompts import Example
from tests.bench.baseline import target_modules
from tests.bench.field.asked import Asked
from tests.bench.field.descent import answer_loss, epochs
from tests.bench.field.method import Method, examples, trainable
from tests.bench.field.records import Record


@dataclass(kw_only=True)
class LoraFixed(Method):
    """The settings of that file."""

    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    learning_rate: float = 5e-3
    steps: int = 60
    batch: int = 1

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """``steps`` epochs over the records."""
        model = asked.model
        adapter = self._adapter(model)
        rows = examples(asked, records)
        with trainable(model, adapter, self.setup.seed):
            model.train()
            epochs(adapter, rows, lambda some: answer_loss(model, some), rate=self.learning_rate,
                   epochs=self.steps, batch=self.batch)  # fmt: skip
        return asked

    def passes(self, example: Example) -> float:
        """One a step."""
        return self.steps

    def _adapter(self, model: Any) -> list[torch.nn.Parameter]:
        """Its parameters; the first edit puts it into the model."""
        from peft import LoraConfig, inject_adapter_in_model

        if not any("lora_" in name for name, _ in model.named_parameters()):
            config = LoraConfig(
                r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
                target_modules=target_modules(model),
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.setup.seed)
                inject_adapter_in_model(config, model)
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name]
