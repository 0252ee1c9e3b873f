"""Every error a user or a file can cause, each with its exit code.

Invariants:
- An error says what went wrong and where (``message``) and what to do next (``hint``).
- The exit code belongs to the class: the command line never parses a message.
"""

from functools import partial


class KveditError(Exception):
    """Base of all errors that kvedit raises on purpose."""

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Pickling: the default protocol cannot pass ``hint``, which is keyword-only.
        return partial(type(self), hint=self.hint), (self.message,)


class UsageError(KveditError):
    """The command or the call cannot be carried out as asked."""

    exit_code = 2


class InvalidFactError(KveditError):
    """A fact, or the text meant to become one, breaks a rule."""


class UnknownKeyError(KveditError):
    """No fact in the store has this key or alias."""


class DuplicateKeyError(KveditError):
    """The key or alias already belongs to a fact."""


class TextTooLongError(KveditError):
    """The text is longer than the model's context, or than a reader allows."""


class RejectedError(KveditError):
    """The gate rejected an edit."""

    exit_code = 3


class GateFailedError(KveditError):
    """A check the user asked for (``verify --fail-under``, ``doctor``) did not pass."""

    exit_code = 4


class NoStoreError(KveditError):
    """There is no store at this path."""

    exit_code = 10


class LockedError(KveditError):
    """Another process holds the store, or changed it meanwhile."""

    exit_code = 11


class StoreTooNewError(KveditError):
    """The store was written by a newer version of the program."""

    exit_code = 12


class ModelMismatchError(KveditError):
    """The model is not the one that the store was made for."""

    exit_code = 13


class CorruptStoreError(KveditError):
    """A part of the store is missing, half-written or was altered."""


class NotWritableError(KveditError):
    """The store can be read and not written: a read-only disk, or no permission."""


class DiskFullError(KveditError):
    """There is no space left to write to; what was there before is intact."""


class ModelError(KveditError):
    """A model cannot be loaded or used."""


class TrainingError(KveditError):
    """Training went wrong, for instance the loss is no longer a number."""


class ProcessError(KveditError):
    """One of several processes that work as one failed, or they could not begin."""


class ProcessLostError(ProcessError):
    """One of several processes has ended or no longer answers; no work can be shared any more."""


class ProcessesDifferError(ProcessError):
    """Processes that must have the same do not; nothing that they do together can be trusted."""


class OutOfMemoryError(KveditError):
    """There was not enough memory; nothing was changed."""


class Interrupted(KveditError):
    """The user stopped the program; the edit in progress changed nothing."""

    exit_code = 130


class OutOfTimeError(Interrupted):
    """The time limit is reached; the training in progress is resumed by the next command."""
