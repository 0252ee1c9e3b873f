"""Where a training starts: the examples whose gradient the adapter takes, and how much of the
accumulated delta's.
"""

import random
from collections.abc import Sequence

from kvedit.config import GroupConfig
from kvedit.model.prompts import Example
from kvedit.training.loops.group import MAX_EARLIER_WEIGHT
from kvedit.training.loops.loop import Task

SINGLE_REHEARSAL_REACH = 20
"""Earlier facts that a single fact's training keeps recalled by rehearsing a few of them: with more
of them the gradient term of the accumulated delta is scaled down in proportion."""
START_FACTS = 64  # at most give the gradient that the adapter starts from: it has few directions
START_STUDY = 16  # study examples, at most, that it starts from besides


def start_examples(task: Task, rng: random.Random) -> list[Example]:
    """The examples whose gradient the adapter starts from: a prompt or two of each fact, all where
    each prompt has an answer of its own, as when a fact is removed; and study examples.
    """
    facts = rng.sample(list(task.new), min(START_FACTS, len(task.new)))
    each = 2 if len(facts) <= START_FACTS // 4 else 1

    def count(fact: Sequence[Example]) -> int:
        one_answer = len({example.answer for example in fact}) == 1
        return min(each, len(fact)) if one_answer else len(fact)

    chosen = [e for fact in facts for e in rng.sample(list(fact), count(fact))]
    study = [e for fact in task.study[: len(task.new)] for e in fact]
    return [*chosen, *rng.sample(study, min(START_STUDY, len(study)))]


def accumulated_share(task: Task, group: GroupConfig | None) -> float:
    """How much of the gradient term of the accumulated delta a task takes: 0 to 1.

    The penalty alone would undo everything that earlier edits changed, and only rehearsal speaks
    for their facts.  Where the loss counts them as fewer than they are, the penalty must be scaled
    alike: a repair of six facts would otherwise undo what hundreds need.
    """
    earlier = max(task.earlier, len(task.rehearsal))
    reach = SINGLE_REHEARSAL_REACH if group is None else MAX_EARLIER_WEIGHT * len(task.new)
    return min(1.0, reach / earlier) if earlier else 1.0
