"""The part of a store that is looked at and mended when something is wrong with it.

Invariant: what is written is taken from the store itself, and no file is touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from kvedit.errors import KveditError, UnknownKeyError
from kvedit.store.checks.contents import Altered, altered
from kvedit.store.checks.copies import copied
from kvedit.store.database import DB_NAME
from kvedit.store.journal import Journal
from kvedit.store.rows import fact_from_text
from kvedit.trust import names


class Repairs(Journal):
    """Looks at a store and mends rows."""

    @classmethod
    @contextmanager
    def inspect(cls, path: Path) -> Iterator[Self]:
        """A store for a look that changes nothing: its database is a copy, upgraded if it is old.

        Raises what ``open`` raises, and LockedError if the store is written all the time.
        """
        if not (path / DB_NAME).is_file():
            cls(path, readonly=True)  # raises, and says how to make a store
        names.refuse_links(path)
        with copied(path / DB_NAME) as database:
            try:
                store = cls(path, readonly=True, database=database)
            except KveditError as error:
                message = error.message.replace(str(database), str(path / DB_NAME))
                raise type(error)(message, hint=error.hint) from error
            with store:
                yield store

    def restore_text(self, fact_id: int, text: str) -> None:
        """Write a fact's row again from its text in the history; its state stays."""
        state, fact = self.get_state(fact_id), fact_from_text(text)
        if fact is not None:
            with self._transaction():
                self._write_fact(fact_id, fact, state)

    def get_state(self, fact_id: int) -> str:
        """The state of a fact; raises UnknownKeyError."""
        row = self._one("SELECT state FROM facts WHERE id = ?", [fact_id])
        if row is None:
            raise UnknownKeyError(
                f"there is no fact number {fact_id} in {self.path}", hint="Run `kvedit list`."
            )
        return str(row["state"])

    def altered(self) -> list[Altered]:
        """The facts whose text is not what the history says, by whatever it was changed."""
        return altered(self.query)

    def forget_checkpoints(self) -> int:
        """Forget the checkpoints that have another name than kvedit gives; returns how many.

        No file is touched.
        """
        with self._transaction():
            return self._execute(f"DELETE FROM checkpoints WHERE {_MISNAMED}").rowcount

    def name_pinned_checkpoints(self) -> int:
        """Give the checkpoints that stand for deltas which are no longer there the name that kvedit
        gives, where they have another; returns how many.

        Their digest says whether what lies there is theirs.  No file is touched.
        """
        pinned = ", ".join(map(str, sorted(self.pinned())))
        name = "UPDATE checkpoints SET path = printf('checkpoints/%08d', revision)"
        with self._transaction():
            return self._execute(f"{name} WHERE {_MISNAMED} AND revision IN ({pinned})").rowcount


_MISNAMED = "path IS NOT printf('checkpoints/%08d', revision)"
