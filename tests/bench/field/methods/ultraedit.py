"""UltraEdit (Gu et al. 2025, arXiv 2505.14679; XiaojieGu/UltraEdit): one backward pass, then a
closed form.

At the places that predict the answer, h are a matrix's inputs and g the gradients of its outputs.
Both are normalised by running means and deviations, v = -rate |h'|^2 g', and the matrix gets
(H^T H + I)^-1 H^T V.  Edited are the first matrices of the MLPs of blocks 18 to 26 of 28, as in
``config/model/qwen2.5-7b.yaml``.

There, the running statistics start with the first batch of a hundred facts; with one fact they
would be nothing, so here they start with texts that the model wrote by itself.  |h'|^2 is about the
number of inputs, so the rate (1e-6 for 3,584) is given for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.model.forward import projects
from kvedit.model.prompts import Example
from kvedit.model.scoring import answer_logits, step_batches
from tests.bench.field.asked import Asked
from tests.bench.field.layers import add_to, layer_at, mlp_in
from tests.bench.field.method import Method, examples
from tests.bench.field.records import Record

LONGEST = 64  # tokens of a text of the model's own that are read


@dataclass(slots=True)
class Running:
    """Mean and deviation of rows that come in batches (Chan et al.)."""

    n: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def update(self, rows: Tensor) -> None:
        """Take (n, width) more."""
        count, mean = len(rows), rows.mean(0)
        total, shift = self.n + count, mean - self.mean
        self.squares = self.squares + (rows - mean).pow(2).sum(0)
        self.squares = self.squares + shift.pow(2) * self.n * count / total
        self.mean = self.mean + shift * count / total
        self.n = total

    def normalised(self, rows: Tensor) -> Tensor:
        """In deviations from the mean."""
        deviation = (self.squares / max(1, self.n - 1)).sqrt()
        return (rows - self.mean) / (deviation + torch.finfo(rows.dtype).eps)


@dataclass(kw_only=True)
class UltraEdit(Method):
    """``rate`` is lr times the number of inputs."""

    first: float = 18 / 28
    last: float = 26 / 28
    rate: float = 1e-6 * 3584
    own_texts: int = 16
    _running: dict[tuple[int, int], Running] = field(default_factory=dict, init=False)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """All records together."""
        model = asked.model
        layers = range(layer_at(model, self.first), layer_at(model, self.last) + 1)
        matrices = [matrix for layer in layers for matrix in mlp_in(model, layer)]
        if not self._running:
            texts = [t[:LONGEST] for t in self.setup.texts[: self.own_texts] if len(t) > 1]
            self._take(self._traced(model, matrices, [Example(tuple(t), 1) for t in texts]))
        traced = self._traced(model, matrices, examples(asked, records))
        self._take(traced)
        for matrix, (inputs, gradients) in zip(matrices, traced, strict=True):
            add_to(matrix, self._update(inputs, gradients))
        return asked

    def passes(self, example: Example) -> float:
        """One."""
        return 1

    def _update(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """(out, in) by inputs (n, in) and gradients (n, out)."""
        width = inputs.shape[1]
        both = self._of(inputs, gradients).normalised(torch.cat([inputs, gradients], 1))
        near, wanted = both.split([width, gradients.shape[1]], 1)
        values = -self.rate / width * near.pow(2).sum(1, keepdim=True) * wanted
        left = inputs.T @ inputs + torch.eye(width).to(inputs)
        return torch.linalg.solve(left, inputs.T @ values).T

    def _of(self, inputs: Tensor, gradients: Tensor) -> Running:
        """Matrices of one shape share their statistics, as there."""
        shape = (inputs.shape[1], gradients.shape[1])
        return self._running.setdefault(shape, Running())

    def _take(self, traced: Sequence[tuple[Tensor, Tensor]]) -> None:
        for inputs, gradients in traced:
            self._of(inputs, gradients).update(torch.cat([inputs, gradients], 1))

    def _traced(
        self, model: Any, matrices: Sequence[nn.Module], rows: Sequence[Example]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each matrix inputs and output gradients at the places that predict answers."""
        projects(model)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in matrices]
        for batch in step_batches(model, rows):
            some = [rows[at] for at in batch]
            places = [(row, at) for row, e in enumerate(some)
                      for at in range(e.start - 1, len(e.ids) - 1)]  # fmt: skip
            where = tuple(torch.tensor(side) for side in zip(*places, strict=True))
            with _kept(matrices) as kept:
                answers = answer_logits(model, some)
                torch.autograd.backward(
                    nn.functional.cross_entropy(answers.logits, answers.targets)
                )
            for part, (inputs, output) in zip(parts, kept, strict=True):
                part.append((inputs[where].float(), output.grad[where].float()))
        return [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]


@contextmanager
def _kept(matrices: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of matrices as they run, the outputs with their gradients."""
    kept: list[Any] = [None] * len(matrices)

    def keep(number: int, inputs: Tensor, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        kept[number] = (inputs.detach(), output)

    handles = [
        matrix.register_forward_hook(lambda _, i, o, number=number: keep(number, i[0], o))
        for number, matrix in enumerate(matrices)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
