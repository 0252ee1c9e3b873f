"""Fine-tuning of one matrix, the MLP's last of one block, in the three ways of the literature.

FT-L: the loss at the prompt's last token and a bound on how far each weight may move, as ROME's
paper runs it (``hparams/FT/*_constr.json`` of kmeng01/memit).  FT-M: the usual loss on the answer,
without a bound (EasyEdit, ``objective_optimization: target_new``).  Both train one fact to
convergence, then the next.  LocFT-BF (ICT-STAR/LocFT, ``fine-tune.py``): the same loss as FT-M over
batches of all facts, breadth-first, until the mean loss is small.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvedit.model.prompts import Example
from tests.bench.field.asked import Asked
from tests.bench.field.descent import answer_loss, epochs, last_prompt_token_loss
from tests.bench.field.layers import layer_at, mlp_out
from tests.bench.field.method import BATCH, SEQUENTIAL, Method, examples, trainable
from tests.bench.field.records import Record

ENOUGH = 1e-2  # nats a token: the loss at which all three stop


@dataclass(kw_only=True)
class FineTuningM(Method):
    """EasyEdit's ``hparams/FT/llama-7b.yaml``, block 21 of 32; ``bound`` is in units of weights."""

    depth: float = 21 / 32
    learning_rate: float = 5e-4
    steps: int = 25
    bound: float | None = None
    ways: ClassVar[tuple[str, ...]] = (SEQUENTIAL,)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """One record after the other."""
        weight = mlp_out(asked.model, layer_at(asked.model, self.depth)).weight
        for record in records:
            with trainable(asked.model, [weight], self.setup.seed):
                self._train(asked, weight, examples(asked, [record]))
        return asked

    def _train(self, asked: Asked, weight: torch.nn.Parameter, rows: Sequence[Example]) -> None:
        before = weight.detach().clone()

        def stay_near() -> None:
            if self.bound is not None:
                moved = (weight.detach() - before).clamp(-self.bound, self.bound)
                weight.data.copy_(before + moved)

        epochs(
            [weight], rows, lambda some: self.loss(asked, some), rate=self.learning_rate,
            epochs=self.steps, batch=1, enough=ENOUGH, after=stay_near,
        )  # fmt: skip

    def loss(self, asked: Asked, rows: Sequence[Example]) -> torch.Tensor:
        """That of the whole answer."""
        return answer_loss(asked.model, rows)

    def passes(self, example: Example) -> float:
        """One a step."""
        return self.steps


@dataclass(kw_only=True)
class FineTuningL(FineTuningM):
    """The bound is that of GPT-2 XL, 5e-4 (GPT-2 medium's is 2e-3)."""

    bound: float | None = 5e-4

    def loss(self, asked: Asked, rows: Sequence[Example]) -> torch.Tensor:
        """That of the prompt's last token."""
        return last_prompt_token_loss(asked.model, rows)


@dataclass(kw_only=True)
class BreadthFirst(Method):
    """LocFT's ``hparams/llama3-8b.yaml``: block 22 of 32, batches of 100, 25 epochs at most."""

    depth: float = 22 / 32
    learning_rate: float = 5e-4
    max_epochs: int = 25
    batch: int = 100
    ways: ClassVar[tuple[str, ...]] = (BATCH,)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records together."""
        weight = mlp_out(asked.model, layer_at(asked.model, self.depth)).weight
        with trainable(asked.model, [weight], self.setup.seed):
            epochs([weight], examples(asked, records), lambda some: answer_loss(asked.model, some),
                   rate=self.learning_rate, epochs=self.max_epochs, batch=self.batch, enough=ENOUGH,
                   shuffle=random.Random(self.setup.seed))  # fmt: skip
        return asked

    def passes(self, example: Example) -> float:
        """One an epoch."""
        return self.max_epochs
