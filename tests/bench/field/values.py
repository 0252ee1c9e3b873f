"""The value that an edit should write: a vector at the key's last token that makes the answer come.

Formula: ``compute_v.py`` of kmeng01/rome and ``compute_z.py`` of kmeng01/memit.  Adam on a vector
that is added to a module's output at the key's last token; the loss is that of the answer behind
several contexts, a KL term on "{key} is a" and a decay; the vector stays within a ball.  Other than
there, the answer's end token is part of the answer, as for every method here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.model.forward import projects
from kvedit.model.prompts import Example
from kvedit.model.scoring import answer_logits
from tests.bench.field.asked import Asked
from tests.bench.field.layers import Placed, at_keys, key_end
from tests.bench.field.records import Record

ENOUGH = 5e-2  # loss at which the search ends, as there


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSettings:
    """Of the search: names in the papers' files are v_num_grad_steps, v_lr, v_weight_decay,
    kl_factor, clamp_norm_factor.
    """

    steps: int = 25
    rate: float = 0.5
    decay: float = 1e-3
    kl: float = 0.0625
    clamp: float = 4.0


def wanted_value(
    asked: Asked, module: nn.Module, record: Record, rows: Sequence[Placed], settings: ValueSettings
) -> tuple[Tensor, Tensor]:
    """(hidden,) twice: what the module puts out at the first row's key, and what it should."""
    model = asked.model
    projects(model)  # tried before the module is changed
    initial = at_keys(model, module, rows[:1])[1][0]
    kl_row = _kl_row(asked, record)
    texts = [*(row.example for row in rows), kl_row.example]
    places = torch.tensor([*(row.at for row in rows), kl_row.at])
    delta = torch.zeros_like(initial, requires_grad=True)
    optimizer, before = torch.optim.Adam([delta], lr=settings.rate), None
    most = settings.clamp * initial.norm()
    for step in range(settings.steps):
        with _added(module, delta, places):
            answers = answer_logits(model, texts)
        own = answers.rows < len(rows)
        now = answers.logits[~own].log_softmax(-1)
        before = now.detach() if before is None else before
        loss = _answer_loss(answers.logits[own], answers.targets[own], answers.rows[own])
        loss = loss + settings.kl * nn.functional.kl_div(
            before, now, log_target=True, reduction="batchmean"
        )
        loss = loss + settings.decay * delta.norm() / initial.norm() ** 2
        if float(loss.detach()) < ENOUGH or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, float(most / delta.norm().clamp_min(1e-12)))
    return initial, initial + delta.detach()


def _kl_row(asked: Asked, record: Record) -> Placed:
    """The key in a sentence that begins; one token is asked there, so that it has logits."""
    whole = asked.renderer.example(f"{record.key} is a", record.target)
    at = key_end(asked.renderer, whole, record.key)
    return Placed(Example(whole.ids[: at + 2], at + 1), at)


def _answer_loss(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    lengths = torch.bincount(rows)
    return (losses / lengths[rows]).sum() / len(lengths)


@contextmanager
def _added(module: nn.Module, delta: Tensor, places: Tensor) -> Iterator[None]:
    """Inside, the vector is added to the module's output at one place of every row."""

    def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        shift = torch.zeros_like(hidden)
        shift[torch.arange(len(places)), places] = delta.to(hidden.dtype)
        hidden = hidden + shift
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
