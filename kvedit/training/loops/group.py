"""The loop that trains many facts in one adapter: every fact a little in each of many epochs.

Training each fact to convergence before the next is what makes sequential fine-tuning forget.  Here
an epoch goes over all facts in a new order, a batch at a time, each under one of its phrasings;
beside them stand earlier facts and reference texts, on which the output must stay the base model's.

    loss = cross-entropy(new) + weight * cross-entropy(earlier) + kl_weight * KL(base || model)
           + penalty_scale / sqrt(64 facts) * Fisher penalty

The weight is the number of earlier facts for each new one, within bounds, so that the loss stands
for a sum over all facts.  The change of each matrix is linear in what is trained, and is optimized
by ``PolyakMomentum``.

Invariants:
- The epochs' number of steps is known from the start; refine rounds for the facts that are not
  recalled yet follow.
- All ranks are trained and merged.
- A run that is resumed takes the steps that the interrupted one would have taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch

from kvedit.adapter.adalora import group_rank
from kvedit.config import GroupConfig
from kvedit.model.prompts import Example
from kvedit.training import memory
from kvedit.training.loops.loop import Loop, LoopResult, Setup
from kvedit.training.optimizer import PolyakMomentum
from kvedit.training.resume import State

# Where a number below names a day, docs/log of that day has the measurements.
WARM_UP = 5
"""Steps over which the rate rises from zero: the first only measures the loss, which is then the
unit of the step length."""
LAST_RATE = 0.1
"""Of the rate, at the end of the epochs and of each refine round."""
REFINE_RATE = 0.4
"""Of the epochs' rate, at the beginning of a refine round."""
PENALTY_DECAY = 0.5
"""Factor of the penalty weight in each refine round: the last few facts are held back by it."""
CROWDED = 256
"""Facts; in larger groups each is disturbed for longer between two of its turns, so the target
margin grows with the fourth root of how many times 256 they are, and steps shrink with the square
root (2026-11-26)."""
MORE_ROUNDS = 1000
"""Facts; larger groups get proportionally more refine rounds, because each mends a smaller share of
them (2026-11-26)."""
FEW_FAILING = 0.1
"""Of the facts: when fewer fail, those recalled by a numerical tie are refined too."""
MIN_EARLIER_WEIGHT, MAX_EARLIER_WEIGHT = 0.5, 2.0
"""Of earlier facts' loss against that of the new ones: a small group on top of a large store would
otherwise hardly be learned."""
MIN_REHEARSED = 16
"""Earlier facts in each step at least, where there are as many: a repair trains few facts, and all
that the store holds is at stake."""


def group_batch(group: GroupConfig, facts: int) -> int:
    """New facts in a step: ``batch_size`` for 64 facts, in proportion to the square root."""
    return min(facts, _scaled(group.batch_size, facts))


def reference_batch(group: GroupConfig, facts: int) -> int:
    """Reference texts in a step: ``reference_texts`` for 64 facts, and with the square root."""
    return _scaled(group.reference_texts, facts) if group.reference_texts else 0


def group_load(
    group: GroupConfig, facts: int, length: int = memory.TEXT_TOKENS, earlier: int | None = None
) -> memory.Load:
    """The load of a step that trains a group, beside so many ``earlier`` facts (None: beside as
    many as a step rehearses at most).
    """
    batch = group_batch(group, facts)
    rehearsed = max(MIN_REHEARSED, math.ceil(batch * group.rehearsal_ratio))
    return memory.Load(
        texts=batch + (rehearsed if earlier is None else min(rehearsed, earlier)),
        rank=group_rank(group.rank, facts),
        reference_texts=reference_batch(group, facts),
        length=length,
    )


def _scaled(number: int, facts: int) -> int:
    return max(1, round(number * math.sqrt(facts / 64)))


def _crowding(facts: int) -> float:
    """How many times more facts there are than margin and step length were tuned for."""
    return max(1.0, facts / CROWDED)


def _falling(step: int, steps: int) -> float:
    """The share of the rate at a step: long steps learn, and short ones mend what those harmed."""
    return 1 - (1 - LAST_RATE) * step / steps


def _missed(recalled: Sequence[Sequence[bool]]) -> dict[int, list[int]]:
    """The facts with prompts that are not recalled, each with the numbers of these prompts."""
    prompts = ([i for i, passed in enumerate(fact) if not passed] for fact in recalled)
    return {fact: missed for fact, missed in enumerate(prompts) if missed}


@dataclass(slots=True)
class _Part:
    """The epochs, or one refine round after them: ``done`` of its ``steps``."""

    steps: int
    done: int = 0
    round: int = 0  # 0: the epochs
    missing: dict[int, list[int]] = field(default_factory=dict)
    """Facts that are not recalled, each with the numbers of its prompts that are not."""


