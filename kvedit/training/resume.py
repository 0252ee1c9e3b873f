"""TrainingCheckpoints: where a long lesson stands, kept now and then, so that another process can go on.

A group is one edit, committed as a whole, and its lesson may take an hour.  Whoever is killed in it
would begin again, and whoever is killed again and again would never come to an end.

Invariants:
- A bookmark is of one lesson, named by all that its loop is given: no other goes on from it, nor
  a loop that keeps something else.
- It only saves time.  One that is missing or damaged means to begin at the beginning, and one that
  cannot be written ends nothing.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import KveditError, OutOfTimeError
from kvedit.files import TRAINING_CHECKPOINTS, clean_temporary, disk_errors, remove, write_atomic

FORMAT = 4  # of what loops keep; part of a bookmark's name
EVERY = 120.0  # seconds between two of them, at least
SHARE = 0.02  # of the time may go into them
State = dict[str, Any]
"""Tensors on the CPU, numbers and texts, in dicts, lists and tuples."""
Keep = Callable[[Callable[[], State]], None]


class TrainingCheckpoints:
    """Those of one store; ``say`` tells that a lesson goes on, ``warn`` that one is not kept.

    From ``deadline`` (``time.monotonic``) on a lesson ends where it stands.
    """

    def __init__(
        self,
        folder: Path,
        *,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
        deadline: float | None = None,
    ) -> None:
        self._folder, self._say, self._warn = folder, say, warn
        self._deadline = math.inf if deadline is None else deadline
        self._due = time.monotonic() + EVERY

    def find(self, task: str) -> State | None:
        """Where the lesson of this name stood when its process ended."""
        path = self._path(task)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            remove(path)
            return None
        state: State = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        self._say("going on with what was being taught when kvedit ended")
        return state

    def keep(self, task: str, state: Callable[[], State]) -> None:
        """Keep where the lesson stands, if it is time to.  Raises OutOfTimeError."""
        began = time.monotonic()
        if began >= min(self._due, self._deadline):
            self._write(task, state, began)
        if began >= self._deadline:
            raise OutOfTimeError(
                "time is up in the middle of a group",
                hint="Run the same command again: it goes on from where the lesson stands.",
            )

    def _write(self, task: str, state: Callable[[], State], began: float) -> None:
        body = io.BytesIO()
        torch.save(state(), body)
        data = body.getvalue()
        path = self._path(task)
        try:
            with disk_errors(path):
                self._folder.mkdir(exist_ok=True)
                clean_temporary(self._folder)
            write_atomic(path, hashlib.sha256(data).digest() + data)
        except KveditError as error:
            self._due = math.inf
            self._warn(f"where the lesson stands is not kept: {error.message}")
            return
        now = time.monotonic()
        self._due = now + max(EVERY, (now - began) / SHARE)

    def clear(self) -> None:
        """Drop all of them: the edit that they are of has ended."""
        for path in self._folder.glob(TRAINING_CHECKPOINTS):
            remove(path)

    def _path(self, task: str) -> Path:
        return self._folder / TRAINING_CHECKPOINTS.replace("*", f"{FORMAT}-{task[:16]}")
