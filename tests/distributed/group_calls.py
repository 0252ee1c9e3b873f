"""What two processes do in ``test_processes``: work that succeeds, fails, or is interrupted.

    python -m tests.distributed.group_calls      twice, numbered as a launcher would

Each process prints one line of JSON: how each piece of work ended in it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from kvedit.distributed import processes
from kvedit.distributed.processes import ProcessGroup
from kvedit.errors import KveditError, OutOfTimeError, TrainingError


def numbers(group: ProcessGroup) -> dict[str, Any]:
    """Exchange, sum and align."""
    one, two = torch.full((2, 2), 1.0 + group.rank), torch.full((3,), 10.0)
    group.sum([one, two])
    start = torch.full((2,), float(group.rank))
    group.align([start])
    return {
        "values": group.exchange("test", f"from {group.rank}"),
        "sums": [one.tolist(), two.tolist()],
        "start": start.tolist(),
        "main": group.on_main(lambda: f"decided by {group.rank}"),
    }


def fails(group: ProcessGroup, rank: int, error: Exception) -> None:
    """One process raises where the other exchanges."""
    with group.in_step():
        if group.rank == rank:
            raise error
        group.exchange("test")
        group.exchange("test")


def fails_late(group: ProcessGroup) -> None:
    """One process raises when the other is done."""
    with group.in_step():
        if group.rank == 1:
            raise TrainingError("late")


def fails_in_both(group: ProcessGroup) -> None:
    """Each raises by itself, at once."""
    with group.in_step():
        raise TrainingError("no number")


def fails_on_main(group: ProcessGroup) -> None:
    """Rank 0 decides that time is up."""

    def work() -> None:
        raise OutOfTimeError("time is up")

    group.on_main(work)


def interrupted(group: ProcessGroup) -> None:
    """Ctrl-C, which reaches both, in the middle of their own work."""
    with group.in_step():
        group.exchange("test")
        os.kill(os.getpid(), signal.SIGINT)
        group.exchange("test")


def differ(group: ProcessGroup) -> None:
    """Something that must be the same is not."""
    group.require_alike(group.rank, "the processes have different ranks", hint="")


def outcome(work: Callable[[ProcessGroup], object], group: ProcessGroup) -> str:
    """How a piece of work ended."""
    try:
        work(group)
    except (KveditError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def main() -> None:
    group = processes.join()
    trouble = TrainingError("no number", hint="smaller")
    no_memory = torch.OutOfMemoryError("CUDA out of memory")
    outcomes: dict[str, Any] = {
        "theirs": outcome(lambda g: fails(g, 1, trouble), group),
        "ours": outcome(lambda g: fails(g, 0, trouble), group),
        "unexpected": outcome(lambda g: fails(g, 1, ValueError("odd")), group),
        "memory": outcome(lambda g: fails(g, 1, no_memory), group),
        "late": outcome(fails_late, group),
        "both": outcome(fails_in_both, group),
        "main": outcome(fails_on_main, group),
        "interrupted": outcome(interrupted, group),
        "differ": outcome(differ, group),
        "then": numbers(group),
    }
    if group.rank:  # at another point than rank 0: both stop
        outcomes["apart"] = outcome(lambda g: g.exchange("one thing"), group)
    else:
        outcomes["apart"] = outcome(lambda g: g.exchange("another"), group)
    print(json.dumps(outcomes), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
