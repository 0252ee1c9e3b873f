"""MEMIT (Meng et al. 2023, arXiv 2210.07229; kmeng01/memit): many facts in several MLPs.

z, the last block's output that brings the answer about, is found for each fact (``values``).  Then,
block by block, W + R K^T (λ C + K K^T)^-1: K are the inputs at the keys' last tokens, R what is
still missing of z, shared evenly by the blocks that are left, C the second moment of inputs over
text.  Settings of EasyEdit's ``hparams/AlphaEdit/qwen2.5-7b.yaml``, blocks 4 to 8 of 32.

λ is 15,000 there for inputs of 14,336; what it weighs against grows with their number, so here it
is as much for each of them.  C is that of texts which the model wrote by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvedit.model.prompts import Example
from kvedit.model.targets import blocks
from tests.bench.field.asked import Asked
from tests.bench.field.layers import (
    Placed,
    add_to,
    at_keys,
    contexts,
    layer_at,
    mlp_out,
    placed,
    second_moments,
)
from tests.bench.field.method import Method
from tests.bench.field.methods.rome import damped
from tests.bench.field.records import Record
from tests.bench.field.values import ValueSettings, wanted_value


@dataclass(kw_only=True)
class Memit(Method):
    """``weight`` is λ divided by the number of inputs."""

    depths: tuple[float, ...] = (4 / 32, 5 / 32, 6 / 32, 7 / 32, 8 / 32)
    contexts: int = 5
    weight: float = 15_000 / 14_336
    damping: float = 0.01
    value: ValueSettings = field(default_factory=ValueSettings)
    _moments: list[Tensor] = field(default_factory=list, init=False)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records together."""
        model = asked.model
        layers = self.layers(model)
        befores = contexts(asked.renderer, self.setup.texts, self.contexts)
        matrices = [mlp_out(model, layer) for layer in layers]
        if not self._moments:
            moments = second_moments(model, matrices, self.setup.texts)
            self._moments = [self.prepared(moment) for moment in moments]
        last = blocks(model)[1][layers[-1]]
        rows = [placed(asked, record, befores) for record in records]
        wanted = torch.stack([
            wanted_value(asked, last, record, own, self.value)[1]
            for record, own in zip(records, rows, strict=True)
        ])  # fmt: skip
        for number, matrix in enumerate(matrices):
            keys = mean_keys(model, matrix, rows)
            missing = wanted - at_keys(model, last, [own[0] for own in rows])[1]
            missing = (missing / (len(matrices) - number)).double()
            add_to(matrix, self.update(number, keys, missing))
        self.remember([mean_keys(model, matrix, rows) for matrix in matrices])
        return asked

    def layers(self, model: Any) -> list[int]:
        """The blocks that are edited, in order."""
        return sorted({layer_at(model, depth) for depth in self.depths})

    def prepared(self, moment: Tensor) -> Tensor:
        """What is kept of a second moment (in, in)."""
        return damped(moment, self.damping)

    def update(self, number: int, keys: Tensor, missing: Tensor) -> Tensor:
        """(out, in): the update of a matrix by keys (n, in) and what is missing (n, out)."""
        moment = self.weight * keys.shape[1] * self._moments[number]
        return missing.T @ torch.linalg.solve(moment + keys.T @ keys, keys.T).T

    def remember(self, keys: Sequence[Tensor]) -> None:
        """What later edits know of these: nothing."""

    def passes(self, example: Example) -> float:
        """One a step of the search for z, each context and the KL row."""
        return self.value.steps * (self.contexts + 2)

    def settings(self) -> dict[str, Any]:
        """With those of the search for z."""
        return {**super().settings(), "value": asdict(self.value)}


def mean_keys(model: Any, matrix: Any, rows: Sequence[Sequence[Placed]]) -> Tensor:
    """(n, in), float64: the inputs at each record's key: the mean of that without context and the
    mean of those with one, as there.
    """
    flat, _ = at_keys(model, matrix, [row for own in rows for row in own])
    parts = flat.double().split([len(own) for own in rows])
    return torch.stack([(p[0] + p[1:].mean(0)) / 2 if len(p) > 1 else p[0] for p in parts])
