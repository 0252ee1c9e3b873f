"""What training a single fact and training a group have in common: one step of the loop.

    loss = cross-entropy(new facts) + weight * cross-entropy(earlier facts)
           + cross-entropy(study examples) + kl_weight * KL(before || now)
           + penalty_weight * Fisher penalty

The penalty is the predicted harm to protected text (see ``adapter.fisher``).  Which examples are in
a step, and when training ends, is decided by ``SingleLoop`` and ``GroupLoop``.

Invariants:
- The base weights never change here; only the adapter's values do.
- Randomness comes from the generator that is handed in: the same edit on the same model gives the
  same adapter on the same machine.
- A loss that is not a number ends the edit with TrainingError; nothing was merged yet.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.config import StudyConfig, TrainingConfig
from kvedit.errors import TrainingError
from kvedit.model.prompts import Example
from kvedit.model.scoring import TokenScores
from kvedit.replay.kl import ReferenceTexts, Teacher
from kvedit.training.resume import State
from kvedit.training.study import Study
from kvedit.training.worker import Worker, answer_tokens

EASY_TOKEN_WEIGHT = 0.3
"""Weight in the loss of an answer token that has reached its target margin, for single facts;
groups have a setting of this name, because they need another value."""
MAX_TOKEN_SHARE = 4
"""A weighted mean over n tokens is divided by n / 4 at least: a token counts at most four times its
share, so that the last hard one of a batch does not take the whole gradient."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to train: the new facts and the rehearsed ones, each as one example a training prompt,
    and the reference texts: for a group what the base model says, for a single fact or facts in
    turn what the model says before the edit to texts that are easily harmed.

    With ``in_turn`` each step takes a few of the new facts, else all of them (see ``turns``).
    ``earlier`` is the number of facts that the weights hold already, rehearsed or not.  ``study``
    has what is trained besides of each new fact, then of each rehearsed one (see ``study``); the
    ``teacher`` knows other answers to some of it than the labels.
    """

    new: Sequence[Sequence[Example]]
    rehearsal: Sequence[Sequence[Example]] = ()
    reference_texts: ReferenceTexts | None = None
    earlier: int = 0
    study: Sequence[Sequence[Example]] = ()
    study_config: StudyConfig = field(default_factory=StudyConfig)
    in_turn: bool = False
    teacher: Teacher | None = None

    @property
    def tells_prompts_apart(self) -> bool:
        """Whether prompts of one fact have answers of their own, as when a fact is removed."""
        return any(len({example.answer for example in fact}) > 1 for fact in self.new)


@dataclass(frozen=True, slots=True)
class Step:
    """Where the loop stands; ``recalled`` of ``n`` new examples in the step's batch."""

    step: int
    total: int
    phase: str
    loss: float
    penalty: float
    recalled: int
    n: int


@dataclass(frozen=True, slots=True)
class LoopResult:
    """How the loop ended; ``learned``: every training prompt was recalled, and that was looked at,
    ``stalled``: the loss had stopped falling before that.
    """

    steps: int
    learned: bool
    loss: float
    penalty: float
    stalled: bool = False


OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a loop works with; the adapter must be reset and turned on.  ``reads``: the model reads
    prose.
    """

    worker: Worker
    adapter: Adapter
    task: Task
    config: TrainingConfig
    rng: random.Random
    on_step: OnStep
    reads: bool = False


class Loop:
    """The state of one training run, and one step of it."""

    _saved: tuple[str, ...] = (
        "_phase", "_penalty_weight", "_total", "_loss", "_penalty", "_mean_weights",
        "_study_weights",
    )  # fmt: skip
    """What a training checkpoint has besides adapter, optimizer and random state."""

    def __init__(self, setup: Setup) -> None:
        self._worker, self._adapter, self._task = setup.worker, setup.adapter, setup.task
        self._config, self._rng, self._on_step = setup.config, setup.rng, setup.on_step
        self._reads = setup.reads
        task = self._task
        self._study = Study(task.new, task.rehearsal, task.study, self._rng)
        self._optimizer = self._make_optimizer()
        self._phase = "learn"
        self._penalty_weight, self._earlier_weight = self._config.penalty_weight, 1.0
        self._references, self._kl_weight = self._config.reference_texts, self._config.kl_weight
        self._total = self._config.max_steps
        self._loss = self._penalty = 0.0
        self._fact_loss = 0.0  # without the study examples
        self._measured_loss = 0.0  # what the gradients are of: see ``StepLoss``
        self._mean_weights = torch.ones(2)  # of the last step's tokens, see ``StepLoss``
        self._study_weights = torch.ones(2)

    def state(self) -> State:
        """Where the run stands between two steps."""
        return {
            "adapter": self._adapter.state(),
            "optimizer": self._optimizer.state_dict(),
            "rng": self._rng.getstate(),
            "study": self._study.margins,
            **{name: getattr(self, name) for name in self._saved},
        }

    def resume(self, state: State) -> None:
        """Go on from where another run of the same task stood."""
        self._adapter.resume(state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.setstate(state["rng"])
        self._study.margins = state["study"]
        for name in self._saved:
            setattr(self, name, state[name])

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of what the adapter trains."""
        raise NotImplementedError

    def _step(
        self,
        step: int,
        new: Sequence[Example],
        earlier: Sequence[Example],
        study: Sequence[Example] = (),
    ) -> list[float]:
        """One update; returns the margins, in logits, that each fact's example had before it."""
        margins = self._measure(step, new, earlier, study)
        self._update()
        return margins

    def _measure(
        self,
        step: int,
        new: Sequence[Example],
        earlier: Sequence[Example],
        study: Sequence[Example] = (),
    ) -> list[float]:
        """Loss and gradients on some examples; returns the margins, in logits, of the facts'."""
        self._adapter.write()
        loss = StepLoss(new, earlier, self._easing(), self._earlier_weight, self._mean_weights)
        scores = self._worker.backward([*new, *earlier], loss)
        study_loss, study_measured = self._backward_study(study)
        self._backward_divergence()
        penalty = self._adapter.penalty()
        weighted = self._worker.once(self._penalty_weight * penalty)
        self._worker.accelerator.backward(weighted)
        self._worker.sum_gradients(self._adapter)
        self._adapter.read_gradients()
        measured, self._mean_weights = loss.of(scores), loss.weights_of(scores)
        data_loss = loss(scores)
        values = torch.stack([data_loss, measured, penalty.detach().to(data_loss.device)])
        # One transfer, so that a GPU is waited for once.
        numbers = torch.cat([values, scores.margins(len(new) + len(earlier))])
        self._fact_loss, measured_loss, penalty_value, *margins = numbers.tolist()
        self._loss = self._fact_loss + study_loss
        self._measured_loss = measured_loss + study_measured
        self._penalty = self._worker.agreed(penalty_value)
        if math.isnan(self._loss) or math.isnan(self._penalty):
            raise TrainingError(
                f"the training loss became NaN at step {step}",
                hint="Lower step_gain in kvedit.toml, or load the model in fp32.",
            )
        recalled, of_new = sum(margin > 0 for margin in margins[: len(new)]), len(new)
        state = Step(step, self._total, self._phase, self._loss, self._penalty, recalled, of_new)
        self._on_step(state)
        return margins

    def _backward_study(self, study: Sequence[Example]) -> tuple[float, float]:
        """Add the gradients of study examples, which weigh as much as the facts' texts together;
        returns their loss, and what the gradients are of.
        """
        if not study:
            return 0.0, 0.0
        loss = StepLoss(study, (), self._easing(), 0.0, self._study_weights)
        scores = self._worker.backward(study, loss, self._task.teacher)
        measured, self._study_weights = float(loss.of(scores)), loss.weights_of(scores)
        self._study.note(study, scores.margins(len(study)).tolist())
        return float(loss(scores)), measured

    def _update(self) -> None:
        """Move by the gradients that were measured."""
        self._optimizer.step(lambda: self._measured_loss)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self._adapter.clear_gradients()
        self._optimizer.zero_grad(set_to_none=True)

    def _easing(self) -> tuple[float, float]:
        """The margin, in logits, from which a token counts less, and its weight then."""
        return self._config.target_margin, EASY_TOKEN_WEIGHT

    def _backward_divergence(self) -> None:
        """Add the gradients of the divergence on some of the reference texts."""
        texts, count, weight = self._task.reference_texts, self._references, self._kl_weight
        if texts and weight and count:
            chosen = self._sample(range(len(texts)), count)
            self._worker.backward_divergence(texts, chosen, weight)

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def _sample(self, items: Sequence[Any], count: int) -> list[Any]:
        return self._rng.sample(list(items), min(count, len(items)))


class StepLoss:
    """Weighted cross-entropy of a step's answer tokens: of the new facts, plus ``earlier_weight``
    times that of the earlier ones, each a sum over tokens that is divided by its weights' sum.

    Exact recall fails on a single token, so tokens that have reached their target margin count
    little and the few others more, each at most ``MAX_TOKEN_SHARE`` times its share of its side;
    ``easing`` is that of ``Loop``.  Where a step has several batches, the sum of its weights is not
    known before the last one: it is then the number of tokens times ``mean_weights`` (2,), those of
    the step before.
    """

    def __init__(
        self,
        new: Sequence[Example],
        earlier: Sequence[Example],
        easing: tuple[float, float],
        earlier_weight: float,
        mean_weights: Tensor,
    ) -> None:
        self._new, self._easing = len(new), easing
        self._counts = answer_tokens(new), answer_tokens(earlier)
        self._shares, self._mean_weights = (1.0, earlier_weight), mean_weights

    def __call__(self, scores: TokenScores) -> Tensor:
        """The part of the loss that these tokens have; all of it if they are all."""
        if len(scores.losses) == sum(self._counts):
            self._mean_weights = self.weights_of(scores)
        return self.of(scores)

    def of(self, scores: TokenScores) -> Tensor:
        """The same with the mean weights of the last call."""
        means = self._mean_weights.to(scores.losses.device).clamp_min(1 / MAX_TOKEN_SHARE)
        counts = torch.tensor(self._counts, device=means.device).clamp_min(1)
        factors = torch.tensor(self._shares, device=means.device) / (means * counts)
        return ((self._weights(scores) @ scores.losses) * factors).sum()

    def weights_of(self, scores: TokenScores) -> Tensor:
        """(2,): the mean weights of new and earlier facts' tokens; one without tokens."""
        sums = self._weights(scores).sum(1)
        return torch.stack([s / n if n else s + 1 for s, n in zip(sums, self._counts, strict=True)])

    def _weights(self, scores: TokenScores) -> Tensor:
        """(2, N): the weights of the tokens of either side, zero on the other."""
        weight = (self._easing[0] - scores.token_margins).clamp(self._easing[1], 1.0)
        # Numbers, not an index: a GPU would be waited for to know how many there are.
        of_new = (scores.rows < self._new).to(weight.dtype)
        return torch.stack([weight * of_new, weight * (1 - of_new)])
