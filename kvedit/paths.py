"""What a path of the user's may lead to besides files: home folders, pipes, devices.

Invariants:
- Nothing waits for ever: not for somebody to write to a pipe, not for somebody to read from it.
- A device is never read, since it may have no end, and never replaced by a file.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from kvedit.errors import UsageError

PIPE_SECONDS = 10.0  # that a pipe's writer may take to come


def home_path(text: str | Path) -> Path:
    """A path with ``~`` and ``~name`` as folders.  Raises UsageError for a name without one."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        hint = "Write the whole path; a name that begins with ~ is written ./~NAME."
        raise UsageError(f"{text}: there is no such home folder", hint=hint) from error


def is_stream(path: Path) -> bool:
    """Whether a path names a pipe or a device, such as /dev/stdout, which no file may replace."""
    return path.exists() and not path.is_file()


def open_input(path: Path | str) -> BinaryIO:
    """Open a file of the user's to read it.

    Of a pipe the writer is waited for, but not for ever.  Raises UsageError for a pipe that nobody
    writes to and for a device, which may have no end, and OSError.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        return _open_pipe(path)
    stream = open(path, "rb")  # noqa: SIM115
    if not (stat.S_ISREG(mode) or stream.isatty()):
        stream.close()
        raise UsageError(f"{path} is a device, not a file", hint="Give a file, or `-` for stdin.")
    return stream


def _open_pipe(path: Path | str) -> BinaryIO:
    """Open a pipe for reading; opening it blocks until somebody opens it for writing."""
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    opened: list[BinaryIO] = []

    def wait_for_writer() -> None:
        opened.append(open(path, "rb"))  # noqa: SIM115

    thread = threading.Thread(target=wait_for_writer, daemon=True)
    thread.start()
    thread.join(PIPE_SECONDS)
    if opened:
        return opened[0]
    with suppress(OSError):  # let the thread go on, and end
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    hint = "Start the program that writes to it, or give a file."
    raise UsageError(f"nobody has opened the pipe {path} for writing", hint=hint)


def write_stream(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write to a pipe or a device; to a pipe that nobody reads is an error, not a wait."""
    handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(handle, True)
    with os.fdopen(handle, "wb") as stream:
        stream.writelines(pieces)
