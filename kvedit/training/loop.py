"""The loop that teaches facts to an adapter: learn, prune, hold.

    loss = cross-entropy(new facts) + cross-entropy(earlier facts) + penalty_weight * price

The price is the predicted harm to protected text (see ``fisher``); it stands in for
the control rows that would otherwise be in every batch.  The loop has three phases:

- learn: until every example of a step's batches, and then every training prompt, is recalled;
- prune: AdaLoRA's allocator shrinks the ranks to their budget over a fixed number of steps;
- hold: with the final ranks, until every training prompt is recalled again, by more than rounding
  could turn in another batch, and the price has fallen to its bound (it peaks while the fact is
  learned and falls after: stopping at the first recall would commit the peak).

Invariants:
- The base weights never change here; only the adapter's values do.
- Randomness comes from the generator that is handed in: the same edit on the same model gives the
  same adapter on the same machine.
- A loss that is not a number ends the edit with TrainingError; nothing was merged yet.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kvedit.adapter.adalora import Adapter
from kvedit.config import TrainingConfig
from kvedit.errors import TrainingError
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example
from kvedit.model.scoring import TokenScores
from kvedit.replay.kl import ReferenceTexts
from kvedit.training.resume import State
from kvedit.training.share import Share

ADAM_BETAS = (0.9, 0.99)
VECTORS_SHARE = 0.3  # of the learning rate: directions turn more slowly than they grow
WARM_UP = 3
EASY_TOKEN_WEIGHT = 0.3  # weight of an answer token that leads by enough
FEW = 4
PATIENCE = 24  # steps after which a fact that is not learned yet is priced lower and lower
YIELD = 0.95


@dataclass(frozen=True, slots=True)
class Task:
    """What to teach, each new fact as one example a training prompt; what to rehearse; and what
    the base model says to protected text, which only groups are held to at every step.

    ``earlier`` is how many facts the weights hold already, rehearsed or not.
    """

    new: Sequence[Sequence[Example]]
    rehearsal: Sequence[Sequence[Example]] = ()
    reference_texts: ReferenceTexts | None = None
    earlier: int = 0


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
    """How the loop ended; ``learned``: every training prompt recalled with the final ranks."""

    steps: int
    learned: bool
    loss: float
    penalty: float


OnStep = Callable[[Step], None]


def train(
    model: Any,
    adapter: Adapter,
    task: Task,
    config: TrainingConfig,
    rng: random.Random,
    on_step: OnStep = lambda step: None,
    prefix_cache: PrefixCache | None = None,
    share: Share | None = None,
) -> LoopResult:
    """Run the loop; the adapter must be reset and turned on.  Raises TrainingError for NaN."""
    return SingleLoop(model, adapter, task, config, rng, on_step, prefix_cache, share).run()


class Loop:
    """The state of one run, and one step of it; which examples, and when it ends, is to be said."""

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        task: Task,
        config: TrainingConfig,
        rng: random.Random,
        on_step: OnStep,
        prefix_cache: PrefixCache | None,
        share: Share | None = None,
    ) -> None:
        self._share = share or Share()
        self._model, self._adapter, self._task = model, adapter, task
        self._prefix_cache = prefix_cache
        self._config, self._rng, self._on_step = config, rng, on_step
        self._accelerator = Accelerator()
        self._optimizer = self._make_optimizer()
        self._phase = "learn"
        self._weight, self._earlier_weight = config.penalty_weight, 1.0
        self._total = config.max_steps
        self._loss = self._penalty = 0.0

    def state(self) -> State:
        """Where the run stands between two steps."""
        return {
            "adapter": self._adapter.state(),
            "optimizer": self._optimizer.state_dict(),
            "rng": self._rng.getstate(),
            "phase": self._phase,
            "weight": self._weight,
            "total": self._total,
            "loss": self._loss,
            "penalty": self._penalty,
        }

    def resume(self, state: State) -> None:
        """Go on from where another run of the same lesson stood."""
        self._adapter.resume(state["adapter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.setstate(state["rng"])
        self._phase, self._weight, self._total = state["phase"], state["weight"], state["total"]
        self._loss, self._penalty = state["loss"], state["penalty"]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        values, vectors = self._adapter.parameters()
        groups = [{"params": values, "share": 1.0}, {"params": vectors, "share": VECTORS_SHARE}]
        return torch.optim.Adam(groups, lr=self._config.learning_rate, betas=ADAM_BETAS, fused=True)

    def _step(self, step: int, new: Sequence[Example], earlier: Sequence[Example]) -> list[float]:
        """One update; returns the margins, in logits, that each example had before it."""
        self._adapter.write()
        with self._accelerator.autocast():
            scores = self._share.scores(self._model, [*new, *earlier], self._prefix_cache)
            held = self._held()
        loss = _loss(scores, len(new), len(earlier), *self._ease(), self._earlier_weight)
        penalty = self._adapter.penalty().to(loss.device)
        self._accelerator.backward(loss + held + self._share.once(self._weight * penalty))
        self._share.sum_gradients(self._adapter)
        self._adapter.read_gradients()
        self._optimizer.step()
        self._after_update()
        self._adapter.allocate(step)
        self._optimizer.zero_grad(set_to_none=True)
        seen = torch.stack([loss.detach(), penalty.detach()])
        # A GPU is waited for once.
        told = torch.cat([seen, scores.margins(len(new) + len(earlier))]).tolist()
        self._loss, self._penalty, margins = told[0], self._share.agreed(told[1]), told[2:]
        if self._loss != self._loss or self._penalty != self._penalty:
            raise TrainingError(
                f"the training loss became NaN at step {step}",
                hint="Lower [training] learning_rate in kvedit.toml, or load the model in fp32.",
            )
        recalled = sum(margin > 0 for margin in margins[: len(new)])
        self._on_step(
            Step(step, self._total, self._phase, self._loss, self._penalty, recalled, len(new))
        )
        return margins

    def _ease(self) -> tuple[float, float]:
        """The lead from which a token is pushed less, in logits, and its weight then."""
        return self._config.target_margin, EASY_TOKEN_WEIGHT

    def _held(self) -> Tensor | float:
        """What else a step is to keep: a loss."""
        return 0.0

    def _after_update(self) -> None:
        """Called when the optimizer has moved, before the allocator masks."""

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)

    def _some(self, items: Sequence[Any], count: int) -> list[Any]:
        return self._rng.sample(list(items), min(count, len(items)))


class SingleLoop(Loop):
    """One fact, or a few that are all in every step: until they are learned, pruned and held."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._pruned_at = 0
        self._streak = 0
        self._lead = float("-inf")  # the smallest margin of a new example in the last batch

    def run(self) -> LoopResult:
        """Go through the phases."""
        config = self._config
        for step in range(1, config.max_steps + 1):
            rise, fall = min(1.0, step / WARM_UP), 1 - 0.8 * step / config.max_steps
            self._set_rate(config.learning_rate * rise * fall)
            if self._phase == "learn" and step > PATIENCE:
                self._weight *= YIELD
            new, earlier = self._draw()
            self._lead = min(self._step(step, new, earlier)[: len(new)])
            self._streak = self._streak + 1 if self._lead > 0 else 0
            if self._finished(step):
                return LoopResult(step, True, self._loss, self._penalty)
        learned = self._phase != "learn" and self._all_recalled(0.0)
        return LoopResult(config.max_steps, learned, self._loss, self._penalty)

    def _after_update(self) -> None:
        if self._phase == "hold" and self._penalty > self._config.max_penalty:
            self._adapter.shrink(self._config.singular_value_decay)

    def _draw(self) -> tuple[list[Example], list[Example]]:
        """A few phrasings of each new fact, and of some earlier facts one each."""
        count = self._config.phrasings_per_step
        new = [e for fact in self._task.new for e in self._some(fact, count)]
        facts = self._some(self._task.rehearsal, self._config.rehearsal_facts)
        return new, [self._rng.choice(list(fact)) for fact in facts]

    def _finished(self, step: int) -> bool:
        """Move from phase to phase; True when the fact is held with the final ranks."""
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
            return self._settled(step)
        if self._all_recalled(0.0):
            self._prune_from(step)
        return False

    def _prune_from(self, step: int) -> None:
        steps = max(1, min(self._config.prune_steps, self._config.max_steps - step - 1))
        self._phase, self._pruned_at = "prune", step + steps
        self._adapter.begin_pruning(step, steps=steps)

    def _settled(self, step: int) -> bool:
        """Whether price and margin are within their bounds, or had their time to get there.

        A near-tie does not count: free generation, in batches of other shapes, may break it.
        """
        if step - self._pruned_at >= self._config.max_hold_steps:
            return self._all_recalled(0.0, robustly=True)
        within = self._penalty <= self._config.max_penalty
        return within and self._all_recalled(self._config.min_margin, robustly=True)

    def _all_recalled(self, lead: float, *, robustly: bool = False) -> bool:
        """Whether every training prompt of every new fact is recalled, by more than ``lead``.

        The last batch is a sample that costs nothing: where it falls short, the rest is not asked.
        """
        if self._lead <= lead:
            return False
        self._adapter.write()
        examples = [e for fact in self._task.new for e in fact]
        outcomes = self._share.recall(self._model, examples, self._prefix_cache)
        return all(o.margin > lead and (o.robust or not robustly) for o in outcomes)


def _loss(
    scores: TokenScores, new: int, others: int, lead: float, settled: float, earlier: float
) -> Tensor:
    """Cross-entropy of the answer tokens that do not lead yet: those of ``new`` facts, and
    ``earlier`` times that of the ``others`` that follow them.

    Exact recall fails on one token, so a token that leads by ``lead`` logits counts little and the
    few that are left count more, each at most as one in ``FEW`` of its side.
    """
    weight = (lead - scores.token_margins).clamp(settled, 1.0)
    # Numbers, not an index: a GPU would be waited for to know how many there are.
    mine = (scores.rows < new).to(weight.dtype)
    loss = _weighted(scores.losses, weight, mine)
    return loss + earlier * _weighted(scores.losses, weight, 1 - mine) if others else loss


def _weighted(losses: Tensor, weight: Tensor, side: Tensor) -> Tensor:
    """The mean of those on one side, (N,) of ones and zeros."""
    own = weight * side
    return (losses * own).sum() / torch.maximum(own.sum(), side.sum() / FEW)
