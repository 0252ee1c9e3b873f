"""The form under which a store compares keys: with or without their signs.

Invariants:
- The form is decided when the first fact goes in, and kept in the database: a setting that is
  changed later is refused, for the keys would be compared by two rules.
"""

from __future__ import annotations

from pathlib import Path

from kvedit.config import FILE_NAME, Config
from kvedit.errors import UsageError
from kvedit.facts.keys import KeyForm, exact_form, normalise
from kvedit.store.database import StoreBase

_KEEP_SIGNS = "keep_signs"
_YES, _NO = "1", "0"


def key_form_at(path: Path) -> KeyForm:
    """The form of the keys of a store that has not been made yet; raises UsageError for settings
    that cannot be read.
    """
    return _form(Config.load(path / FILE_NAME).keys.keep_signs)


class KeyForms(StoreBase):
    """The part of a store that says when two keys are one."""

    @property
    def key_form(self) -> KeyForm:
        """The form under which keys are compared here."""
        return _form(self._keeps_signs())

    def _decide_key_form(self) -> None:
        """Keep the form of the keys from now on, within a transaction; raises UsageError if the
        setting is another one.
        """
        keeps = self._keeps_signs()
        if keeps != self.config.keys.keep_signs:
            raise UsageError(
                f"keys.keep_signs in {self.path / FILE_NAME} was changed after facts had gone in",
                hint=f"Set it back to {str(keeps).lower()}, or begin a new store.",
            )
        if self.meta(_KEEP_SIGNS) is None:
            self._set(_KEEP_SIGNS, _YES if keeps else _NO)

    def _keeps_signs(self) -> bool:
        decided = self.meta(_KEEP_SIGNS)
        if decided is not None:
            return decided == _YES
        if self._one("SELECT id FROM facts LIMIT 1") is not None:
            return False  # as older versions did
        return self.config.keys.keep_signs


def _form(keeps_signs: bool) -> KeyForm:
    return exact_form if keeps_signs else normalise
