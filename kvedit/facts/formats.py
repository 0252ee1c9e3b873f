"""Files of many facts: JSON Lines, JSON, CSV, TSV, Markdown or a folder of texts, by content.

Invariants:
- A row that is no fact is returned with its place and the reason, and reading continues; only a
  source that cannot be read at all raises.  Where no record at all is in a known form, that is one
  error, which names what the records have.
- JSON Lines, CSV and TSV are read line by line: their size does not matter.
- The name of a file decides nothing, except in a folder, where it is the key.
"""

import json
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from kvedit.errors import InvalidFactError, KveditError, UsageError
from kvedit.facts.csv_reader import Table, detect_table, read_table, unknown_table
from kvedit.facts.fact import Fact
from kvedit.facts.forms import markdown
from kvedit.facts.forms.encodings import is_utf8, line_text, not_utf8, utf8_lines
from kvedit.facts.forms.names import column_name
from kvedit.facts.forms.passages import join_rows, passages_of
from kvedit.facts.forms.records import (
    ANY_COLUMNS,
    CHOOSE,
    Columns,
    NoFormError,
    looks_like_fact,
    names_fit,
    read_record,
)
from kvedit.facts.json_reader import parse, read_json, repeated_name
from kvedit.facts.keys import in_words
from kvedit.files import decode, read_text
from kvedit.paths import open_input

TEXTS = (".txt", ".md")
STANDARD_INPUT = "standard input"
HEAD = 20
"""Lines that are read to detect the format."""

_FORMATS = (
    "Give JSON Lines (one object with key and description on each line), a JSON array, CSV or TSV"
    " whose first line names the columns, Markdown with a heading for each fact, or a folder of"
    " text files."
)
_NAMED = 12  # columns, in an error
_UNFIT = 1000  # records in no form at the beginning of a file, after which it is given up


@dataclass(frozen=True, slots=True)
class Located:
    """A row of the input: its place (file and line or record), its fact or its problem, the form
    that it was taken for, and its names that are ``unread`` in this form.
    """

    where: str
    fact: Fact | None
    problem: str | None = None
    form: str = ""
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How a source is to be read where that is not left to its content: the names of its two parts
    and its encoding.
    """

    columns: Columns = ANY_COLUMNS
    encoding: str | None = None


BY_CONTENT = Reading()


def read_facts(source: Path | str, reading: Reading = BY_CONTENT) -> Iterator[Located]:
    """Yield the rows of a file, a folder, or standard input (``-``), in order.

    Raises UsageError if the source cannot be read, InvalidFactError if it is empty, not text, or
    in no known format or encoding.
    """
    if str(source) != "-" and Path(source).is_dir():
        return _folder(Path(source), reading.encoding)
    return _file(source, source_name(source), reading)


def source_name(source: Path | str) -> str:
    """What messages call a source; bytes of its name that are not UTF-8 are shown escaped."""
    if str(source) == "-":
        return STANDARD_INPUT
    return os.fsencode(source).decode("utf-8", "backslashreplace")


def read_file(source: Path | str) -> Iterator[bytes]:
    """The lines of a file, or of standard input, which stays open.

    Raises UsageError if it cannot be read.
    """
    name = source_name(source)
    try:
        with nullcontext(sys.stdin.buffer) if str(source) == "-" else open_input(source) as stream:
            yield from stream
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no file {name}", hint="Check the path, or give `-` for standard input."
        ) from error
    except OSError as error:
        what = f"cannot read {name}: {error.strerror or error}"
        raise UsageError(what, hint="Check the disk, and that you may read it.") from error


def _file(source: Path | str, name: str, reading: Reading) -> Iterator[Located]:
    lines = utf8_lines(read_file(source), name, reading.encoding)
    head = _head(lines)
    start = _start(b"".join(head), name)
    if not start:
        raise InvalidFactError(f"{name} is empty", hint=_FORMATS)
    everything, columns = chain(head, lines), reading.columns
    is_json = start.startswith(("{", "["))
    if not is_json and (table := detect_table(start, columns)):
        rows = read_table(everything, table, name)
        return _located(rows, name, "line", _table_name(table), columns)
    if _is_jsonl(start, columns):
        return _located(_documents(everything), name, "line", "JSON Lines", columns)
    if is_json:
        records = read_json(decode(b"".join(everything), name), name, columns)
        return _located(records, name, "record", "JSON", columns)
    if markdown.is_markdown(start):
        text = decode(b"".join(everything), name)
        fit = partial(names_fit, columns=columns)
        records = markdown.read_markdown(text, fit, tables_alone=bool(columns))
        return _located(records, name, "line", "Markdown", columns)
    if not is_utf8(b"".join(head)):
        raise not_utf8(b"".join(head), name)
    raise _unknown(start, name, columns)


def _table_name(table: Table) -> str:
    """What messages call a table."""
    names = {",": "CSV", "\t": "TSV", ";": "CSV with semicolons"}
    return names.get(table.delimiter, f"CSV with {table.delimiter!r}")


def _unknown(start: str, name: str, columns: Columns) -> InvalidFactError:
    """The error for a file in no format: the columns of a table, else how the text begins."""
    file = "-" if name == STANDARD_INPUT else shlex.quote(name)
    one_fact, table = f"One text is one fact: kvedit add KEY {file}", unknown_table(start)
    if table is not None:
        chosen = [one for one in (columns.key, columns.description) if one]
        absent = [repr(one) for one in chosen if column_name(one) not in table.names]
        what = (
            f"has no column {' or '.join(absent)}"
            if absent
            else "is in no format that kvedit reads"
        )
        found = in_words([repr(one) for one in table.names if one], most=_NAMED)
        hint = CHOOSE if chosen else f"The first line has to name the columns. {CHOOSE}\n{one_fact}"
        return InvalidFactError(f"{name} {what}; its columns are {found}", hint=hint)
    beginning = " ".join(start.split())[:60]
    return InvalidFactError(
        f"{name} is in no format that kvedit reads; it begins with {beginning!r}",
        hint=f"{_FORMATS}\n{one_fact}",
    )


def _start(head: bytes, name: str) -> str:
    """The beginning as text.  Binary data is refused; a single bad byte is left to its row."""
    if b"\0" in head or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        decode(head, name)
    return head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()


def _head(lines: Iterator[bytes]) -> list[bytes]:
    """The first ``HEAD`` lines, and more until one is not blank."""
    head: list[bytes] = []
    for line in lines:
        head.append(line)
        if len(head) >= HEAD and any(one.strip() for one in head):
            break
    return head


def _is_jsonl(text: str, columns: Columns) -> bool:
    """Whether the beginning of a file has one object on each line.

    A line that is a whole object means JSON Lines, also when the first line is broken.  But a
    single line may be a mapping of keys to descriptions, and a first line that ends by opening a
    list is the beginning of a JSON document.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first, *others = (_object(line) for line in lines)
    if not others:
        return first is not None and looks_like_fact(first, columns)
    return first is not None or (others[0] is not None and lines[0][-1] not in "[{,:")


