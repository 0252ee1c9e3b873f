"""What the base model says to protected text, word for word, and how far the model has left it.

The price of ``fisher`` is a quadratic guess that adds up over edits; the divergence measured
here is the thing itself, on a sample of the text in every step.

Few tokens diverge much: those that come out otherwise by now.  Their gradients are long and share
no direction, so they drowned all others, and as noise they shortened every step.  ``robust_mean``
keeps them in bounds, but not so small that what is lost is let go.

Invariants:
- What is kept was said by the base model, whatever was edited since.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.facts.keys import naming
from kvedit.model.devices import first_device
from kvedit.model.forward import last_hidden, project, projects
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import batches, padded, slices

CAUCHY_SCALE = 1.0
"""Nats: the divergence of a token from which on more of it counts for less and less."""


def robust_mean(divergences: Tensor) -> Tensor:
    """A scalar: the mean of the divergences d (N,), each as ``CAUCHY_SCALE log(1 + d / CAUCHY_SCALE)``.

    Cauchy's robust loss (Holland and Welsch 1977), a divergence being the square of a distance.
    """
    return CAUCHY_SCALE * (divergences / CAUCHY_SCALE).log1p().mean()


class ReferenceTexts:
    """Texts and the base model's last hidden states at their answer positions."""

    def __init__(
        self,
        examples: Sequence[Example],
        states: Sequence[Tensor],
        places: Sequence[int] | None = None,
    ) -> None:
        """``states`` (answer length, hidden) for each example, in the model's dtype; ``places`` are
        theirs among all that was measured.
        """
        self._examples, self._states = list(examples), list(states)
        self.places = list(range(len(examples)) if places is None else places)

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def examples(self) -> Sequence[Example]:
        """The texts."""
        return self._examples

    @classmethod
    def measure(
        cls, model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None = None
    ) -> ReferenceTexts:
        """Ask the model, which must be the base at this moment.

        A model whose logits are no projection of its last hidden states gets no anchors.
        """
        if not projects(model):
            return cls([], [])
        states: dict[int, Tensor] = {}
        for batch in batches(model, examples):
            part = [examples[i] for i in batch]
            with torch.no_grad():
                hidden, targets = _answers(model, part, prefix_cache)
            counts = (targets >= 0).sum(1).tolist()
            states.update(zip(batch, torch.split(hidden, counts), strict=True))
        return cls(examples, [states[i] for i in range(len(examples))])

    def without(self, names: Iterable[str]) -> ReferenceTexts:
        """Those whose questions name none of these: what is edited must not be said as before."""
        edited = naming(names)
        return self.at([i for i, one in enumerate(self._examples) if not edited(one.prompt)])

    def at(self, kept: Sequence[int]) -> ReferenceTexts:
        """Those at these indices."""
        return ReferenceTexts(
            [self._examples[i] for i in kept],
            [self._states[i] for i in kept],
            [self.places[i] for i in kept],
        )

    def divergences(
        self, model: nn.Module, chosen: Sequence[int], prefix_cache: PrefixCache | None = None
    ) -> Tensor:
        """(N,): KL(base || model) at each answer token, nats, in no particular order."""
        parts = []
        for batch in batches(model, [self._examples[i] for i in chosen]):
            own = [chosen[i] for i in batch]
            hidden, _ = _answers(model, [self._examples[i] for i in own], prefix_cache)
            with torch.no_grad():
                base = project(model, torch.cat([self._states[i] for i in own]))
            parts.append(_Divergence.apply(project(model, hidden), base))  # type: ignore[no-untyped-call]
        return torch.cat(parts)


def _answers(
    model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None
) -> tuple[Tensor, Tensor]:
    """The last hidden states at all answer positions, row by row, and the targets (rows, width)."""
    ids, targets = padded(examples)
    hidden = last_hidden(model, ids.to(first_device(model)), examples, prefix_cache)
    rows, places = (targets >= 0).nonzero(as_tuple=True)  # here: an accelerator is not waited for
    return hidden[rows.to(hidden.device), places.to(hidden.device)], targets


class _Divergence(torch.autograd.Function):
    """KL(base || model) of each row of logits (N, vocabulary), a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor) -> Tensor:
        found = torch.empty(len(logits), device=logits.device)
        for here in slices(logits):
            ours = logits[here].float().log_softmax(1)
            theirs = base[here].float().log_softmax(1)
            found[here] = (theirs.exp() * (theirs - ours)).sum(1)
        ctx.save_for_backward(logits, base)
        return found

    @staticmethod
    def backward(ctx: Any, penalty_gradients: Tensor) -> tuple[Tensor, None]:
        logits, base = ctx.saved_tensors
        back = torch.empty_like(logits)
        for here in slices(logits):
            apart = logits[here].float().softmax(1) - base[here].float().softmax(1)
            back[here] = apart * penalty_gradients[here, None]
        return back, None
