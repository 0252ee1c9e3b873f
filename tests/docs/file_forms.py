"""The examples of docs/guides/file-forms.md: a file, options, and what is said of it.

`python -m tests.docs.file_forms` writes what is said into the page.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from kvedit.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "file-forms.md"
EXAMPLE = re.compile(
    r"^`(?P<name>[^`]+)`(?: with `(?P<options>[^`]+)`)?\n\n```\w+\n(?P<data>.*?)```\n\n"
    r"```text\n(?P<said>.*?)```$",
    re.MULTILINE | re.DOTALL,
)


class Example(NamedTuple):
    """A file of the page, the options that go with it, and what the page says of it."""

    name: str
    options: tuple[str, ...]
    data: str
    said: str


def examples() -> Iterator[Example]:
    """The examples of the page."""
    for match in EXAMPLE.finditer(PAGE.read_text(encoding="utf-8")):
        options = tuple(shlex.split(match["options"] or ""))
        yield Example(match["name"], options, match["data"], match["said"])


def said_of(name: str, options: tuple[str, ...], data: str, folder: Path) -> str:
    """What a dry run says first: what the file was taken for, and its first facts."""
    (folder / name).write_text(data, encoding="utf-8")
    words = ("--store", str(folder / "store"), "ingest", str(folder / name), "--dry-run", *options)
    result = CliRunner().invoke(cli, words, env={"COLUMNS": "100"})
    first = re.match(
        r"(?:(?:read as|not read:) .*\n|  (?:asked|answer|probe) .*\n)*", result.output
    )
    return first[0] if first and first[0] else result.output


def main() -> None:
    """Write what is said into the page."""

    def filled(match: re.Match[str]) -> str:
        options = tuple(shlex.split(match["options"] or ""))
        with tempfile.TemporaryDirectory() as folder:
            said = said_of(match["name"], options, match["data"], Path(folder))
        return match[0][: match.start("said") - match.start()] + said + "```"

    PAGE.write_text(EXAMPLE.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
