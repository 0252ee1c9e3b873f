"""The loop that trains some facts in turn: a few in each step, until all are recalled.

For a model that talks.  Its facts pull the matrices in directions that differ more than those of
short texts learned by heart, and the mean gradient of many moves little: with six facts in a step
the loss of twelve was 0.8 after twelve turns of each, with two 0.5 after eight (log of 2026-11-29).
So steps are those of a single fact, and a fact rests as soon as it was recalled in two turns.  What
the group shares is all the rest: the start, what must stay, the probes and the commit.

Invariants:
- A fact rests only while it was recalled when last looked at.
- All prompts of a fact are looked at again after its last turn, and not before.
"""

import math
from collections import deque
from collections.abc import Sequence

from kvedit.model.prompts import Example
from kvedit.training.loops.loop import LoopResult, Setup
from kvedit.training.loops.single import PATIENCE, PROGRESS, SingleLoop

FACTS_TOGETHER = 16
"""At most: more cost no less each, and more is lost if one fails."""
FACTS_PER_STEP = 2
MOMENTUM = 0.5
"""Of a step: a step sees a few of the facts, and what it does to the others is only seen later."""
GAIN = 0.7
"""Of ``step_gain``: with the momentum a gradient moves by ``GAIN / (1 - MOMENTUM)`` of it."""
MOST_TURNS = 6
"""Of each fact, where that is more than ``max_steps`` in all: what is not recalled by then is
learned sooner by an adapter that starts at its own gradient (log of 2026-11-30)."""
TURNS_PATIENCE = 4
"""Turns of each fact without progress after which training ends, though not before as many steps
as for a single fact: the next group, or a training of its own, takes what is left further."""
LOOKS = 2
"""Turns in a row in which a fact must be recalled, each under another phrasing, before it rests: to
look at all of its prompts costs as much as two of its turns."""


def for_facts(number: float, facts: int) -> int:
    """A number that is right for a single fact, for so many in turn: ranks and reference texts grow
    with the square root of theirs.
    """
    return math.ceil(number * math.sqrt(facts))


class TurnsLoop(SingleLoop):
    """Until all facts are recalled, or the loss of those that are not stops falling."""

    _momentum = MOMENTUM

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._count = len(self._task.new)
        self._round = math.ceil(self._count / FACTS_PER_STEP)  # steps in which each has its turn
        self._resting: set[int] = set()
        self._looks = [0] * self._count  # turns in a row in which each fact was recalled
        self._recalled: set[int] = set()  # facts with all prompts, that had no turn since
        self._waiting: list[int] = []  # those whose turn is still to come, the next one last
        self._losses: deque[float] = deque(maxlen=self._round)
        self._set_rate(GAIN * self._config.step_gain)

    def run(self) -> LoopResult:
        """Take the steps.  Raises TrainingError for a loss that is not a number."""
        most = self._config.max_steps
        steps = self._total = self._pace * max(most, self._round * min(MOST_TURNS, most))
        for step in range(1, steps + 1):
            facts = self._next_facts()
            new = [example for fact in facts for example in self._prompts(fact)]
            earlier = self._earlier()
            study = self._study.draw(self._task.study_config.per_step) if self._study else []
            margins = self._measure(step, new, earlier, [*study, *self._study.beside(earlier, 1)])
            self._note(facts, margins[: len(new)])
            if len(self._resting) == self._count and self._all_recalled():
                return self._result(step, learned=True)
            self._wake()
            if self._has_stalled(step):
                return self._result(step, learned=False, stalled=True)
            self._update()
        self._adapter.write()
        return self._result(steps, learned=False)  # what is left is looked at before it is refined

    def _next_facts(self) -> list[int]:
        """Facts that do not rest, each once before any has its next turn."""
        facts: list[int] = []
        while len(facts) < min(FACTS_PER_STEP, self._count - len(self._resting)):
            if not self._waiting:
                awake = [i for i in range(self._count) if i not in {*self._resting, *facts}]
                self._waiting = self._sample(awake, len(awake))
            facts.append(self._waiting.pop())
        self._recalled.difference_update(facts)
        return facts

    def _prompts(self, fact: int) -> list[Example]:
        """One phrasing of a fact for each step that a single fact would have two in."""
        drawn = self._sample(self._task.new[fact], len(self._task.new[fact]))
        drawn.sort(key=lambda example: example not in self._failing)  # stable
        return drawn[: math.ceil(self._config.phrasings_per_step / FACTS_PER_STEP)]

    def _note(self, facts: Sequence[int], margins: Sequence[float]) -> None:
        """Let facts rest that were recalled by the minimum margin often enough."""
        self._losses.append(self._fact_loss)
        each = len(margins) // len(facts)
        for place, fact in enumerate(facts):
            lowest = min(margins[place * each : (place + 1) * each])
            self._looks[fact] = self._looks[fact] + 1 if lowest > self._config.min_margin else 0
            if self._looks[fact] >= LOOKS:
                self._resting.add(fact)

    def _all_recalled(self) -> bool:
        """Whether all prompts of the facts that had a turn since their last look are recalled."""
        facts = [number for number in range(self._count) if number not in self._recalled]
        self._failing = self._not_recalled([e for fact in facts for e in self._task.new[fact]])
        self._recalled.update(f for f in facts if self._failing.isdisjoint(self._task.new[f]))
        return not self._failing

    def _wake(self) -> None:
        """After a check of all facts that failed: those with prompts that are not recalled.

        Progress counts from there: more facts are left than before.
        """
        if len(self._resting) == self._count:
            self._lowest = math.inf
            self._resting = {
                number for number, fact in enumerate(self._task.new)
                if self._failing.isdisjoint(fact)
            }  # fmt: skip

    def _has_stalled(self, step: int) -> bool:
        """Whether the mean loss of a round has stopped falling; easy facts rest, so that it may
        rise when few are left: then their number is progress.
        """
        mean = sum(self._losses) / len(self._losses)
        left = (mean + 1.0) * (self._count - len(self._resting))
        if left < PROGRESS * self._lowest:
            self._lowest, self._lowest_at = left, step
        patience = max(TURNS_PATIENCE * self._round, PATIENCE)
        return step - self._lowest_at >= self._pace * patience
