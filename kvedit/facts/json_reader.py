"""JSON documents of many facts: an array, an object with an array of records, or a mapping.

Invariants:
- A name that an object has twice is an error of its record: the standard parser would keep the
  last value without a word.
- A syntax error names its line; a record is known by its number, counted from 1.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

from kvedit.errors import InvalidFactError
from kvedit.facts.forms.names import are_of_a_record
from kvedit.facts.forms.passages import passages_of
from kvedit.facts.forms.records import ANY_COLUMNS, Columns, looks_like_fact

LIST = "facts"
"""The name of an array that is always the one of the facts."""


@dataclass(frozen=True, slots=True)
class _Repeated:
    """An object that has a name twice, as its pairs."""

    pairs: Sequence[tuple[str, object]]


def _object(pairs: Sequence[tuple[str, object]]) -> dict[str, object] | _Repeated:
    unique = dict(pairs)
    return unique if len(unique) == len(pairs) else _Repeated(pairs)


def parse(text: str) -> object:
    """The value of a JSON text, to be checked by ``repeated_name``.

    Raises ValueError where it is no JSON or a number is too long, RecursionError where it is nested
    too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def repeated_name(value: object) -> InvalidFactError | None:
    """The error for the first object with a name given twice, anywhere in a parsed value."""
    todo = [value]
    while todo:  # not recursive: the value may be nested as deeply as the parser can go
        part = todo.pop()
        if isinstance(part, _Repeated):
            names = [name for name, _ in part.pairs]
            twice = next(name for name in names if names.count(name) > 1)
            return InvalidFactError(f'"{twice}" is given twice in one object', hint="Remove one.")
        if isinstance(part, dict):
            todo.extend(part.values())
        elif isinstance(part, list):
            todo.extend(part)
    return None


def read_json(text: str, name: str, columns: Columns = ANY_COLUMNS) -> Iterator[tuple[int, object]]:
    """Yield number and record of an array, of an object's arrays of objects, of one fact, or of a
    mapping of keys to descriptions (or to the other parts of a fact).

    A record with a name given twice is an InvalidFactError instead.  Raises InvalidFactError, with
    the line, where the text is not valid JSON.
    """
    try:
        document = parse(text)
    except json.JSONDecodeError as error:
        raise _invalid(f"{name}, line {error.lineno}", error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _invalid(name, str(error)) from error
    for number, record in enumerate(_records(document, columns), start=1):
        yield number, repeated_name(record) or record


def _invalid(where: str, what: str) -> InvalidFactError:
    return InvalidFactError(
        f"{where}: not valid JSON: {what}",
        hint="Correct the file, or write one JSON object on each line (JSON Lines).",
    )


def _records(document: object, columns: Columns) -> Iterator[object]:
    """The records of a document; beside arrays of records its other names are remarks."""
    if isinstance(document, list):
        yield from document
    if not isinstance(document, dict | _Repeated):
        return
    pairs = document.pairs if isinstance(document, _Repeated) else list(document.items())
    named = [value for key, value in pairs if key == LIST and isinstance(value, list)]
    for array in named:
        yield from array
    if looks_like_fact(dict(pairs), columns) or passages_of(dict(pairs)):
        yield document
    elif arrays := [cast(list[object], value) for _, value in pairs if _holds_records(value)]:
        if not named:
            yield from chain.from_iterable(arrays)
    elif not named and are_of_a_record([key for key, _ in pairs]):
        yield document
    elif not named:
        yield from (_pair(key, value) for key, value in pairs)


def _holds_records(value: object) -> bool:
    """Whether a value is an array of objects."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | _Repeated)


def _pair(key: str, value: object) -> object:
    """One key of a mapping as a record."""
    if isinstance(value, _Repeated):
        return value
    return {"key": key, **value} if isinstance(value, dict) else {"key": key, "description": value}
