"""Standard input, output and errors, as whoever started the program left them.

Invariants:
- The file descriptors 0, 1 and 2 are open: a file of a store that got one of them would take in
  what a library prints.
- A character that a stream's encoding lacks is shown escaped; it never ends a command.
"""

from __future__ import annotations

import io
import os
import sys

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def prepare() -> None:
    """Open what was closed, on the null device; let no character be an error."""
    for descriptor, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def broken_output() -> str:
    """Why standard output takes nothing more, such as a full disk; empty if it does."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""
