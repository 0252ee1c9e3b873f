"""What options and arguments take: texts, numbers, times, files.

Invariants:
- A value that no command could use is a usage error, whatever it is: a number of 400 digits, bytes
  that are no text.
- Every plain text of a command is a ``TEXT``, also one that its author did not declare
  (``demand_texts``); names of files are ``click.Path``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

_SURROGATE = re.compile("[\ud800-\udfff]")
_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?")
_FILE_SIZE = re.compile(r"[1-9][0-9]{0,8}(KB|MB|GB)", re.ASCII)


class Text(click.ParamType[str]):
    """A text; the bytes of a command line that are not UTF-8 are none."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value, unless it holds a lone surrogate: what Python makes of such bytes."""
        text = str(value)
        if broken := _SURROGATE.search(text):
            code, place = ord(broken[0]), broken.start()
            self.fail(f"not a text in UTF-8: U+{code:04X} at position {place}", param, ctx)
        return text


class Source(click.ParamType[str]):
    """A file or a folder to read, or '-' for standard input; whoever reads it says what is wrong
    with it.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value; an empty one, which Python takes for the working folder, is a mistake."""
        if not str(value):
            self.fail("the name is empty", param, ctx)
        return str(value)


class Named(click.Path):
    """The name of a file or a folder; an empty one is a mistake, as for ``Source``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if not str(value):
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


TEXT = Text()
SOURCE = Source()
COUNT = click.IntRange(min=1)
REVISION = click.IntRange(min=0)
FILE = Named(dir_okay=False, path_type=Path)
NEW_FOLDER = Named(file_okay=False, path_type=Path)
INPUT_FILE = Named(exists=True, dir_okay=False, path_type=Path)


def seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that takes a time: 90, 90s, 30m, 2h or 1h30m in seconds."""
    if value is None:
        return None
    match = _DURATION.fullmatch(value.strip())
    if not match or not any(match.groups()):
        raise click.BadParameter(f"{value!r:.80} is not a time; write 90s, 30m, 2h or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + rest


def file_size(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that takes the size of a file: 500MB or 2GB."""
    if value is not None and not _FILE_SIZE.fullmatch(value):
        raise click.BadParameter(f"{value!r:.80} is not a file size; write 500MB or 2GB")
    return value


def encoding(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback of --encoding: the name of an encoding of texts, as Python has it."""
    from kvedit.facts.forms.encodings import encoding_name

    return None if value is None else encoding_name(value)


def demand_texts(command: click.Command) -> None:
    """Give every parameter of a command, and of commands within it, that takes a plain string the
    type ``TEXT``.
    """
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = TEXT
    for inner in getattr(command, "commands", {}).values():
        demand_texts(inner)
