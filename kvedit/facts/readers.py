"""Descriptions and facts from files, standard input and the command line.

Invariants:
- An error names the file, and for a file of many facts the line.
- A file of many facts is read line by line: its size does not matter.
"""

from collections.abc import Iterator
from pathlib import Path

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.formats import parse_line, read_file, source_name
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
    name = source_name(source)
    empty = True
    for number, data in enumerate(read_file(source), start=1):
        where = f"{name}, line {number}"
        line = decode(data, where).strip()
        if line:
            empty = False
            try:
                fact = Fact.from_json(parse_line(line))
            except InvalidFactError as error:
                raise InvalidFactError(f"{where}: {error.message}", hint=error.hint) from error
            yield fact
    if empty:
        raise InvalidFactError(f"{name} is empty", hint="Write one JSON object on each line.")
