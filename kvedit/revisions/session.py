"""A session: a store, and a model that is kept at its head.

Invariants:
- One process edits at a time: ``editing`` holds the store's lock for the length of one edit.
- An edit begins with what an interrupted one left behind cleaned up, and with the head's weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kvedit.config import Config
from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    LockedError,
    NotWritableError,
    OutOfMemoryError,
)
from kvedit.events import Warning_
from kvedit.facts.keys import in_words
from kvedit.revisions.checkout import Checkout, Emit
from kvedit.revisions.protection import Protection
from kvedit.revisions.reading import Reading
from kvedit.store.forget.scrub import scrub
from kvedit.store.store import Store
from kvedit.training import memory
from kvedit.training.engine import Engine


class Session(Checkout):
    """What every edit, question and check works with; ``emit`` receives the events."""

    def __init__(self, store: Store, engine: Engine, emit: Emit) -> None:
        super().__init__(store, engine, emit)
        self.config: Config = store.config
        self.protection = Protection(self)
        self.reading = Reading(self)
        self._texts_compared = False

    @contextmanager
    def editing(self) -> Iterator[None]:
        """The store's lock for the length of one edit, the model brought to the head."""
        with self.store.lock():
            try:
                with memory.watched():
                    self.recover()
                    self.require_texts()
                    self.go_to_head()
                    yield
            except OutOfMemoryError:
                self.engine.release()  # caches must not make the next edit fail too
                raise

    def require_texts(self) -> None:
        """Raise CorruptStoreError if a fact's text is not what its history says, so that nothing is
        trained, or blamed on the model, that nobody wrote.  Compared once.
        """
        if self._texts_compared:
            return
        if altered := self.store.altered():
            what = f"{', '.join(altered[0].parts)} of the fact {altered[0].key}"
            more = f", and {len(altered) - 1} more facts" * (len(altered) > 1)
            raise CorruptStoreError(
                f"{what}{more}: not what the history of {self.store.path} says",
                hint="Run `kvedit doctor`; `kvedit doctor --fix` restores what the history holds.",
            )
        self._texts_compared = True

    @contextmanager
    def compacting(self) -> Iterator[None]:
        """The base weights, and what must stay of them, for an edit that starts there; those of
        the head after it.
        """
        self.go_to(0)
        self.protection.measure_margins()
        try:
            yield
        finally:
            self.go_to_head()

    def recover(self) -> None:
        """End the edits of a process that was killed; not while another process is at work, nor
        where the store cannot be written.
        """
        if self.store.readonly:
            return
        try:
            interrupted = self.store.recover()
        except (LockedError, NotWritableError, DiskFullError):
            return
        for edit in interrupted:
            named = in_words(edit.keys) or "facts that it does not name"
            what = f"the {edit.kind} of {named} was interrupted and did not happen"
            key = edit.keys[0] if edit.keys else None
            self.emit(Warning_(text=f"recovered: {what}", code="recovered", key=key))
        self.scrub()

    def scrub(self) -> None:
        """Clean the files of what was erased, if that was not finished; another process that reads
        puts it off, and so does a disk that is full.
        """
        if not self.store.needs_scrub:
            return
        with self.best_effort(), self.store.lock():
            if scrub(self.store):
                self.say("the files are clean of what was erased")
                return
        text = "files may still hold what was erased: the next command that writes cleans them"
        self.emit(Warning_(text=text, code="not-clean"))
