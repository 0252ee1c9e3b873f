"""The notebook's loop, as it stood in the notebook that this project grew from.

For each fact AdaLoRA (rank 8, alpha 32, dropout 0.1) on query and value, AdamW at 5e-3, one prompt
at a time padded to 256 tokens, gradients of 16 prompts added up before a step, gradient
checkpointing, up to 100 epochs, ended when the loss has not fallen for 20; then merged.  A fact has
no 16 prompts, so each epoch ends in one step.

Three things had to be mended for it to run at all, none of which changes what it does: PEFT now
demands a ``total_step`` (the notebook never calls the allocator that uses it), the target names
are those of the model at hand, and on a CPU fp16 is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvedit.model.forward import checkpointed
from kvedit.model.prompts import Example
from tests.bench.baseline import batch_of, merged_afterwards, target_modules
from tests.bench.field.asked import Asked
from tests.bench.field.method import SEQUENTIAL, Method, examples
from tests.bench.field.records import Record


@dataclass(kw_only=True)
class Notebook(Method):
    """One fact to convergence, merge, next."""

    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    learning_rate: float = 5e-3
    width: int = 256
    accumulated: int = 16
    max_epochs: int = 100
    patience: int = 20
    ways: ClassVar[tuple[str, ...]] = (SEQUENTIAL,)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """Train and merge each record."""
        for record in records:
            rows = examples(asked, [record])
            with merged_afterwards(asked.model, self.setup.seed, lambda: self._config(asked)) as w:
                self._train(w, rows)
        return asked

    def passes(self, example: Example) -> float:
        """Padded passes, a half more for what checkpointing computes twice."""
        return 1.5 * self.max_epochs * self.width / len(example.ids)

    def _config(self, asked: Asked) -> Any:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            target_r=self.rank, init_r=self.rank + 1, lora_alpha=self.alpha,
            lora_dropout=self.dropout, target_modules=target_modules(asked.model),
            total_step=10**6, task_type="CAUSAL_LM",
        )  # fmt: skip

    def _train(self, wrapped: Any, rows: Sequence[Example]) -> None:
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        wrapped.train()
        best, since = float("inf"), 0
        with checkpointed(wrapped.get_base_model(), on=True):
            for _ in range(self.max_epochs):
                loss = self._epoch(wrapped, optimizer, rows)
                best, since = (loss, 0) if loss < best else (best, since + 1)
                if since >= self.patience:
                    break

    def _epoch(self, wrapped: Any, optimizer: Any, rows: Sequence[Example]) -> float:
        """The mean loss of one pass over all prompts."""
        losses = []
        for number, row in enumerate(rows, 1):
            loss = wrapped(**self._padded(row, wrapped.device), use_cache=False).loss
            torch.autograd.backward(loss / self.accumulated)
            losses.append(float(loss.detach()))
            if number % self.accumulated == 0 or number == len(rows):
                optimizer.step()
                optimizer.zero_grad()
        return sum(losses) / len(losses)

    def _padded(self, row: Example, device: torch.device) -> dict[str, torch.Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.nn.functional.pad(t, (0, self.width - t.shape[1]), value=fill[name])
            for name, t in batch_of([row], device).items()
        }
