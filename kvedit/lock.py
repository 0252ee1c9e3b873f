"""The lock of a store: one process writes at a time.

Invariant: the lock belongs to the operating system: it is free as soon as its holder dies.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kvedit.errors import LockedError
from kvedit.files import disk_errors, now, write_atomic


class StoreLock:
    """The writer's lock of a store, for one process at a time; one object may be entered twice.

    An operating system lock on ``lock`` (never the soft kind, which outlives a killed process).
    ``lock.json`` names its holder, for messages only.  Entering raises LockedError at once if
    another process holds the lock.
    """

    def __init__(self, directory: Path, *, command: str | None = None):
        self._directory = directory
        self._command = command if command is not None else _command_line()
        self._lock = FileLock(directory / "lock", thread_local=False, fallback_to_soft=False)

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._lock.is_locked

    def __enter__(self) -> StoreLock:
        first = not self.is_held
        with disk_errors(self._directory / "lock"):
            try:  # inside ``disk_errors``: a Timeout is an OSError too
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise LockedError(
                    f"the store {self._directory} is in use{_holder(self._directory)}",
                    hint="Wait until that command has ended, then try again.",
                ) from error
        if first:
            self._announce()
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock.lock_counter == 1:
            with suppress(OSError):
                (self._directory / "lock.json").unlink(missing_ok=True)
        self._lock.release()

    def _announce(self) -> None:
        """Write who holds the lock; release it if that fails."""
        holder = {"pid": os.getpid(), "command": self._command, "since": now()}
        try:
            write_atomic(self._directory / "lock.json", json.dumps(holder).encode())
        except BaseException:
            self._lock.release()
            raise


def _command_line() -> str:
    """The program and its subcommand; never the arguments, which may contain private text."""
    path = Path(sys.argv[0] or "python")
    program = path.parent.name if path.name == "__main__.py" else path.name
    before = ["", *sys.argv[1:]]
    words = [w for w, last in zip(sys.argv[1:], before, strict=False) if last != "--store"]
    return " ".join([program, *filter(str.isalpha, words)][:2])


def _holder(directory: Path) -> str:
    """Who holds the lock, for a message; empty if that is unknown."""
    try:
        holder = json.loads((directory / "lock.json").read_text(encoding="utf-8"))
        return f" by process {holder['pid']} ({holder['command']}) since {holder['since'][:19]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
