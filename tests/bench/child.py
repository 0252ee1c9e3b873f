"""A part of a benchmark in a process of its own, so that its peak memory is its own.

Invariants:
- The process does not outlive the call, nor its parent, however that ends; Ctrl-C ends it, and a
  store that it was editing recovers when it is opened again.
- Its events arrive as they are sent, reports of single edits left out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvedit.errors import KveditError
from kvedit.events import EditReport, Event

Emit = Callable[[Event], None]


def run(name: str, work: Callable[..., None], arguments: tuple[Any, ...], emit: Emit) -> None:
    """``work(*arguments, emit)`` in a new process; ``name`` is what is measured, for the error.

    Raises KveditError if that fails.  ``work`` must be a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(work, arguments, sender), daemon=True)
    child.start()
    sender.close()
    problem = ""
    with _ended(child):
        while (message := _next(receiver)) is not None:
            if isinstance(message, str):
                problem = message
            else:
                emit(message)
        child.join()
    if child.exitcode:
        reason = problem or f"its process ended with exit code {child.exitcode}"
        raise KveditError(f"{name} was not measured: {reason}")


@contextmanager
def _ended(child: Any) -> Iterator[None]:
    """Inside, a process runs; it does not outlive the block."""
    try:
        yield
    finally:
        if child.is_alive():
            child.terminate()
            child.join()


def _next(receiver: Any) -> Any:
    """The next message; None when the process has ended."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def _run(work: Callable[..., None], arguments: tuple[Any, ...], sender: Any) -> None:
    """In the new process: its parent decides about Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def emit(event: Event) -> None:
        if not isinstance(event, EditReport):
            sender.send(event)

    try:
        work(*arguments, emit)
    except KveditError as error:
        sender.send(f"{error.message} {error.hint}".strip())
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """Wait for the parent's end, which may be a kill, and go too: nobody reads the result."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