def _object(line: str) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _documents(lines: Iterable[bytes]) -> Iterator[tuple[int, object]]:
    """Number and document of each line that is not blank, or its InvalidFactError."""
    for number, data in enumerate(lines, start=1):
        if data.strip(b" \t\r\n\xef\xbb\xbf"):
            try:
                yield number, parse_line(line_text(data).rstrip())
            except InvalidFactError as error:
                yield number, error


def parse_line(line: str) -> object:
    """The JSON document of one line; raises InvalidFactError."""
    try:
        document = parse(line)
    except (ValueError, RecursionError) as error:
        what = str(error)
        if isinstance(error, json.JSONDecodeError):  # its line number would always be 1
            what = f"{error.msg} at column {error.colno}"
        raise InvalidFactError(
            f"not valid JSON: {what}", hint="Write one JSON object on each line."
        ) from error
    if repeated := repeated_name(document):
        raise repeated
    return document


def _located(
    records: Iterable[tuple[int, object]], name: str, unit: str, container: str, columns: Columns
) -> Iterator[Located]:
    """Facts from numbered records; an InvalidFactError among them is the problem of its row.

    Raises InvalidFactError if no record is in any form.
    """
    numbered = _expanded(join_rows(records))
    rows = (_row(f"{name}, {unit} {n}", record, container, columns) for n, record in numbered)
    unfit: list[Located] = []
    first: Located | None = None
    for first, is_unfit in rows:
        if not is_unfit:
            break
        unfit.append(first)
        if len(unfit) >= _UNFIT:
            break
    if first is not None and unfit and unfit[-1] is first:
        raise InvalidFactError(
            f"{name} is in no format that kvedit reads: {unfit[0].problem}", hint=CHOOSE
        )
    yield from unfit
    yield from () if first is None else (first,)
    yield from (row for row, _ in rows)


def _row(where: str, record: object, container: str, columns: Columns) -> tuple[Located, bool]:
    """A record as a row, and whether it is in no form."""
    try:
        if isinstance(record, InvalidFactError):
            raise record
        form, fact = read_record(record, columns)
    except InvalidFactError as error:
        return _bad(where, error), isinstance(error, NoFormError)
    label = _label(container, form.name)
    return Located(where, fact, form=label, unread=form.unread), False


@lru_cache(maxsize=100)
def _label(container: str, form: str) -> str:
    return f"{container}, {form}"


def _expanded(records: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    """Records, of a document with several passages one for each."""
    for number, record in records:
        parts = passages_of(record) if isinstance(record, Mapping) else None
        yield from [(number, record)] if parts is None else ((number, part) for part in parts)


def _bad(where: str, error: KveditError) -> Located:
    return Located(where, None, error.message.removeprefix(f"{where} "))


def _folder(folder: Path, encoding: str | None) -> Iterator[Located]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        what = f"cannot read {source_name(folder)}: {error.strerror}"
        raise UsageError(what, hint="Check the disk, and that you may read it.") from error
    texts = [path for path in paths if path.suffix.lower() in TEXTS and path.is_file()]
    if not texts:
        raise InvalidFactError(
            f"the folder {source_name(folder)} has no {' or '.join(TEXTS)} files",
            hint="Each text file is a fact; its name without the ending is the key.\n"
            "Facts in JSON Lines, JSON, CSV or TSV: name the file itself.",
        )
    facts = set(texts)
    others = tuple(path.name for path in paths if path not in facts)
    return (_text_file(path, encoding, others) for path in texts)


def _text_file(path: Path, encoding: str | None, others: tuple[str, ...]) -> Located:
    where = source_name(path)
    # Some file systems return decomposed accents (NFD).
    key = unicodedata.normalize("NFC", path.stem)
    try:
        fact = Fact.create(key, read_text(path, encoding), source=path.name)
        return Located(where, fact, form="a folder of texts, named by their keys", unread=others)
    except KveditError as error:
        return _bad(where, error)
