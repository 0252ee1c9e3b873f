"""JSON documents of many facts, with the line on which each one begins.

Invariants:
- A name that an object has twice is an error: the standard parser would keep the last in silence.
- Records are given one by one with their lines; a syntax error names its line and ends the reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvedit.errors import InvalidFactError
from kvedit.facts.schemas import looks_like_fact

LIST = "facts"
"""The name under which an object may hold the array of facts."""


def unique_names(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object's pairs as a dict; raises InvalidFactError for a name given twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidFactError(f'"{twice}" is given twice in one object', hint="Remove one.")
    return made


def read_json(text: str, name: str) -> Iterator[tuple[int, object]]:
    """Yield line and record of an array, of an object's array ``facts``, of one fact, or of a
    mapping of keys to descriptions (or to the other parts of a fact).

    Raises InvalidFactError, naming the line, where the text is not valid JSON.
    """
    cursor = _Cursor(text, name)
    if cursor.sees("["):
        yield from cursor.items()
    else:
        yield from _object(cursor)
    if not cursor.at_end():
        raise cursor.error("there is text after the end of the document")


def _object(cursor: _Cursor) -> Iterator[tuple[int, object]]:
    line, listed = cursor.line(), False
    pairs: list[tuple[int, str, object]] = []
    for at, key in cursor.names():
        if key == LIST and cursor.sees("["):
            listed = True
            yield from cursor.items()
        else:
            pairs.append((at, key, cursor.value()))
    record = {key: value for _, key, value in pairs}
    if looks_like_fact(record):
        yield line, _whole([(key, value) for _, key, value in pairs])
    elif not listed:  # beside a list of facts, other names are remarks on it
        yield from ((at, _pair(key, value)) for at, key, value in pairs)


def _whole(pairs: Sequence[tuple[str, object]]) -> object:
    broken = next((value for _, value in pairs if isinstance(value, InvalidFactError)), None)
    try:
        return broken or unique_names(pairs)
    except InvalidFactError as error:
        return error


def _pair(key: str, value: object) -> object:
    """One key of a mapping as a record."""
    if isinstance(value, InvalidFactError):
        return value
    if isinstance(value, dict):
        return {"key": key, **value}
    return {"key": key, "description": value}


@dataclass(slots=True)
class _Cursor:
    """A place in a JSON text; lines are counted as it moves on."""

    text: str
    name: str
    position: int = 0
    _counted: int = 0
    _line: int = 1

    def line(self) -> int:
        """The number of the line that the cursor is on."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def sees(self, sign: str) -> bool:
        """Whether a sign comes next, white space aside."""
        while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
            self.position += 1
        return self.text.startswith(sign, self.position)

    def takes(self, sign: str) -> bool:
        """Move past a sign if it comes next."""
        found = self.sees(sign)
        self.position += len(sign) * found
        return found

    def at_end(self) -> bool:
        """Whether nothing but white space is left."""
        self.sees("")
        return self.position == len(self.text)

    def items(self) -> Iterator[tuple[int, object]]:
        """The items of an array with their lines."""
        self._expect("[")
        while not self.takes("]"):
            self.sees("")
            line = self.line()
            yield line, self.value()
            if not self.sees("]"):
                self._expect(",")

    def names(self) -> Iterator[tuple[int, str]]:
        """The names of an object with their lines; the caller reads each value."""
        self._expect("{")
        while not self.takes("}"):
            self.sees("")
            line, name = self.line(), self.value()
            if not isinstance(name, str):
                raise self.error("a name in double quotes is expected")
            self._expect(":")
            yield line, name
            if not self.sees("}"):
                self._expect(",")

    def value(self) -> object:
        """Any value; one that the standard parser would silently thin out is an error object."""
        self.sees("")
        try:
            value, self.position = _STRICT.raw_decode(self.text, self.position)
        except InvalidFactError as error:
            _, self.position = _LENIENT.raw_decode(self.text, self.position)
            return error
        except json.JSONDecodeError as error:
            self.position = error.pos
            raise self.error(error.msg) from error
        except (ValueError, RecursionError) as error:
            raise self.error(str(error)) from error
        return value

    def error(self, what: str) -> InvalidFactError:
        """An error at this place."""
        return InvalidFactError(
            f"{self.name}, line {self.line()}: not valid JSON: {what}",
            hint="Correct the file, or write one JSON object on each line (JSON Lines).",
        )

    def _expect(self, sign: str) -> None:
        if not self.takes(sign):
            raise self.error(f"{sign!r} is expected")


_STRICT = json.JSONDecoder(object_pairs_hook=unique_names)
_LENIENT = json.JSONDecoder()
