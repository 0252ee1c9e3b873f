"""A part in a process of its own: events come back, a failure says what it was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
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


def wait(emit: Callable[[Any], None]) -> None:
    """Says which process it is, and goes on for long."""
    emit(Status(phase="waiting", step=os.getpid()))
    time.sleep(300)


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_process_ends_with_its_parent() -> None:
    code = """
from tests.bench import child
from tests.bench.test_child import wait
child.run("part", wait, (), lambda event: print(event.step, flush=True))
"""
    command = [
        sys.executable,
        "-c",
        f"if __name__ == '__main__':{code.replace(chr(10), chr(10) + ' ')}",
    ]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(pid)
