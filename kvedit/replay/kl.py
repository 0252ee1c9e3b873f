"""Reference texts, and the KL divergence of the edited model from the base model on them; a
teacher, which is the model with a text before its questions.

The Fisher penalty is a quadratic approximation whose errors add up over edits; here the divergence
itself is measured, on a sample of the texts in every step.  Few tokens diverge much: those whose
prediction has changed.  Their gradients are large and share no direction, so they drowned all
others and, as noise, shortened every step; ``robust_mean`` bounds them.

Invariants:
- The reference states are the base model's, whatever was edited since.
- A teacher's states are measured once, before the training that it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.facts.keys import naming
from kvedit.model.forward import project, projects
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import Answers, answer_states, batches, slices

CAUCHY_SCALE = 1.0  # nats: a token's divergence beyond it counts less and less


def robust_mean(divergences: Tensor) -> Tensor:
    """A scalar: the mean of ``c log(1 + d / c)`` over divergences d (N,); c is ``CAUCHY_SCALE``.

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
        """``states`` (answer length, hidden) for each example, in the model's dtype; ``places``
        are the examples' indices among all that were measured.
        """
        self.examples, self._states = tuple(examples), tuple(states)
        self.places = list(range(len(examples)) if places is None else places)

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def measure(
        cls, model: nn.Module, examples: Sequence[Example], prefix_cache: PrefixCache | None = None
    ) -> ReferenceTexts:
        """Compute the states with ``model``, which must be the unedited base model.

        A model whose logits are no projection of its last hidden states gets no reference texts.
        """
        if not projects(model):
            return cls([], [])
        states: dict[int, Tensor] = {}
        for batch in batches(model, examples):
            part = [examples[i] for i in batch]
            with torch.no_grad():
                hidden = answer_states(model, part, prefix_cache)
            counts = [len(one.ids) - one.start for one in part]
            states.update(zip(batch, torch.split(hidden, counts), strict=True))
        return cls(examples, [states[i] for i in range(len(examples))])

    @property
    def states(self) -> tuple[Tensor, ...]:
        """(answer length, hidden) for each example."""
        return self._states

    def without(self, names: Iterable[str]) -> ReferenceTexts:
        """The texts whose prompts mention none of ``names``: edited answers may change."""
        edited = naming(names)
        return self.at([i for i, one in enumerate(self.examples) if not edited(one.prompt)])

    def at(self, indices: Sequence[int]) -> ReferenceTexts:
        """The texts at these indices."""
        return ReferenceTexts(
            [self.examples[i] for i in indices],
            [self._states[i] for i in indices],
            [self.places[i] for i in indices],
        )

    def divergences(
        self, model: nn.Module, chosen: Sequence[int], prefix_cache: PrefixCache | None = None
    ) -> Tensor:
        """(N,): KL(base || model) at each answer token, nats, in no particular order."""
        parts = []
        for batch in batches(model, [self.examples[i] for i in chosen]):
            indices = [chosen[i] for i in batch]
            hidden = answer_states(model, [self.examples[i] for i in indices], prefix_cache)
            with torch.no_grad():
                base = project(model, torch.cat([self._states[i] for i in indices]))
            parts.append(_Divergence.apply(project(model, hidden), base))  # type: ignore[no-untyped-call]
        return torch.cat(parts)


class Teacher:
    """What a model says to questions when it reads the text that answers them, as a training target
    for the questions alone (context distillation: Askell et al., arXiv:2112.00861).

    Kept are the last hidden states, from which the whole distribution follows: fewer numbers than
    its fifty highest logits with their tokens have for a small model, and no tail is lost.  An
    answer token that the teacher would not give is learned from its label.
    """

    def __init__(self, states: Mapping[Example, Tensor]) -> None:
        """``states`` (answer length, hidden) for each question, an example without the text."""
        self._states = dict(states)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        pairs: Sequence[tuple[Example, Example]],
        prefix_cache: PrefixCache | None = None,
    ) -> Teacher:
        """Compute the states for pairs of a question without and with the text, whose answers have
        the same tokens.  A model whose logits are no projection of its states teaches nothing.
        """
        read = ReferenceTexts.measure(model, [told for _, told in pairs], prefix_cache)
        asked = [question for question, _ in pairs][: len(read)]
        return cls(dict(zip(asked, read.states, strict=True)))

    def __len__(self) -> int:
        return len(self._states)

    def losses(
        self, model: nn.Module, examples: Sequence[Example], answers: Answers, losses: Tensor
    ) -> Tensor:
        """(N,): at each answer token KL(teacher || model), nats, in place of the cross-entropy in
        ``losses``, for the questions that it has an answer to.
        """
        taught = [(at, self._states[one]) for at, one in enumerate(examples) if one in self._states]
        if not taught:
            return losses
        of_taught = torch.tensor([at for at, _ in taught], device=answers.rows.device)
        places = torch.isin(answers.rows, of_taught).nonzero()[:, 0]
        with torch.no_grad():
            told = project(model, torch.cat([states for _, states in taught]))
        divergences = _Divergence.apply(answers.logits[places], told)  # type: ignore[no-untyped-call]
        agrees = told.argmax(1) == answers.targets[places]
        return losses.index_put((places,), torch.where(agrees, divergences, losses[places]))


class _Divergence(torch.autograd.Function):
    """KL(base || model) of each row of logits (N, vocabulary), a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor) -> Tensor:
        divergences = torch.empty(len(logits), device=logits.device)
        for rows in slices(logits):
            model_log_p = logits[rows].float().log_softmax(1)
            base_log_p = base[rows].float().log_softmax(1)
            divergences[rows] = (base_log_p.exp() * (base_log_p - model_log_p)).sum(1)
        ctx.save_for_backward(logits, base)
        return divergences

    @staticmethod
    def backward(ctx: Any, divergence_gradients: Tensor) -> tuple[Tensor, None]:
        logits, base = ctx.saved_tensors
        gradients = torch.empty_like(logits)
        for rows in slices(logits):
            difference = logits[rows].float().softmax(1) - base[rows].float().softmax(1)
            gradients[rows] = difference * divergence_gradients[rows, None]
        return gradients, None
