"""The loop for many facts in one adapter: all of them a little, again and again.

Depth first, each fact to convergence before the next, is what makes the plain loop forget.  Here
every pass goes over all facts in a new order, a batch of them at a time, each under one of its
phrasings; beside them stand earlier facts and, to be said as the base model said it, protected
text.

    loss = cross-entropy(new) + weight * cross-entropy(earlier) + kl_weight * KL(base || model)
           + penalty_weight / sqrt(64 facts) * price

The weight is how many earlier facts there are for each new one, within bounds, so that the whole
stands for a sum over all facts.  The change of each matrix is linear in what is trained, and moves
by ``PolyakMomentum``.

Invariants:
- The number of steps is known from the start: passes over the group, then some for what is not
  recalled yet.
- The allocator's last mask is run before the last passes: what is merged was trained pruned.
- A run that goes on from where another one stood takes the steps that the other would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kvedit.config import GroupConfig
from kvedit.model.prompts import Example
from kvedit.training.loop import Loop, LoopResult
from kvedit.training.optimizer import PolyakMomentum
from kvedit.training.resume import Keep, State

WARM_UP = 5
LAST_RATE = 0.1  # of the learning rate, at the end of the passes, and of each round
AGAIN_RATE = 0.4  # of it, at the beginning of a round for what is not recalled then
YIELD = 0.5  # of the price's weight, in each of these rounds
CROWD = 256  # facts; each of more is disturbed longer between two of its turns
MANY = 1000  # facts; of more there are more rounds
FEW_FAILING = 0.1  # of the facts: from then on near-ties are taught again too
PRUNE_AT, PRUNE_FOR = 0.6, 0.1  # when pruning begins, and how long it takes, as shares of the steps


LEAST_WEIGHT, MOST_WEIGHT = 0.5, 2.0  # of earlier facts' loss against that of the new ones
_KEPT = ("_order", "_margins", "_step_number", "_to_gain")  # by a bookmark, as they are
LEAST_REHEARSED = 16  # in each step, where there are so many: a repair is small, the store is not


def group_batch(group: GroupConfig, facts: int) -> int:
    """New facts in a step: ``batch`` of 64, and with the root of their number."""
    return min(facts, _scaled(group.batch_size, facts))


def reference_batch(group: GroupConfig, facts: int) -> int:
    """Protected texts in a step: ``reference_texts`` for 64 facts, and with the root of their number."""
    return _scaled(group.reference_texts, facts) if group.reference_texts else 0


def _scaled(number: int, facts: int) -> int:
    return max(1, round(number * math.sqrt(facts / 64)))


def _crowd(facts: int) -> float:
    """How many times too many they are for the lead and the length of steps of a few hundred."""
    return max(1.0, facts / CROWD)


def _rounds_of(group: GroupConfig, facts: int) -> int:
    """The most rounds after the passes: ``rounds`` for up to 1,000 facts, in proportion for more.

    Of thousands each round mends a smaller share, and near-ties have their turn late.
    """
    return math.ceil(group.refine_rounds * max(1.0, facts / MANY))


def _falling(step: int, steps: int) -> float:
    """The share of the rate at a step: long ones learn, and what they harm short ones mend."""
    return 1 - (1 - LAST_RATE) * step / steps


def _missed(held: Sequence[Sequence[bool]]) -> dict[int, list[int]]:
    """For each fact of which not every prompt holds it, the numbers of those that do not."""
    prompts = {
        fact: [i for i, holds in enumerate(each) if not holds] for fact, each in enumerate(held)
    }
    return {fact: missed for fact, missed in prompts.items() if missed}


@dataclass(slots=True)
class _Part:
    """The passes, or a round for what is missing after them: ``done`` of its ``steps``."""

    steps: int
    done: int = 0
    round: int = 0  # 0: the passes
    missing: dict[int, list[int]] = field(default_factory=dict)
    """Facts that are not recalled, each with the numbers of its prompts that are not."""


class GroupLoop(Loop):
    """A group being taught; ``keep`` is called after every step with how to get its state."""

    def __init__(self, group: GroupConfig, *given: Any, keep: Keep = lambda state: None) -> None:
        self._group, self._keep = group, keep
        super().__init__(*given)
        self._count = len(self._task.new)
        self._weight = group.penalty_scale / math.sqrt(64 * self._count)
        self._batch = group_batch(group, self._count)
        self._reference_texts = reference_batch(group, self._count)
        own, whole = _crowd(self._count), _crowd(self._count + self._task.earlier)
        self._lead = group.target_margin * whole**0.25
        # What is held already has its turn more seldom still: no step may be longer than it bears.
        self._rate = group.step_gain * math.sqrt(own / whole)
        self._again_rate = AGAIN_RATE / math.sqrt(own)
        self._rounds = _rounds_of(group, self._count)
        earlier = self._task.earlier / self._count
        self._earlier_weight = min(max(earlier, LEAST_WEIGHT), MOST_WEIGHT)
        self._part = _Part(max(8, math.ceil(group.epochs * self._count / self._batch)))
        self._total = self._part.steps
        self._order: list[int] = []  # facts of this pass that are still to come, the next one last
        self._margins: dict[int, float] = {}  # of earlier facts, when last seen
        self._step_number = 0
        self._to_gain = 0.0  # the loss at the beginning

    def state(self) -> State:
        """As for any loop, and which step of what comes next."""
        own = {name: getattr(self, name) for name in _KEPT}
        return {**super().state(), **own, "part": asdict(self._part)}

    def resume(self, state: State) -> None:
        """As for any loop."""
        super().resume(state)
        for name in _KEPT:
            setattr(self, name, state[name])
        self._part = _Part(**state["part"])

    def run(self) -> LoopResult:
        """The passes, then rounds for what is still missing."""
        if self._part.round == 0:
            self._steps(self._pass)
            self._begin_round()
        while self._part.missing and self._part.round <= self._rounds:
            self._steps(self._again)
            self._begin_round()
        learned = not self._part.missing
        return LoopResult(self._step_number, learned, self._loss, self._penalty)

    def _steps(self, take: Callable[[int], None]) -> None:
        """All that are left of this part."""
        while self._part.done < self._part.steps:
            take(self._part.done + 1)
            self._part.done += 1
            self._keep(self.state)

    def _pass(self, step: int) -> None:
        """A step on the facts whose turn it is."""
        total = self._part.steps
        prune, pruning = int(total * PRUNE_AT), total * PRUNE_FOR
        if step == prune:
            self._phase = "prune"
            self._adapter.begin_pruning(step, steps=max(1, int(pruning)))
        elif step > prune + pruning:
            self._phase = "hold"
        facts = [self._next() for _ in range(self._batch)]
        self._teach([self._under_any(fact) for fact in facts], _falling(step, total))

    def _begin_round(self) -> None:
        """Look what is not recalled yet: it is taught next, at half the price that it had."""
        missing = self._missing()
        steps = math.ceil(self._group.refine_epochs * len(missing) / self._batch)
        self._part = _Part(steps, 0, self._part.round + 1, missing)
        if self._part.round <= self._rounds and missing:
            self._phase = "again"
            self._weight *= YIELD
            self._total += steps

    def _again(self, step: int) -> None:
        """A step on what is missing, under prompts that miss it, with as many others beside it."""
        missing = self._part.missing
        hard = self._some(sorted(missing), self._batch // 2 or 1)
        more = {self._next() for _ in range(self._batch - len(hard))} - set(hard)
        again = [self._task.new[fact][self._rng.choice(missing[fact])] for fact in hard]
        share = self._again_rate * _falling(step, self._part.steps)
        self._teach([*again, *(self._under_any(fact) for fact in sorted(more))], share)

    def _under_any(self, fact: int) -> Example:
        """The fact under one of its prompts."""
        return self._rng.choice(list(self._task.new[fact]))

    def _teach(self, new: Sequence[Example], share: float) -> None:
        """One step on some of the facts, each under a prompt."""
        self._step_number += 1
        rise = min(1.0, (self._step_number - 1) / WARM_UP)  # the first step only looks
        self._set_rate(self._rate * self._to_gain * rise * share)
        chosen = self._earlier()
        earlier = [self._rng.choice(list(self._task.rehearsal[fact])) for fact in chosen]
        margins = self._step(self._step_number, new, earlier)[len(new) :]
        self._margins.update(zip(chosen, margins, strict=True))
        if self._step_number == 1:
            self._to_gain = self._loss

    def _earlier(self) -> list[int]:
        """Earlier facts to rehearse: half the weakest when last seen, half at random."""
        if not self._group.rehearsal_ratio:
            return []
        share = min(1.0, len(self._task.rehearsal) / len(self._task.new))
        rows = max(LEAST_REHEARSED, math.ceil(self._batch * share * self._group.rehearsal_ratio))
        count = min(rows, len(self._task.rehearsal))
        weak = sorted(self._margins, key=self._margins.__getitem__)[: count // 2]
        others = sorted(set(range(len(self._task.rehearsal))) - set(weak))
        return [*weak, *self._some(others, count - len(weak))]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        _, vectors = self._adapter.parameters()
        return PolyakMomentum(vectors, lr=self._group.step_gain)

    def _ease(self) -> tuple[float, float]:
        return self._lead, self._group.easy_token_weight

    def _held(self) -> Tensor | float:
        reference_texts = self._task.reference_texts
        weight = self._group.kl_weight
        if (
            reference_texts is None
            or not len(reference_texts)
            or not weight
            or not self._reference_texts
        ):
            return 0.0
        chosen = self._some(range(len(reference_texts)), self._reference_texts)
        return weight * self._share.divergence(
            reference_texts, self._model, chosen, self._prefix_cache
        )

    def _missing(self) -> dict[int, list[int]]:
        """The facts that are not recalled, and under which of their prompts, with the final ranks.

        When few fail, those that hang on a near-tie are missing too: the next edit would turn them.
        Of thousands most do for a long time, and they would take the places of those that fail.
        """
        self._adapter.write()
        facts = self._task.new
        asked = [example for fact in facts for example in fact]
        outcomes = iter(self._share.recall(self._model, asked, self._prefix_cache))
        of_facts = [list(islice(outcomes, len(fact))) for fact in facts]
        failing = _missed([[outcome.passed for outcome in fact] for fact in of_facts])
        if len(failing) > FEW_FAILING * self._count:
            return failing
        return _missed([[outcome.robust for outcome in fact] for fact in of_facts])

    def _next(self) -> int:
        """Every fact once, in a new order each time."""
        if not self._order:
            self._order = self._rng.sample(range(self._count), self._count)[::-1]
        return self._order.pop()
