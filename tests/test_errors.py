"""Errors carry their exit code, and say what to do next."""

from __future__ import annotations

import pickle

import pytest

from kvedit import errors
from kvedit.errors import KveditError

CODES = {
    "UsageError": 2, "InvalidFactError": 1, "UnknownKeyError": 1, "DuplicateKeyError": 1,
    "TextTooLongError": 1, "RejectedError": 3, "GateFailedError": 4, "NoStoreError": 10,
    "LockedError": 11, "StoreTooNewError": 12, "ModelMismatchError": 13, "CorruptStoreError": 1,
    "DiskFullError": 1, "ModelError": 1, "TrainingError": 1, "Interrupted": 130,
    "OutOfTimeError": 130, "ProcessError": 1, "ProcessLostError": 1, "ProcessesDifferError": 1,
    "OutOfMemoryError": 1, "KveditError": 1, "NotWritableError": 1,
}  # fmt: skip


def test_every_error_has_its_documented_exit_code() -> None:
    kinds = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, KveditError)
    }
    assert kinds == CODES


@pytest.mark.parametrize("name", CODES)
def test_an_error_shows_message_and_hint_and_survives_pickling(name: str) -> None:
    kind: type[KveditError] = getattr(errors, name)
    error = pickle.loads(pickle.dumps(kind("it broke", hint="mend it")))
    assert type(error) is kind
    assert (error.message, error.hint) == ("it broke", "mend it")
    assert str(error) == "it broke\nmend it"


def test_an_error_without_a_hint_shows_one_line() -> None:
    assert str(KveditError("it broke")) == "it broke"
