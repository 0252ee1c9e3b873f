"""ROME (Meng et al. 2022, arXiv 2202.05262; kmeng01/rome): one rank-one update of one MLP matrix.

W + (v - W k) (C^-1 k)^T / (k^T C^-1 k): k is the matrix's input at the key's last token, averaged
over contexts, v the output that brings the answer about (``values``), C the second moment of inputs
over text.  Settings of EasyEdit's ``hparams/ROME/llama3-8b.yaml``, block 5 of 32, with C as in the
paper; C is that of texts which the model wrote by itself instead of Wikipedia's, and therefore
damped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvedit.model.prompts import Example
from tests.bench.field.asked import Asked
from tests.bench.field.layers import (
    add_to,
    at_keys,
    contexts,
    layer_at,
    mlp_out,
    placed,
    second_moments,
)
from tests.bench.field.method import Method
from tests.bench.field.records import Record
from tests.bench.field.values import ValueSettings, wanted_value


@dataclass(kw_only=True)
class Rome(Method):
    """``damping`` is a share of C's mean eigenvalue; ``contexts`` stand before the prompt besides
    none (twenty in the paper).
    """

    depth: float = 5 / 32
    contexts: int = 5
    damping: float = 0.01
    value: ValueSettings = field(default_factory=ValueSettings)
    _moment: Any = field(default=None, init=False)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """One record after the other."""
        model = asked.model
        matrix = mlp_out(model, layer_at(model, self.depth))
        befores = contexts(asked.renderer, self.setup.texts, self.contexts)
        if self._moment is None:
            self._moment = damped(
                second_moments(model, [matrix], self.setup.texts)[0], self.damping
            )
        for record in records:
            rows = placed(asked, record, befores)
            keys, _ = at_keys(model, matrix, rows)
            initial, wanted = wanted_value(asked, matrix, record, rows, self.value)
            left = torch.linalg.solve(self._moment, keys.mean(0).double())
            right = (wanted - initial).double() / (keys[0].double() @ left)
            add_to(matrix, torch.outer(right, left))
        return asked

    def passes(self, example: Example) -> float:
        """One a step of the search for v, each context and the KL row."""
        return self.value.steps * (self.contexts + 2)

    def settings(self) -> dict[str, Any]:
        """With those of the search for v."""
        return {**super().settings(), "value": asdict(self.value)}


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A second moment with a share of its mean eigenvalue on the diagonal: of few tokens it is not
    of full rank.
    """
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
