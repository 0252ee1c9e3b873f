"""Descriptions from files, standard input and the command line."""

from pathlib import Path

from kvedit.errors import InvalidFactError, UsageError
from kvedit.files import read_text


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
