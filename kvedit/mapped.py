"""Files that are mapped into memory, and what it means when that fails.

Invariants:
- A file that the system cannot map is not called damaged: its bytes may be sound.
- safetensors and torch report a failed mmap as OSError without its number, as MemoryError or as
  RuntimeError; here each becomes one of kvedit's errors, with a hint.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvedit.errors import KveditError, OutOfMemoryError

_BY_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
_BY_TORCH = re.compile(r"unable to (?:mmap|open|stat) .*\((\d+)\)", re.DOTALL)
LOOK_AT_THE_DISK = "Look at the system's log and at the disk; the file itself may be sound."


@contextmanager
def mapping(path: Path) -> Iterator[None]:
    """Raise KveditError where the system does not map or read a file, OutOfMemoryError where there
    is no memory for it; a file that is not there stays FileNotFoundError.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        failed = failure(path, error)
        if failed is None:
            raise
        raise failed from error


def failure(path: Path | str, error: BaseException) -> KveditError | None:
    """What an error of a library about a file says that kvedit can say better; None if nothing."""
    number = _number(error)
    if number == errno.ENOMEM:
        return OutOfMemoryError(
            f"not enough memory to map {path}",
            hint="Close other programs, or raise the limit of memory (ulimit -v), and try again.",
        )
    if number is None and not isinstance(error, OSError):
        return None
    reason = str(error) if number is None else os.strerror(number)
    return KveditError(f"cannot read {path}: {reason}", hint=LOOK_AT_THE_DISK)


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that safetensors reports in words."""
    said = _BY_SAFETENSORS.search(str(error))
    return OSError(int(said[1]), os.strerror(int(said[1]))) if said else None


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error says that bytes that are there could not be read."""
    return _number(error) not in (None, errno.ENOENT, errno.ENOMEM)


def _number(error: BaseException) -> int | None:
    """The number that the system gave an error, where it can be seen."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    said = None
    if isinstance(error, OSError | RuntimeError):
        said = _BY_SAFETENSORS.search(str(error)) or _BY_TORCH.search(str(error))
    return int(said[1]) if said else None
