"""What each command does when an mmap of weights, a checkpoint or statistics fails.

Invariant: the command succeeds or ends in one of kvedit's errors, with a hint; the store is sound,
an edit is there whole or not at all, and the command works once the disk does.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from disk_faults import Fault, mapped
from small_engine import digest
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.errors import KveditError, OutOfMemoryError

CODES = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EPERM)
WORK: dict[str, Callable[[KnowledgeBase], object]] = {
    "ask": lambda base: base.ask("What is tide lantern?"),
    "add": lambda base: base.add(*FREE[3], force=True),
    "rollback": lambda base: base.rollback(2),
    "prune": lambda base: base.prune(2),
    "verify": lambda base: base.verify(["tide lantern"]),
    "erase": lambda base: base.erase("wind ledger", force=True),
}
EDITS = ("add", "rollback", "erase")


def calls(path: Path, kind: str) -> list[str]:
    """The mappings that a command makes when none fails."""
    fault = Fault()
    with mapped(fault):
        _command(path, kind)
    return fault.labels


def _command(path: Path, kind: str) -> None:
    with KnowledgeBase.open(path) as base:
        WORK[kind](base)


def wrong(path: Path, kind: str, number: int, code: int) -> str | None:
    """What is wrong after call ``number`` of a command failed; None if nothing is."""
    fault = Fault(number, code)
    failed: KveditError | None = None
    with mapped(fault):
        try:
            _command(path, kind)
        except KveditError as error:
            failed = error
    if failed is not None and not failed.hint:
        return f"no hint: {failed!r}"
    if failed is not None and isinstance(failed, OutOfMemoryError) != (code == errno.ENOMEM):
        return f"another kind: {failed!r}"
    with KnowledgeBase.open(path) as base:
        problems = [one.what for one in base.doctor() if one.level == "error"]
        head = base.store.head()
        if problems or digest(base) != base.store.revision(head).weights_digest:
            return f"not sound: {problems}"
        if kind in EDITS and failed is None and head != 4:
            return f"said to be done, at revision {head}"
        if kind in EDITS and head == 3:
            WORK[kind](base)
            head = base.store.head()
        if kind in EDITS and head != 4:
            return f"cannot be done again, at revision {head}"
    return None
