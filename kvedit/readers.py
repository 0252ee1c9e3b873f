"""From files and text to descriptions and facts.

Invariants:
- An error names the file, and for a file of many facts the line.
- A file of many facts is read line by line: its size does not matter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts import Fact
from kvedit.files import decode, read_text


def read_description(source: Path | str | None, text: str | None = None) -> str:
    """Return the description from a file, standard input (``-``) or the command line (``text``).

    Raises UsageError unless exactly one of the two is given, and what ``files.read_text`` raises.
    """
    if text is not None and source is not None:
        raise UsageError("both a file and --text were given", hint="Give one of them.")
    if text is not None:
        if not text.strip():
            raise InvalidFactError("--text is empty", hint="Give the description some text.")
        return text.strip()
    if source is None:
        raise UsageError(
            "no description was given", hint="Give a file, `-` for standard input, or --text."
        )
    return read_text(source).strip()


def read_facts_jsonl(source: Path | str) -> Iterator[Fact]:
    """Yield the facts of a JSON Lines file (``-`` for standard input); blank lines are skipped.

    Each line is an object with ``key``, ``description`` and the optional parts of a fact; other
    names are ignored.  Raises UsageError if the file cannot be read, InvalidFactError with the
    line's number for a line that is no fact or a file that has none.
    """
    name = "standard input" if str(source) == "-" else str(source)
    found = False
    with _opened(source, name) as stream:
        for number, data in enumerate(stream, start=1):
            line = decode(data, f"{name}, line {number}").strip()
            if line:
                found = True
                yield _fact(line, f"{name}, line {number}")
    if not found:
        raise InvalidFactError(f"{name} is empty", hint="Write one JSON object on each line.")


def _opened(source: Path | str, name: str) -> nullcontext[BinaryIO] | BinaryIO:
    """The file to read from; standard input is left open."""
    if str(source) == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(source, "rb")
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {name}", hint="Check the path.") from error
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error


def _fact(line: str, where: str) -> Fact:
    with _located(where):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidFactError(
                f"not valid JSON: {error}", hint="Write one JSON object on each line."
            ) from error
        return Fact.from_json(document)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the place before the message of an error."""
    try:
        yield
    except InvalidFactError as error:
        raise InvalidFactError(f"{where}: {error.message}", hint=error.hint) from error
