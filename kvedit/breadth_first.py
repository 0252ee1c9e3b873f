"""The loop for many facts in one adapter: all of them a little, again and again.

Depth first, each fact to convergence before the next, is what makes the plain loop forget.  Here
every pass goes over all facts in a new order, a batch of them at a time, each under one of its
phrasings; beside them stand earlier facts and, to be said as the base model said it, protected
text.

    loss = cross-entropy(new) + weight * cross-entropy(earlier) + anchor_weight * KL(base || model)
           + shift_weight / sqrt(64 facts) * price

The weight is how many earlier facts there are for each new one, within bounds, so that the whole
stands for a sum over all facts.  The change of each matrix is linear in what is trained, and moves
by ``Descent``.

Invariants:
- The number of steps is known from the start: passes over the group, then some for what is not
  recalled yet.
- The allocator's last mask is run before the last passes: what is merged was trained pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvedit.config import GroupConfig
from kvedit.descent import Descent
from kvedit.training import Loop, Trained

WARM_UP = 5
LAST_RATE = 0.1  # of the learning rate, at the end of the passes, and of each round
AGAIN_RATE = 0.4  # of it, at the beginning of a round for what is not recalled then
YIELD = 0.5  # of the price's weight, from each of these rounds to the next
PRUNE_AT, PRUNE_FOR = 0.6, 0.1  # when pruning begins, and how long it takes, as shares of the steps


LEAST_WEIGHT, MOST_WEIGHT = 0.5, 2.0  # of earlier facts' loss against that of the new ones
LEAST_REHEARSED = 16  # in each step, where there are so many: a repair is small, the store is not


def batch_of(group: GroupConfig, facts: int) -> int:
    """New facts in a step: ``batch`` of 64, and with the root of their number."""
    return min(facts, _scaled(group.batch, facts))


def anchors_of(group: GroupConfig, facts: int) -> int:
    """Protected texts in a step: ``anchors`` for 64 facts, and with the root of their number."""
    return _scaled(group.anchors, facts) if group.anchors else 0


def _scaled(number: int, facts: int) -> int:
    return max(1, round(number * math.sqrt(facts / 64)))


def _falling(step: int, steps: int) -> float:
    """The share of the rate at a step: long ones learn, and what they harm short ones mend."""
    return 1 - (1 - LAST_RATE) * step / steps


class BreadthFirst(Loop):
    """A group being taught."""

    def __init__(self, group: GroupConfig, *given: Any) -> None:
        self._group = group
        super().__init__(*given)
        count = len(self._lesson.new)
        self._weight = group.shift_weight / math.sqrt(64 * count)
        self._batch, self._anchors = batch_of(group, count), anchors_of(group, count)
        self._earlier_weight = min(max(self._lesson.earlier / count, LEAST_WEIGHT), MOST_WEIGHT)
        self._total = max(8, math.ceil(group.passes * count / self._batch))
        self._order = self._passes(count)
        self._margins: dict[int, float] = {}  # of earlier facts, when last seen
        self._step_number = 0
        self._to_gain = 0.0  # the loss at the beginning

    def run(self) -> Trained:
        """The passes, then what is still missing."""
        prune = int(self._total * PRUNE_AT)
        for step in range(1, self._total + 1):
            if step == prune:
                self._phase = "prune"
                self._adapter.begin_pruning(step, steps=max(1, int(self._total * PRUNE_FOR)))
            elif step > prune + self._total * PRUNE_FOR:
                self._phase = "hold"
            share = _falling(step, self._total)
            self._teach([next(self._order) for _ in range(self._batch)], share)
        missing = self._carry_on(self._missing())
        return Trained(self._step_number, not missing, self._loss, self._price)

    def _carry_on(self, missing: list[int]) -> list[int]:
        """Teach what is not recalled yet, with as many others beside it, for a few rounds."""
        self._phase = "again"
        for _ in range(self._group.rounds):
            if not missing:
                break
            self._weight *= YIELD
            steps = math.ceil(self._group.again * len(missing) / self._batch)
            self._total += steps
            for step in range(1, steps + 1):
                hard = self._some(missing, self._batch // 2 or 1)
                more = [next(self._order) for _ in range(self._batch - len(hard))]
                self._teach(list({*hard, *more}), AGAIN_RATE * _falling(step, steps))
            missing = self._missing()
        return missing

    def _teach(self, facts: Sequence[int], share: float) -> None:
        """One step on some of the facts."""
        self._step_number += 1
        rise = min(1.0, (self._step_number - 1) / WARM_UP)  # the first step only looks
        self._set_rate(self._group.learning_rate * self._to_gain * rise * share)
        new = [self._rng.choice(list(self._lesson.new[fact])) for fact in facts]
        chosen = self._earlier()
        earlier = [self._rng.choice(list(self._lesson.rehearsal[fact])) for fact in chosen]
        margins = self._step(self._step_number, new, earlier)[len(new) :]
        self._margins.update(zip(chosen, margins.tolist(), strict=True))
        if self._step_number == 1:
            self._to_gain = self._loss

    def _earlier(self) -> list[int]:
        """Earlier facts to rehearse: half the weakest when last seen, half at random."""
        if not self._group.rehearsal:
            return []
        share = min(1.0, len(self._lesson.rehearsal) / len(self._lesson.new))
        rows = max(LEAST_REHEARSED, math.ceil(self._batch * share * self._group.rehearsal))
        count = min(rows, len(self._lesson.rehearsal))
        weak = sorted(self._margins, key=self._margins.__getitem__)[: count // 2]
        others = sorted(set(range(len(self._lesson.rehearsal))) - set(weak))
        return [*weak, *self._some(others, count - len(weak))]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        _, vectors = self._adapter.parameters()
        return Descent(vectors, lr=self._group.learning_rate)

    def _ease(self) -> tuple[float, float]:
        return self._group.lead, self._group.settled

    def _held(self) -> Tensor | float:
        anchors = self._lesson.anchors
        weight = self._group.anchor_weight
        if anchors is None or not len(anchors) or not weight or not self._anchors:
            return 0.0
        chosen = self._some(range(len(anchors)), self._anchors)
        return weight * self._share.divergence(anchors, self._model, chosen, self._lower)

    def _missing(self) -> list[int]:
        """The facts that are not recalled under all of their prompts, with the final ranks.

        One that hangs on a near-tie is not: the next edit would turn it.
        """
        self._adapter.write()
        asked = [(i, example) for i, fact in enumerate(self._lesson.new) for example in fact]
        outcomes = self._share.recall(self._model, [example for _, example in asked], self._lower)
        pairs = zip(asked, outcomes, strict=True)
        return sorted({fact for (fact, _), outcome in pairs if not outcome.firm})

    def _passes(self, count: int) -> Iterator[int]:
        """Every fact once, in a new order each time."""
        while True:
            yield from self._rng.sample(range(count), count)
