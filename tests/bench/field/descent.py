"""Training by fixed numbers of epochs, as the editors of the literature do it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.model.prompts import Example
from kvedit.model.scoring import answer_logits

LossOf = Callable[[Sequence[Example]], Tensor]


def epochs(
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Example],
    loss_of: LossOf,
    *,
    rate: float,
    epochs: int,
    batch: int,
    enough: float = 0.0,
    shuffle: random.Random | None = None,
    after: Callable[[], None] = lambda: None,
) -> int:
    """Adam over batches; a batch whose loss is below ``enough`` makes no step, an epoch whose mean
    is ends the training.  ``after`` runs after every batch.  Returns the steps made.
    """
    optimizer, steps = torch.optim.Adam(list(parameters), lr=rate), 0
    order = list(rows)
    for _ in range(epochs):
        if shuffle is not None:
            shuffle.shuffle(order)
        losses = []
        for at in range(0, len(order), batch):
            some = order[at : at + batch]
            loss = loss_of(some)
            losses += [float(loss.detach())] * len(some)
            if losses[-1] >= enough:
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                steps += 1
            after()
        if sum(losses) / len(losses) < enough:
            break
    return steps


def answer_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """The mean over examples of the mean cross-entropy of the answer, its end token included."""
    answers = answer_logits(model, rows)
    losses = nn.functional.cross_entropy(answers.logits, answers.targets, reduction="none")
    lengths = torch.bincount(answers.rows, minlength=len(rows))
    return (losses / lengths[answers.rows]).sum() / len(rows)


def last_prompt_token_loss(model: Any, rows: Sequence[Example]) -> Tensor:
    """The same with every token of the answer asked of the prompt's last token alone: the objective
    of FT in ROME's and MEMIT's code, EasyEdit's ``prompt_last``.
    """
    first = [Example(row.ids[: row.start + 1], row.start) for row in rows]
    answers = answer_logits(model, first)
    scores = answers.logits.log_softmax(-1)
    losses = [
        -table[torch.tensor(row.ids[row.start :], device=table.device)].mean()
        for table, row in zip(scores, rows, strict=True)
    ]
    return torch.stack(losses).mean()
