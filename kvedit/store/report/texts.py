"""How texts of a store are shown on a page that is sent to others.

Invariants:
- No path of the machine that made the page: a file or folder is called by its last name.
- Facts are shown as they are, only cut; nothing else of them is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_STEP = r"[^\s/\\:;,()\"'<>|](?:[^/\\:;,()\"<>|\n]*[^\s/\\:;,()\"<>|])?"  # inside, also spaces
_LAST = r"[^\s/\\:;,()\"'<>|]*"
_ROOT = r"(?:file:/*|~|[A-Za-z]:|\\)?[/\\]"
_PATH = re.compile(rf"(?<![\w/\\.]){_ROOT}(?:{_STEP}[/\\])+(?P<last>{_LAST})")
_QUOTED = re.compile(rf"(?P<quote>['\"`]){_ROOT}(?P<path>[^'\"`\n]+)(?P=quote)")
_SEPARATORS = re.compile(r"[/\\]+")
_IS_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]|.*\\|file:")


def folder_name(path: str) -> str:
    """The last name of a path; of ``.`` and the like that of the folder that it stands for."""
    return _last(os.path.abspath(path)) or path


def model_name(name: str) -> str:
    """A model's name: as on a hub, or the last name of its folder."""
    return _last(name) if _IS_PATH.match(name) else name


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """A text in which every absolute path is replaced by its last name.

    ``known`` are paths of this machine, which may have spaces and signs in them.
    """
    # A known path keeps the form of one, so that what follows it is taken together with it.
    for path in sorted({str(Path.home()), *known} - {"", "/"}, key=len, reverse=True):
        text = text.replace(path, f"/_/{_last(path)}") if os.path.isabs(path) else text
    text = _QUOTED.sub(lambda m: f"{m['quote']}{_last(m['path'])}{m['quote']}", text)
    return _PATH.sub(lambda m: m["last"] or _last(m[0]), text)


def clipped(text: str, length: int) -> str:
    """The beginning of a text, with a sign that it was cut, of at most ``length`` characters."""
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def fitting(rows: Iterable[tuple[int, T]], budget: int) -> Iterator[T]:
    """The first rows that fit into a number of bytes, given with the bytes that each takes."""
    for size, row in rows:
        budget -= size
        if budget < 0:
            return
        yield row


def _last(path: str) -> str:
    names = [name for name in _SEPARATORS.split(path) if name]
    return names[-1] if names else ""
