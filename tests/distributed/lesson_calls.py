"""What two processes do in ``test_processes``: a group's lesson, broken off and gone on with.

    python -m tests.distributed.lesson_calls MODEL FOLDER      twice, numbered as a launcher would

Process 0 prints one line of JSON: the steps of each try, and whether the weights agree after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from small_engine import make_engine
from small_model import FREE, KNOWN

from kvedit.config import GroupConfig
from kvedit.distributed.crew import Crew
from kvedit.distributed.processes import LedEngine, Replica
from kvedit.errors import TrainingError
from kvedit.facts.fact import Fact
from kvedit.model import loading
from kvedit.training import resume
from kvedit.training.loop import Step, Task
from kvedit.training.resume import TrainingCheckpoints

GROUP = GroupConfig(batch_size=2, epochs=6, refine_rounds=0, penalty_scale=60.0)
BROKEN_AFTER = 7


def lead(crew: Crew, folder: str, kept: Path) -> dict[str, Any]:
    """In process 0: two tries."""
    resume.EVERY, resume.SHARE = -1.0, 1e9
    base = loading.load(folder)
    engine = LedEngine(crew, base, make_engine(loading.load(folder)).config)
    asked = [(f"What is {key}?", text) for key, text in KNOWN.items()]
    engine.protect(engine.renderer.examples(asked))
    task = Task([engine.examples(Fact.create(*pair, lang="en")) for pair in FREE[:3]])
    first: list[int] = []
    second: list[int] = []

    def breaking(step: Step) -> None:
        first.append(step.step)
        if step.step > BROKEN_AFTER:
            raise TrainingError("broken off")

    try:
        engine.train(task, None, breaking, GROUP, TrainingCheckpoints(kept))
    except TrainingError as error:
        ended = error.message
    made = engine.train(
        task, None, lambda s: second.append(s.step), GROUP, TrainingCheckpoints(kept)
    )
    engine.master.add(made.delta)
    return {"ended": ended, "first": first, "second": second, "digest": engine.master.digest()}


def main() -> None:
    crew = Crew()
    if crew.rank:
        crew.follow(Replica(crew).carry_out)
        crew.end()
        return
    found = lead(crew, sys.argv[1], Path(sys.argv[2]))
    crew.end()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
