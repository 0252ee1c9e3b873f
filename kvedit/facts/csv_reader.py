"""CSV and TSV: the first line names the columns, every further row is a record.

Invariants:
- A row is known by the line on which it begins; a quoted cell may contain line breaks.
- A row with more cells than columns is refused: it is the sign of a comma that is not quoted, and
  half a description would be added.
"""

import csv
from collections.abc import Iterable, Iterator

from kvedit.errors import InvalidFactError
from kvedit.facts.schemas import standard_names
from kvedit.files import decode

DELIMITERS = ("\t", ",", ";")
SEPARATOR = "|"
"""Separates the values of a cell with several."""

LISTS = ("aliases", "prompts", "paraphrases", "locality", "statements")
_Row = list[str] | InvalidFactError
_QUOTES = "quote a cell that contains a separator, a quote or a line break; double the quotes in it"


def detect_delimiter(text: str) -> str | None:
    """The delimiter if the first line names the columns of a table of facts, else None."""
    lines = text.splitlines()
    for delimiter in DELIMITERS:
        names = _names(next(csv.reader(lines[:1], delimiter=delimiter), []))
        if {"key", "description"} <= set(standard_names(dict.fromkeys(names))):
            return delimiter
    return None


def read_table(lines: Iterable[bytes], delimiter: str, name: str) -> Iterator[tuple[int, object]]:
    """Yield line and record of each row; a row that cannot be parsed is an InvalidFactError.

    Raises InvalidFactError if a column is named twice.
    """
    rows = _rows(lines, delimiter)
    names: list[str] = []
    for line, row in rows:
        if isinstance(row, InvalidFactError):
            yield line, row
        elif not names:
            names = _header(row, f"{name}, line {line}")
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
            unclosed = "unexpected end" in str(error)
            reason = "a double quote is opened and never closed" if unclosed else error
            yield line, InvalidFactError(f"not a row of a table: {reason}; {_QUOTES}")
            continue
        yield line, text.problem or row
        text.problem = None


class _Text:
    """Lines as text.  A line that is not UTF-8 sets ``problem``: raising would end the table."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines
        self.problem: InvalidFactError | None = None

    def __iter__(self) -> Iterator[str]:
        for data in self._lines:
            try:
                text = decode(data, "the line")
            except InvalidFactError as error:
                self.problem = error
                text = data.replace(b"\0", b"").decode("utf-8", "replace")
            yield text.replace("\r\n", "\n")


def _names(cells: Iterable[str]) -> list[str]:
    return [cell.strip().casefold() for cell in cells]


def _header(cells: Iterable[str], where: str) -> list[str]:
    names = _names(cells)
    if twice := sorted(name for name in names if name and names.count(name) > 1):
        raise InvalidFactError(f"{where}: two columns are named {twice[0]!r}", hint="Rename one.")
    return names


def _record(names: list[str], cells: list[str]) -> object:
    """A row by the names of its columns; empty cells are left out."""
    if any(cell.strip() for cell in cells[len(names) :]):
        return InvalidFactError(
            f"{len(cells)} cells, but the first line names {len(names)} columns; {_QUOTES}"
        )
    columns = standard_names({n: c for n, c in zip(names, cells, strict=False) if n})
    record = {name: cell for name, cell in columns.items() if str(cell).strip()}
    for name in LISTS:
        if name in record:
            values = str(record[name]).split(SEPARATOR)
            record[name] = [value.strip() for value in values if value.strip()]
    return record