class GroupLoop(Loop):
    """The training of a group; ``after_step`` is called between two steps."""

    _saved = (*Loop._saved, "_order", "_margins", "_step_number", "_first_loss")

    def __init__(
        self, setup: Setup, group: GroupConfig, after_step: Callable[[], None] = lambda: None
    ) -> None:
        self._group, self._after_step = group, after_step
        super().__init__(setup)
        self._count = len(self._task.new)
        self._penalty_weight = group.penalty_scale / math.sqrt(64 * self._count)
        self._batch = group_batch(group, self._count)
        self._references = reference_batch(group, self._count)
        self._kl_weight = group.kl_weight
        of_group = _crowding(self._count)
        of_all = _crowding(self._count + self._task.earlier)
        self._target_margin = group.target_margin * of_all**0.25
        # Earlier facts have their turn more seldom still, so steps must be short enough for them.
        self._rate = group.step_gain * math.sqrt(of_group / of_all)
        self._refine_rate = REFINE_RATE / math.sqrt(of_group)
        self._rounds = math.ceil(group.refine_rounds * max(1.0, self._count / MORE_ROUNDS))
        earlier = self._task.earlier / self._count
        self._earlier_weight = min(max(earlier, MIN_EARLIER_WEIGHT), MAX_EARLIER_WEIGHT)
        self._part = _Part(max(8, math.ceil(group.epochs * self._count / self._batch)))
        self._total = self._part.steps
        self._order: list[int] = []  # facts still to come in this epoch, the next one last
        self._margins: dict[int, float] = {}  # of earlier facts, when last rehearsed
        self._step_number = 0
        self._first_loss = 0.0

    def state(self) -> State:
        """As for any loop, and where the epochs or the round stand."""
        return {**super().state(), "part": asdict(self._part)}

    def resume(self, state: State) -> None:
        """As for any loop."""
        super().resume(state)
        self._part = _Part(**state["part"])

    def run(self) -> LoopResult:
        """The epochs, then refine rounds for what fails.  Raises TrainingError for NaN."""
        if self._part.round == 0:
            self._run_part(self._epoch_step)
            self._begin_round()
        while self._part.missing and self._part.round <= self._rounds:
            self._run_part(self._refine_step)
            self._begin_round()
        learned = not self._part.missing
        return LoopResult(self._step_number, learned, self._loss, self._penalty)

    def _run_part(self, take_step: Callable[[int], None]) -> None:
        """All steps that are left of this part."""
        while self._part.done < self._part.steps:
            take_step(self._part.done + 1)
            self._part.done += 1
            self._after_step()

    def _epoch_step(self, step: int) -> None:
        """A step on the next facts of the epoch."""
        facts = [self._next() for _ in range(self._batch)]
        rate = _falling(step, self._part.steps)
        self._train_on([self._any_prompt(fact) for fact in facts], rate)

    def _begin_round(self) -> None:
        """Find what is not recalled yet: it is trained next, with half the penalty weight."""
        missing = self._missing()
        steps = math.ceil(self._group.refine_epochs * len(missing) / self._batch)
        self._part = _Part(steps, 0, self._part.round + 1, missing)
        if self._part.round <= self._rounds and missing:
            self._phase = "refine"
            self._penalty_weight *= PENALTY_DECAY
            self._total += steps

    def _refine_step(self, step: int) -> None:
        """A step on missing facts, under prompts that fail, and on as many others."""
        missing = self._part.missing
        failing = self._sample(sorted(missing), self._batch // 2 or 1)
        others = {self._next() for _ in range(self._batch - len(failing))} - set(failing)
        failed = [self._task.new[fact][self._rng.choice(missing[fact])] for fact in failing]
        rate = self._refine_rate * _falling(step, self._part.steps)
        self._train_on([*failed, *(self._any_prompt(fact) for fact in sorted(others))], rate)

    def _any_prompt(self, fact: int) -> Example:
        return self._rng.choice(list(self._task.new[fact]))

    def _train_on(self, new: Sequence[Example], rate: float) -> None:
        """One step on some facts, each under a prompt; ``rate`` is a share of the longest."""
        self._step_number += 1
        rise = min(1.0, (self._step_number - 1) / WARM_UP)
        self._set_rate(self._rate * self._first_loss * rise * rate)
        chosen = self._rehearsed()
        earlier = [self._rng.choice(list(self._task.rehearsal[fact])) for fact in chosen]
        study = self._study.beside(new, self._task.study_config.per_fact)
        study += self._study.beside(earlier, 1)
        margins = self._step(self._step_number, new, earlier, study)[len(new) :]
        self._margins.update(zip(chosen, margins, strict=True))
        if self._step_number == 1:
            self._first_loss = self._loss

    def _rehearsed(self) -> list[int]:
        """Earlier facts for a step: half of the lowest margins when last seen, half random."""
        if not self._group.rehearsal_ratio:
            return []
        share = min(1.0, len(self._task.rehearsal) / len(self._task.new))
        rows = max(MIN_REHEARSED, math.ceil(self._batch * share * self._group.rehearsal_ratio))
        count = min(rows, len(self._task.rehearsal))
        weak = sorted(self._margins, key=self._margins.__getitem__)[: count // 2]
        others = sorted(set(range(len(self._task.rehearsal))) - set(weak))
        return [*weak, *self._sample(others, count - len(weak))]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return PolyakMomentum(self._adapter.trained(), lr=self._group.step_gain)

    def _easing(self) -> tuple[float, float]:
        return self._target_margin, self._group.easy_token_weight

    def _missing(self) -> dict[int, list[int]]:
        """The facts that are not recalled, and the prompts that fail.

        When few fail, numerical ties count as failures, because the next edit would turn them.  Of
        thousands of facts most are ties for a long time and would take the places of failing ones.
        """
        self._adapter.write()
        facts = self._task.new
        outcomes = iter(self._worker.recall([example for fact in facts for example in fact]))
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
