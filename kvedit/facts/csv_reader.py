"""CSV and TSV: the first line names the columns, every further row is a record.

Invariants:
- A row is known by the line on which it begins; a quoted cell may contain line breaks.
- A line ``sep=;`` before the names of the columns, as Excel reads it, says the delimiter.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvedit.errors import InvalidFactError
from kvedit.facts.forms.encodings import line_text
from kvedit.facts.forms.names import column_name, column_names, table_record
from kvedit.facts.forms.records import ANY_COLUMNS, Columns, names_fit

DELIMITERS = ("\t", ",", ";")
_Row = list[str] | InvalidFactError
_QUOTES = "quote a cell that contains a separator, a quote or a line break; double the quotes in it"


_SEPARATOR_LINE = re.compile(r'"?sep=(.|\\t)"?', re.IGNORECASE)
_SPLITTERS = {"\\t": "\t"}
_LONGEST_NAMES = 10_000  # characters of a line that names columns


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its delimiter, the names of its columns, and lines before them (``sep=;``)."""

    delimiter: str
    names: tuple[str, ...]
    skip: int = 0


def detect_table(text: str, columns: Columns = ANY_COLUMNS) -> Table | None:
    """The table of facts that a text begins, by the names of its columns; else None."""
    return next((t for t in _tables(text) if names_fit(t.names, columns)), None)


def unknown_table(text: str) -> Table | None:
    """A table whose columns have other names: two lines that split alike; else None."""
    for table in _tables(text):
        _, second = _first_lines(text, table.skip)
        cells = next(csv.reader([second], delimiter=table.delimiter), [])
        if len(table.names) > 1 and len(table.names) == len(cells) and any(table.names):
            return table
    return None


def _tables(text: str) -> Iterator[Table]:
    """The first line with column names, under each delimiter, or under the one that is said."""
    first, second = _first_lines(text)
    said = _SEPARATOR_LINE.fullmatch(first.strip())
    line = second if said else first
    delimiters = (_SPLITTERS.get(said[1], said[1]),) if said else DELIMITERS
    for delimiter in delimiters:
        if len(line) <= _LONGEST_NAMES and delimiter not in '"\r\n':
            names = map(column_name, next(csv.reader([line], delimiter=delimiter), []))
            yield Table(delimiter, tuple(names), int(bool(said)))


def _first_lines(text: str, skip: int = 0) -> tuple[str, str]:
    lines = [line for line in text.splitlines() if line.strip()][skip : skip + 2]
    first, second = [*lines, "", ""][:2]
    return first, second


def read_table(lines: Iterable[bytes], table: Table, name: str) -> Iterator[tuple[int, object]]:
    """Yield line and record of each row; a row that cannot be parsed is an InvalidFactError.

    Raises InvalidFactError if a column is named twice.
    """
    rows = _rows(lines, table.delimiter)
    names: list[str] = []
    skipped = 0
    for line, row in rows:
        if not isinstance(row, InvalidFactError) and skipped < table.skip and any(row):
            skipped += 1
        elif isinstance(row, InvalidFactError):
            yield line, row
        elif not names:
            names = column_names(row, f"{name}, line {line}") if any(map(str.strip, row)) else names
        elif any(cell.strip() for cell in row):
            yield line, _record(names, row)


def _rows(lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, _Row]]:
    """Rows as the csv module splits them, or why it could not."""
    text = _Text(lines)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lost = f"; lines {line} to {reader.line_num} are not read" * (reader.line_num > line)
            what = f"not a row of a table: {_reason(error)}{lost}; {_QUOTES}"
            yield line, InvalidFactError(what)
            continue
        yield line, text.problem or row
        text.problem = None


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a double quote is opened and never closed"
    if "field limit" in str(error):
        return f"a cell has more than {csv.field_size_limit():,} characters; is a quote not closed?"
    return str(error)


class _Text:
    """Lines as text.  A line that is not UTF-8 sets ``problem``: raising would end the table."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self.problem: InvalidFactError | None = None

    def __iter__(self) -> Iterator[str]:
        for data in self._lines:
            try:
                text = line_text(data)
            except InvalidFactError as error:
                self.problem = error
                text = data.replace(b"\0", b"").decode("utf-8", "replace")
            yield text.replace("\r\n", "\n")


def _record(names: list[str], cells: list[str]) -> object:
    try:
        return table_record(names, cells, _QUOTES)
    except InvalidFactError as error:
        return error
