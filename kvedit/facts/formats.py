"""Files of many facts: JSON Lines, JSON, CSV, TSV or a folder of texts, detected by content.

Invariants:
- A row that is no fact is returned with its place and the reason, and reading continues; only a
  source that cannot be read at all raises.
- JSON Lines, CSV and TSV are read line by line: their size does not matter.
- The name of a file decides nothing, except in a folder, where it is the key.
"""

import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from kvedit.errors import InvalidFactError, KveditError, UsageError
from kvedit.facts.csv_reader import detect_delimiter, read_table
from kvedit.facts.fact import Fact
from kvedit.facts.json_reader import parse, read_json, repeated_name
from kvedit.facts.schemas import fact_from, looks_like_fact
from kvedit.files import decode, read_text
from kvedit.paths import open_input

TEXTS = (".txt", ".md")
HEAD = 20
"""Lines that are read to detect the format."""

_FORMATS = (
    "Give JSON Lines (one object with key and description on each line), a JSON array, CSV or TSV"
    " whose first line names the columns key and description, or a folder of text files."
)


@dataclass(frozen=True, slots=True)
class Located:
    """A row of the input: its place (file and line or record), and its fact or its problem."""

    where: str
    fact: Fact | None
    problem: str | None = None


def read_facts(source: Path | str) -> Iterator[Located]:
    """Yield the rows of a file, a folder, or standard input (``-``), in order.

    Raises UsageError if the source cannot be read, InvalidFactError if it is empty, not text, or
    in no known format.
    """
    if str(source) != "-" and Path(source).is_dir():
        return _folder(Path(source))
    return _file(source, source_name(source))


def source_name(source: Path | str) -> str:
    """What messages call a source; bytes of its name that are not UTF-8 are shown escaped."""
    if str(source) == "-":
        return "standard input"
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
        raise UsageError(f"cannot read {name}: {error.strerror or error}") from error


def _file(source: Path | str, name: str) -> Iterator[Located]:
    lines = read_file(source)
    head = _head(lines)
    start = _start(b"".join(head), name)
    if not start:
        raise InvalidFactError(f"{name} is empty", hint=_FORMATS)
    everything = chain(head, lines)
    delimiter = detect_delimiter(start)
    if delimiter is not None:
        return _located(read_table(everything, delimiter, name), f"{name}, line")
    if _is_jsonl(start):
        return _located(_documents(everything), f"{name}, line")
    if start.startswith(("{", "[")):
        records = read_json(decode(b"".join(everything), name), name)
        return _located(records, f"{name}, record")
    beginning = " ".join(start.split())[:60]
    raise InvalidFactError(
        f"{name} is in no format that kvedit reads; it begins with {beginning!r}",
        hint=f"{_FORMATS}\nOne text is one fact: kvedit add KEY {name}",
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


def _is_jsonl(text: str) -> bool:
    """Whether the beginning of a file has one object on each line.

    A line that is a whole object means JSON Lines, also when the first line is broken.  But a
    single line may be a mapping of keys to descriptions, and a first line that ends by opening a
    list is the beginning of a JSON document.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first, *others = (_object(line) for line in lines)
    if not others:
        return first is not None and looks_like_fact(first)
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
                yield number, parse_line(decode(data, "the line").rstrip())
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


def _located(records: Iterable[tuple[int, object]], prefix: str) -> Iterator[Located]:
    """Facts from numbered records; an InvalidFactError among them is the problem of its row."""
    for number, record in records:
        where = f"{prefix} {number}"
        try:
            if isinstance(record, InvalidFactError):
                raise record
            yield Located(where, fact_from(record))
        except InvalidFactError as error:
            yield _bad(where, error)


def _bad(where: str, error: KveditError) -> Located:
    return Located(where, None, error.message.removeprefix(f"{where} "))


def _folder(folder: Path) -> Iterator[Located]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read {source_name(folder)}: {error.strerror}") from error
    texts = [path for path in paths if path.suffix.lower() in TEXTS and path.is_file()]
    if not texts:
        raise InvalidFactError(
            f"the folder {source_name(folder)} has no {' or '.join(TEXTS)} files",
            hint="Each text file is a fact; its name without the ending is the key.\n"
            "Facts in JSON Lines, JSON, CSV or TSV: name the file itself.",
        )
    return (_text_file(path) for path in texts)


def _text_file(path: Path) -> Located:
    where = source_name(path)
    # Some file systems return decomposed accents (NFD).
    key = unicodedata.normalize("NFC", path.stem)
    try:
        return Located(where, Fact.create(key, read_text(path), source=path.name))
    except KveditError as error:
        return _bad(where, error)
