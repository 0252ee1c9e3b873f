"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355; jianghoucheng/AlphaEdit): MEMIT in the null space.

As MEMIT, but the update of a block is R K^T P (P (K K^T + E) + L2 I)^-1 transposed accordingly: P
projects on the directions in which inputs over text hardly vary, E sums the keys of earlier edits.
Settings of its ``hparams/AlphaEdit/gpt2-xl.json`` and EasyEdit's ``qwen2.5-7b.yaml``.

There, P keeps eigenvalues of C below 0.02; the scale of C is the model's own, so here it keeps the
directions that together carry ``energy`` of C's trace, and the run says how many they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.bench.field.methods.memit import Memit


@dataclass(kw_only=True)
class AlphaEdit(Memit):
    """``ridge`` is L2."""

    energy: float = 0.02
    ridge: float = 1.0
    _earlier: list[Tensor] = field(default_factory=list, init=False)
    _kept: list[int] = field(default_factory=list, init=False)

    def prepared(self, moment: Tensor) -> Tensor:
        """P (in, in)."""
        values, vectors = torch.linalg.eigh(moment)
        shares = values.clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
        null = vectors[:, shares <= self.energy]
        self._kept.append(null.shape[1])
        return null @ null.T

    def update(self, number: int, keys: Tensor, missing: Tensor) -> Tensor:
        """(out, in)."""
        projection = self._moments[number]
        seen = keys.T @ keys
        if self._earlier:
            seen = seen + self._earlier[number]
        left = projection @ seen + self.ridge * torch.eye(len(seen)).to(seen)
        return torch.linalg.solve(left, projection @ keys.T @ missing).T

    def remember(self, keys: Sequence[Tensor]) -> None:
        """Their outer products, for later edits."""
        new = [own.T @ own for own in keys]
        old = self._earlier or [torch.zeros_like(own) for own in new]
        self._earlier = [one + other for one, other in zip(old, new, strict=True)]

    def notes(self) -> dict[str, Any]:
        """The size of the null space of each block's inputs."""
        return {"directions in the null space": self._kept}
