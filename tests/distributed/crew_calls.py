"""What two processes do in ``test_processes``: calls that go well, that fail, that are interrupted.

    python -m tests.distributed.crew_calls      twice, numbered as a launcher would

Process 0 prints one line of JSON: what it found.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from kvedit.distributed.crew import Call, Crew
from kvedit.errors import KveditError, TrainingError


class Calls:
    """The calls, as each process carries them out."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def numbers(self) -> dict[str, Any]:
        """Exchange, sum and align."""
        one, two = torch.full((2, 2), 1.0 + self.crew.rank), torch.full((3,), 10.0)
        self.crew.sum([one, two])
        start = torch.full((2,), float(self.crew.rank))
        self.crew.align([start])
        return {
            "told": self.crew.exchange(f"from {self.crew.rank}"),
            "sums": [one.tolist(), two.tolist()],
            "start": start.tolist(),
        }

    def fails(self, rank: int, plainly: bool) -> None:
        """One process raises where the other exchanges."""
        if self.crew.rank == rank:
            raise TrainingError("no number", hint="smaller") if plainly else ValueError("odd")
        self.crew.exchange(None)
        self.crew.exchange(None)

    def fails_in_both(self) -> None:
        """Each raises by itself, at once."""
        raise TrainingError("no number")

    def interrupted(self) -> None:
        """Ctrl-C in process 0, in the middle of its own work."""
        self.crew.exchange(None)
        if self.crew.rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
        self.crew.exchange(None)


def said(work: Callable[[], object]) -> str:
    """How a call ended."""
    try:
        work()
    except (KveditError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def main() -> None:
    crew = Crew()
    calls = Calls(crew)
    if crew.rank:
        crew.follow(lambda call: getattr(calls, call.name)(*call.args))
        crew.end()
        return

    def lead(name: str, *args: Any) -> Any:
        return crew.lead(Call(name, args), lambda: getattr(calls, name)(*args))

    found = {
        "theirs": said(lambda: lead("fails", 1, True)),
        "unexpected": said(lambda: lead("fails", 1, False)),
        "both": said(lambda: lead("fails_in_both")),
        "ours": said(lambda: lead("fails", 0, True)),
        "interrupted": said(lambda: lead("interrupted")),
        "then": lead("numbers"),
    }
    crew.end()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
