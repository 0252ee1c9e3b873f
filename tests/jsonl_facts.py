"""The facts of a JSON Lines file, strictly: the first line that is no fact ends the reading."""

from collections.abc import Iterator
from pathlib import Path

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact
from kvedit.facts.formats import parse_line, read_file, source_name
from kvedit.files import decode


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
