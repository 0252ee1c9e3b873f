"""Which revision the weights in memory are, and how to change that.

Invariant: the weights in memory are those of ``revision``; their digest was compared with the one
in the journal when they were rebuilt.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from kvedit.errors import KveditError, LockedError
from kvedit.events import Event, Status, Warning_
from kvedit.revisions import rebuild
from kvedit.store.store import Store
from kvedit.training.engine import Engine

Emit = Callable[[Event], None]
_T = TypeVar("_T")
SLOW_SECONDS = 1.0  # in which a revision is rebuilt: a checkpoint of the head is quicker then


class Checkout:
    """A store, the engine whose weights are one of its revisions, and who listens to events."""

    def __init__(self, store: Store, engine: Engine, emit: Emit) -> None:
        self.store, self.engine, self.emit = store, engine, emit
        self.revision = 0

    def go_to(self, revision: int) -> None:
        """Give the model the weights of a revision.  Raises CorruptStoreError.

        Those of the head are kept as a checkpoint if that took long.
        """
        began = time.monotonic()
        problems = rebuild.load_revision(self.store, self.engine.master, revision)
        for problem in problems:
            self.emit(Warning_(text=problem, code="checkpoint"))
        self.revision = revision
        slow = time.monotonic() - began > SLOW_SECONDS
        saved = not problems and revision in [row.revision for row in self.store.checkpoints()]
        if slow and not saved and revision == self.store.head() and not self.store.readonly:
            with self.best_effort(), suppress(LockedError), self.store.lock():
                rebuild.write_checkpoint(self.store, self.engine.master)

    def go_to_head(self) -> None:
        """Give the model the weights of the head, unless it has them."""
        if self.revision != self.store.head():
            self.go_to(self.store.head())

    def at(self, revision: int | None, action: Callable[[], _T]) -> _T:
        """Do something with another revision's weights, then come back; None: with these."""
        start = self.revision
        if revision is None or revision == start:
            return action()
        try:
            self.go_to(revision)
            return action()
        finally:
            self.go_to(start)

    def say(self, text: str, key: str | None = None) -> None:
        """Report what is being done."""
        self.emit(Status(phase=text, key=key))

    @contextmanager
    def best_effort(self) -> Iterator[None]:
        """Around what only saves time later: if it cannot be written, that is a warning."""
        try:
            yield
        except KveditError as error:
            self.emit(Warning_(text=f"not kept: {error.message}", code="not-kept"))
