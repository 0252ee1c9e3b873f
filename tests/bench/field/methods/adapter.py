"""Adapter tuning: a bottleneck behind every MLP (Houlsby et al. 2019, arXiv 1902.00751).

x + up(gelu(down(x))), ``up`` zero at first, so that the model is unchanged before training.  It is
not linear and cannot be merged: the trained modules stay in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvedit.errors import ModelError
from kvedit.model.prompts import Example
from kvedit.model.targets import blocks
from tests.bench.field.asked import Asked
from tests.bench.field.method import BESIDE, Method, examples, trainable
from tests.bench.field.records import Record
from tests.bench.lora import EpochSettings, learn

MLP = ("mlp", "feed_forward", "ffn")
"""What the architectures on the hubs call a block's MLP."""


class Adapted(nn.Module):
    """A block's MLP with the bottleneck behind it."""

    def __init__(self, inner: nn.Module, hidden: int, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) to the same."""
        out: Tensor = self.inner(hidden)
        return out + self.up(nn.functional.gelu(self.down(out)))


@dataclass(kw_only=True)
class BottleneckAdapter(Method):
    """One set of adapters that all edits train on."""

    width: int = 64
    learning_rate: float = 1e-3
    batch: int = 8
    max_epochs: int = 60
    changes: ClassVar[str] = BESIDE

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records together."""
        adapters = self._adapters(asked.model)
        parameters = [p for one in adapters for p in (*one.down.parameters(), *one.up.parameters())]
        settings = EpochSettings(
            learning_rate=self.learning_rate, batch=self.batch, max_epochs=self.max_epochs,
            seed=self.setup.seed,
        )  # fmt: skip
        with trainable(asked.model, parameters, self.setup.seed):
            learn(asked.model, examples(asked, records), settings)
        return asked

    def passes(self, example: Example) -> float:
        """One an epoch."""
        return self.max_epochs

    def _adapters(self, model: Any) -> list[Adapted]:
        """Those in the model; they are put there by the first edit."""
        found = []
        for block in blocks(model)[1]:
            name = next((name for name in MLP if hasattr(block, name)), None)
            if name is None:
                raise ModelError(f"a block of {type(model).__name__} has no MLP that is known")
            mlp = getattr(block, name)
            if not isinstance(mlp, Adapted):
                mlp = self._new(mlp, model)
                setattr(block, name, mlp)
            found.append(mlp)
        return found

    def _new(self, mlp: nn.Module, model: Any) -> Adapted:
        hidden = model.config.get_text_config().hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setup.seed)
            adapted = Adapted(mlp, hidden, self.width)
        weight = next(mlp.parameters())
        return adapted.to(weight.device, weight.dtype)
