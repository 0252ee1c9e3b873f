"""Where the training of a task starts: which gradients decide it."""

from __future__ import annotations

import random

from kvedit.config import GroupConfig
from kvedit.model.prompts import Example
from kvedit.training.group import MAX_EARLIER_WEIGHT
from kvedit.training.loop import Task

SINGLE_REHEARSAL_REACH = 20
"""Earlier facts that a single fact's training keeps recalled by rehearsing a few of them: with more
of them the gradient term of the accumulated delta is scaled down in proportion."""
START_FACTS = 64
"""At most so many facts give the gradient that the adapter starts from: it has few directions."""


def start_examples(task: Task, rng: random.Random) -> list[Example]:
    """The examples whose gradient the adapter starts from: a prompt or two of each fact."""
    facts = rng.sample(list(task.new), min(START_FACTS, len(task.new)))
    each = 2 if len(facts) <= START_FACTS // 4 else 1
    return [e for fact in facts for e in rng.sample(list(fact), min(each, len(fact)))]


def accumulated_share(task: Task, group: GroupConfig | None) -> float:
    """How much of the gradient term of the accumulated delta a task takes: 0 to 1.

    The penalty alone would undo everything that earlier edits changed, and only rehearsal speaks
    for their facts.  Where the loss counts them as fewer than they are, the penalty must be scaled
    alike: a repair of six facts would otherwise undo what hundreds need.
    """
    earlier = max(task.earlier, len(task.rehearsal))
    reach = SINGLE_REHEARSAL_REACH if group is None else MAX_EARLIER_WEIGHT * len(task.new)
    return min(1.0, reach / earlier) if earlier else 1.0
