"""A part in a process of its own: events come back, a failure says what it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from kvedit.errors import KveditError, UsageError
from kvedit.events import EditReport, Status
from tests.bench import child


def work(fails: str, emit: Callable[[Any], None]) -> None:
    """Says which process it is, and then does what it was asked for."""
    emit(EditReport(kind="add", outcome="committed", key="a"))
    emit(Status(phase="working", step=os.getpid()))
    if fails == "refuses":
        raise UsageError("this cannot be", hint="Try that.")
    if fails == "dies":
        os._exit(7)


def test_events_come_from_another_process() -> None:
    events: list[Any] = []
    child.run("part", work, ("",), events.append)
    assert [one.phase for one in events] == ["working"], "reports of edits are not sent"
    assert events[0].step != os.getpid()


@pytest.mark.parametrize(
    ("fails", "reason"), [("refuses", "this cannot be Try that."), ("dies", "exit code 7")]
)
def test_a_process_that_fails_says_why(fails: str, reason: str) -> None:
    with pytest.raises(KveditError, match=f"part was not measured: .*{reason}"):
        child.run("part", work, (fails,), lambda event: None)
