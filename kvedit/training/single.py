"""The loop that trains one fact, or a few that are all in every step: learn, prune, hold.

- learn: until every example of the step's batches, and then every training prompt, is recalled;
- prune: AdaLoRA's allocator shrinks the ranks to their budget over a fixed number of steps;
- hold: with the final ranks, until every training prompt is recalled again, by a margin that
  rounding in another batch cannot turn, and the penalty has fallen to its bound (it peaks while the
  fact is learned and falls after: stopping at the first recall would commit the peak).
"""

from kvedit.model.prompts import Example
from kvedit.training.loop import Loop, LoopResult, Setup

WARM_UP = 3
"""Steps over which the rate rises: Adam's first steps have full length whatever the gradient is."""
LAST_RATE = 0.2
"""Of the learning rate, at the last step; the rate falls to it in a straight line."""
PATIENCE = 24
"""Steps after which the penalty weight of a fact that is not learned yet begins to fall."""
PENALTY_DECAY = 0.95
"""Factor of the penalty weight at each of these further steps, about a half in 14 steps."""


class SingleLoop(Loop):
    """Until the facts are learned, pruned and held."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._pruned_at = 0
        self._streak = 0
        self._margin = float("-inf")  # the smallest of a new example in the last batch

    def run(self) -> LoopResult:
        """Go through the phases.  Raises TrainingError for a loss that is not a number."""
        config = self._config
        for step in range(1, config.max_steps + 1):
            rise, fall = min(1.0, step / WARM_UP), 1 - (1 - LAST_RATE) * step / config.max_steps
            self._set_rate(config.learning_rate * rise * fall)
            if self._phase == "learn" and step > PATIENCE:
                self._penalty_weight *= PENALTY_DECAY
            new, earlier = self._draw()
            self._margin = min(self._step(step, new, earlier)[: len(new)])
            self._streak = self._streak + 1 if self._margin > 0 else 0
            if self._finished(step):
                return LoopResult(step, True, self._loss, self._penalty)
        learned = self._phase != "learn" and self._all_recalled(0.0)
        return LoopResult(config.max_steps, learned, self._loss, self._penalty)

    def _after_update(self, step: int) -> None:
        if self._phase == "hold" and self._penalty > self._config.max_penalty:
            self._adapter.shrink(self._config.singular_value_decay)
        self._adapter.allocate(step)

    def _draw(self) -> tuple[list[Example], list[Example]]:
        """A few phrasings of each new fact, and one phrasing of some earlier facts."""
        count = self._config.phrasings_per_step
        new = [e for fact in self._task.new for e in self._sample(fact, count)]
        facts = self._sample(self._task.rehearsal, self._config.rehearsal_facts)
        return new, [self._rng.choice(list(fact)) for fact in facts]

    def _finished(self, step: int) -> bool:
        """Move from phase to phase; True when the facts are held with the final ranks."""
        config = self._config
        if self._phase == "prune":
            if step > self._pruned_at:
                self._phase = "hold"
            return False
        last = step >= config.max_steps - config.prune_steps - 1
        if self._phase == "learn" and last:  # learned or not: un-pruned ranks are never merged
            self._prune_from(step)
            return False
        if self._streak < config.hold_steps:
            return False
        if self._phase == "hold":
            return self._within_bounds(step)
        if self._all_recalled(0.0):
            self._prune_from(step)
        return False

    def _prune_from(self, step: int) -> None:
        steps = max(1, min(self._config.prune_steps, self._config.max_steps - step - 1))
        self._phase, self._pruned_at = "prune", step + steps
        self._adapter.begin_pruning(step, steps=steps)

    def _within_bounds(self, step: int) -> bool:
        """Whether penalty and margin are within their bounds, or have had their time to get there.

        A numerical tie does not count: free generation, in other batch shapes, may turn it.
        """
        if step - self._pruned_at >= self._config.max_hold_steps:
            return self._all_recalled(0.0, robustly=True)
        within = self._penalty <= self._config.max_penalty
        return within and self._all_recalled(self._config.min_margin, robustly=True)

    def _all_recalled(self, margin: float, *, robustly: bool = False) -> bool:
        """Whether every training prompt of every new fact is recalled by more than ``margin``.

        The last batch is a sample that costs nothing: where it fails, the others are not tried.
        """
        if self._margin <= margin:
            return False
        self._adapter.write()
        outcomes = self._worker.recall([e for fact in self._task.new for e in fact])
        return all(o.margin > margin and (o.robust or not robustly) for o in outcomes)
