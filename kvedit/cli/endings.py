"""What a command that changes the store has changed by the time an error or Ctrl-C ends it.

Invariant: this is read from the store when the command ends, never guessed from what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli.output import clean, print_json_line, printed_json
from kvedit.errors import KveditError
from kvedit.facts.keys import in_words

if TYPE_CHECKING:
    from kvedit.store.store import Store

_WATCHED = "kvedit.watched"
MOST_EDITS = 20  # that are named
ONE_DOCUMENT = "prune"  # prints no lines with --json: its error has the fields


@dataclass(frozen=True, slots=True)
class Changes:
    """Edits committed since a command began, as kind, keys and revision; deltas and checkpoints
    dropped; whether erased texts may still lie in files.
    """

    revision: int
    edits: tuple[tuple[str, tuple[str, ...], int], ...] = ()
    deltas: int = 0
    checkpoints: int = 0
    not_clean: bool = False

    def lines(self, kind: str) -> list[str]:
        """For a person."""
        lines = [f"committed before that: {name} {in_words(keys) or 'of some facts'}, revision {at}"
                 for name, keys, at in self.edits[:MOST_EDITS]]  # fmt: skip
        if (more := len(self.edits) - MOST_EDITS) > 0:
            lines.append(f"and {more} more")
        if kind == ONE_DOCUMENT:
            return [*lines, self._pruned()]
        if not lines:
            state = f"the model and its facts are those of revision {self.revision}"
            lines = [f"no edit was committed: {state}"]
            if kind == "erase":
                lines.append("protected texts and files of rejected facts may be without the text")
        if self.not_clean:
            lines.append("files may still hold what was erased: the next command that writes cleans"
                         " them")  # fmt: skip
        return lines

    def _pruned(self) -> str:
        if not (self.deltas or self.checkpoints):
            return "nothing was dropped: every revision is as it was"
        deltas = f"{self.deltas} delta{'s' * (self.deltas != 1)}"
        checkpoints = f"{self.checkpoints} checkpoint{'s' * (self.checkpoints != 1)}"
        again = "the same command again drops the rest"
        return f"dropped before that: {deltas} and {checkpoints}; {again}"

    def to_json(self, kind: str) -> dict[str, Any]:
        """For a program."""
        if kind == ONE_DOCUMENT:
            return {"dropped_deltas": self.deltas, "dropped_checkpoints": self.checkpoints}
        edits = [
            {"kind": name, "keys": list(keys), "revision": at} for name, keys, at in self.edits
        ]
        return {"revision": self.revision, "committed": len(edits), "edits": edits,
                "not_clean": self.not_clean}  # fmt: skip


@contextmanager
def watched(open_store: Callable[[], Any], kind: str) -> Iterator[None]:
    """An error that leaves the block can be told with what was changed in it."""
    meta = click.get_current_context().find_root().meta
    meta[_WATCHED] = (open_store, kind, _now(open_store))
    yield
    del meta[_WATCHED]


@dataclass(frozen=True, slots=True)
class Ending:
    """The kind of command that an error ended, and what it changed; None: that cannot be read."""

    kind: str
    changes: Changes | None

    @classmethod
    def of(cls, context: click.Context) -> Ending | None:
        """How the command ended; None if it did not begin to change anything."""
        watched = context.find_root().meta.pop(_WATCHED, None)
        return None if watched is None else cls(watched[1], _since(watched[0], watched[2]))

    def fields(self) -> dict[str, Any]:
        """For a program."""
        return {"known": False} if self.changes is None else self.changes.to_json(self.kind)

    def tell(self, *, as_json: bool, code: int) -> None:
        """Lines on stderr; with ``as_json`` a summary on stdout too, unless one was printed."""
        changes = self.changes
        lines = ["what was changed cannot be read"] if changes is None else changes.lines(self.kind)
        for line in lines:
            click.echo(clean(line), err=True)
        if as_json and self.kind != ONE_DOCUMENT and not printed_json():
            fields = {"message_type": "summary", "kind": self.kind, **self.fields()}
            print_json_line({**fields, "exit_code": code})


@dataclass(frozen=True, slots=True)
class _State:
    head: int = 0
    deltas: int = 0
    checkpoints: frozenset[int] = frozenset()

    @classmethod
    def of(cls, store: Store) -> _State:
        """What of a store is compared."""
        dropped = sum(row.dropped is not None for row in store.revisions())
        return cls(store.head(), dropped, frozenset(row.revision for row in store.checkpoints()))


def _now(open_store: Callable[[], Any]) -> _State:
    """The state of the store; of one that is not there, or cannot be read, that of an empty one."""
    try:
        with open_store() as store:
            return _State.of(store)
    except (KveditError, OSError):
        return _State()


def _since(open_store: Callable[[], Any], before: _State) -> Changes | None:
    try:
        with open_store() as store:
            now = _State.of(store)
            edits = [edit for edit in store.history() if (edit.revision or 0) > before.head]
            return Changes(
                revision=now.head,
                edits=tuple((e.kind, e.keys, e.revision or 0) for e in reversed(edits)),
                deltas=now.deltas - before.deltas,
                checkpoints=len(before.checkpoints - now.checkpoints),
                not_clean=store.needs_scrub,
            )
    except (KveditError, OSError):
        return None
