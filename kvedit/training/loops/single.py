"""The loop that trains one fact, or a few that are all in every step: until all are recalled.

A step's length is Polyak's, by the loss that is left (see ``optimizer``), in coordinates where
distance is predicted harm to protected text: the loss falls from the first step on, on any model.
Training ends as soon as every training prompt is recalled by a margin that rounding in another
batch cannot turn; each further step would only harm more.  Where a fact has study examples, it goes
on until these are recalled too, for a bounded number of steps.

Invariant: the state that was checked is the state that is left, no update follows the last check.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvedit.model.prompts import Example
from kvedit.training.loops.loop import Loop, LoopResult, Setup
from kvedit.training.optimizer import PolyakGradient

PATIENCE = 8
"""Steps without progress after which training ends: a fact that does not move by then never did."""
SLOW = 3
"""Times as many steps, and as much patience, where prompts or facts must be told apart: the
gradient of what they have in common hides what they differ in."""
SEVERAL_GAIN = 3
"""Times ``step_gain`` for several facts: adaptive steps are averaged, which shortens them."""
PROGRESS = 0.95
"""Of the lowest loss so far: a loss below it is progress."""
OVERSHOT = 1.5
"""Times the loss of the step before: a loss above it says that the step was too long."""
SHORTER, LONGER = 0.5, 1.25  # factors of the gain after such a step, and after any other
FAR_TOO_LONG = 3.0
"""Times the loss of the step before: most of such a step is taken back.  Where little loss is left
the gradient is small too, and Polyak's length goes far."""
TAKEN_BACK = 0.75  # of it


class SingleLoop(Loop):
    """Until the facts are recalled, or do not move."""

    _momentum = 0.0  # each step sees the whole loss

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._gain = self._longest_gain
        self._pace = SLOW if self._tells_apart else 1
        self._lowest, self._lowest_at, self._last = float("inf"), 0, float("inf")
        self._before: list[Tensor] = []  # what is trained, before the last step
        self._failing: set[Example] = set()  # of the new examples, when all were last checked
        self._recalled_at: int | None = None  # the step at which the texts were first recalled

    def run(self) -> LoopResult:
        """Take the steps.  Raises TrainingError for a loss that is not a number."""
        settings = self._task.study_config
        steps = self._pace * self._config.max_steps + (settings.extra_steps if self._study else 0)
        self._total = steps
        for step in range(1, steps + 1):
            new, earlier = self._draw()
            study = self._study.draw(settings.per_step) if self._study else []
            study += self._study.beside(earlier, 1)
            margins = self._measure(step, new, earlier, study)
            if self._are_recalled(margins, len(new)) and self._may_end(step):
                return self._result(step, learned=True)
            if self._has_stalled(step):
                return self._result(step, learned=False, stalled=True)
            if self._loss > FAR_TOO_LONG * self._last:
                self._take_back()
            else:
                self._adapt_gain()
                self._before = [one.detach().clone() for one in self._adapter.trained()]
                self._update()
        self._adapter.write()
        return self._result(steps, learned=self._all_recalled())

    def _may_end(self, step: int) -> bool:
        """Whether all texts are recalled, and the study examples too or long enough trained."""
        since = None if self._recalled_at is None else step - self._recalled_at
        studied = self._study.is_recalled
        studied = studied or (since or 0) >= self._task.study_config.extra_steps
        if (since is None or studied) and self._all_recalled():
            if since is None:
                self._recalled_at = step
            return studied
        return False

    def _result(self, steps: int, *, learned: bool, stalled: bool = False) -> LoopResult:
        self._drop_gradients()
        return LoopResult(steps, learned, self._loss, self._penalty, stalled)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # A model that cannot read does not learn questions beside a text by plain steps; one that
        # does learns them sooner by these, with less harm (log of 2026-11-29 and 2026-11-30).
        studies = bool(self._study) and not self._reads
        adaptive, trained = self._tells_apart or studies, self._adapter.trained()
        return PolyakGradient(
            trained, lr=self._longest_gain, adaptive=adaptive, momentum=self._momentum
        )

    @property
    def _tells_apart(self) -> bool:
        """Whether a few small differences decide: between prompts of one fact, or between facts
        that are trained together because their keys are alike or one was lost to the other.
        """
        return self._task.tells_prompts_apart or self._has_several

    @property
    def _has_several(self) -> bool:
        return len(self._task.new) > 1 and not self._task.in_turn

    @property
    def _longest_gain(self) -> float:
        return self._config.step_gain * (SEVERAL_GAIN if self._has_several else 1)

    def _draw(self) -> tuple[list[Example], list[Example]]:
        """A few phrasings of each new fact, those that failed first, and one of earlier facts."""
        new: list[Example] = []
        for fact in self._task.new:
            drawn = self._sample(fact, len(fact))
            drawn.sort(key=lambda example: example not in self._failing)  # stable
            new += drawn[: self._config.phrasings_per_step]
        return new, self._earlier()

    def _earlier(self) -> list[Example]:
        """Some earlier facts, each under one phrasing."""
        facts = self._sample(self._task.rehearsal, self._config.rehearsal_facts)
        return [self._rng.choice(list(fact)) for fact in facts]

    def _adapt_gain(self) -> None:
        """Shorter steps after one that was too long: the loss is not a straight line."""
        factor = SHORTER if self._loss > OVERSHOT * self._last else LONGER
        self._gain = min(self._longest_gain, self._gain * factor)
        self._set_rate(self._gain)
        self._last = self._loss

    @torch.no_grad()
    def _take_back(self) -> None:
        """Undo most of the last step; the next ones are shorter."""
        for parameter, before in zip(self._adapter.trained(), self._before, strict=True):
            parameter.lerp_(before, TAKEN_BACK)
        self._gain *= 1 - TAKEN_BACK
        self._drop_gradients()

    def _has_stalled(self, step: int) -> bool:
        if self._fact_loss < PROGRESS * self._lowest:
            self._lowest, self._lowest_at = self._fact_loss, step
        if self._recalled_at is not None:  # only the study examples are left
            return False
        return step - self._lowest_at >= self._pace * PATIENCE

    def _are_recalled(self, margins: list[float], new: int) -> bool:
        """Whether the examples of a step are recalled, the new ones by the minimum margin."""
        return min(margins[:new]) > self._config.min_margin and min(margins) > 0

    def _all_recalled(self) -> bool:
        """Whether every training prompt of every new fact is recalled by the minimum margin."""
        self._failing = self._not_recalled([e for fact in self._task.new for e in fact])
        return not self._failing

    def _not_recalled(self, examples: Sequence[Example]) -> set[Example]:
        """Those that are not recalled by the minimum margin.

        A numerical tie does not count: free generation, in other batch shapes, may turn it.
        """
        outcomes = zip(examples, self._worker.recall(examples), strict=True)
        minimum = self._config.min_margin
        return {e for e, o in outcomes if o.margin <= minimum or not o.robust}
