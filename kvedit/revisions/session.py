"""A session: a store, and a model that is kept at its head.

Invariants:
- One process edits at a time: ``editing`` holds the store's lock for the length of one edit.
- An edit begins with what an interrupted one left behind cleaned up, and with the head's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvedit.config import Config
from kvedit.errors import LockedError, OutOfMemoryError
from kvedit.events import Event, Warning_
from kvedit.facts.keys import in_words
from kvedit.revisions.checkout import Checkout
from kvedit.revisions.protection import Protection
from kvedit.store.store import Store
from kvedit.training import memory
from kvedit.training.engine import Engine

Emit = Callable[[Event], None]
_T = TypeVar("_T")


class Session:
    """What every edit, question and check works with; ``emit`` receives the events."""

    def __init__(self, store: Store, engine: Engine, emit: Emit) -> None:
        self.store, self.engine, self.emit = store, engine, emit
        self.config: Config = store.config
        self.checkout = Checkout(store, engine, emit)
        self.protection = Protection(self.checkout)

    @property
    def revision(self) -> int:
        """The revision that the weights in memory are."""
        return self.checkout.revision

    @contextmanager
    def editing(self) -> Iterator[None]:
        """The store's lock for the length of one edit, the model brought to the head."""
        with self.store.lock():
            try:
                with memory.watched():
                    self.recover()
                    self.checkout.go_to_head()
                    yield
            except OutOfMemoryError:
                self.engine.release()  # caches must not make the next edit fail too
                raise

    @contextmanager
    def compacting(self) -> Iterator[None]:
        """The base weights, and what must stay of them, for an edit that starts there; those of
        the head after it.
        """
        self.checkout.go_to(0)
        self.protection.measure_margins()
        try:
            yield
        finally:
            self.checkout.go_to_head()

    def recover(self) -> None:
        """End the edits of a process that was killed; not while another process is at work."""
        try:
            interrupted = self.store.recover()
        except LockedError:
            return
        for edit in interrupted:
            what = f"{edit.kind} of {in_words(edit.keys)}"
            text = f"recovered: the {what} was interrupted and did not happen"
            key = edit.keys[0] if edit.keys else None
            self.emit(Warning_(text=text, code="recovered", key=key))

    def at(self, revision: int | None, action: Callable[[], _T]) -> _T:
        """Do something with another revision's weights, then come back; None: with these."""
        return self.checkout.at(revision, action)

    def say(self, text: str, key: str | None = None) -> None:
        """Report what is being done."""
        self.checkout.say(text, key)
