"""What two processes do in ``test_processes``: a group's training, interrupted and resumed.

    python -m tests.distributed.training_calls MODEL FOLDER      twice, numbered as a launcher would

Each process prints one line of JSON: the steps of each try, the digest of the weights after it, and
how it ends when one process has other texts or other weights than the other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from small_engine import make_engine
from small_model import FREE, KNOWN

from kvedit.adapter.deltas import Factors
from kvedit.config import GroupConfig
from kvedit.distributed import processes
from kvedit.distributed.worker import make_worker
from kvedit.errors import ProcessesDifferError, TrainingError
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.training import resume
from kvedit.training.engine import Engine
from kvedit.training.loops.loop import Step, Task
from kvedit.training.resume import TrainingCheckpoints

GROUP = GroupConfig(batch_size=2, epochs=6, refine_rounds=0, penalty_scale=60.0)
BROKEN_AFTER = 7


def train_twice(engine: Engine, task: Task, folder: Path) -> dict[str, Any]:
    """Interrupted, then resumed, with checkpoints that only rank 0 may read and write."""
    first: list[int] = []
    second: list[int] = []

    def breaking(step: Step) -> None:
        first.append(step.step)
        if step.step > BROKEN_AFTER:
            raise TrainingError("broken off")

    ended = ""
    try:
        engine.train(task, None, breaking, GROUP, TrainingCheckpoints(folder))
    except TrainingError as error:
        ended = error.message
    result = engine.train(
        task, None, lambda s: second.append(s.step), GROUP, TrainingCheckpoints(folder)
    )
    engine.master.add(result.delta)
    return {
        "ended": ended, "first": first, "second": second, "digest": engine.weights_digest(),
        "files": sorted(file.name for file in folder.glob("*")),
    }  # fmt: skip


def differ(engine: Engine, task: Task, rank: int) -> list[str]:
    """What one process has and the other has not ends the work of both."""
    messages = []
    try:
        engine.train(replace(task, new=task.new[rank:]), None, lambda step: None, GROUP)
    except ProcessesDifferError as error:
        messages.append(error.message)
    if rank:
        name = engine.names[0]
        out, inputs = engine.master.matrices[name].shape
        weight = engine.master.matrices[name].new_ones
        engine.master.add({name: Factors(weight((out, 1)), weight((1, inputs)))})
    try:
        engine.weights_digest()
    except ProcessesDifferError as error:
        messages.append(error.message)
    return messages


def main() -> None:
    group = processes.join()
    resume.EVERY, resume.SHARE = -1.0, 1e9
    folder = Path(sys.argv[2]) / str(group.rank)
    config = make_engine(loading.load(sys.argv[1])).config
    engine = Engine(loading.load(sys.argv[1]), config, worker=make_worker)
    known = [(f"What is {key}?", text) for key, text in KNOWN.items()]
    engine.protect(engine.renderer.examples(known))
    task = Task([engine.examples(Fact.create(*pair, lang="en")) for pair in FREE[:3]])
    results = train_twice(engine, task, folder)
    results["differ"] = differ(engine, task, group.rank)
    group.end()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
