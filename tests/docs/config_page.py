"""docs/configuration.md, made from the settings: `python -m tests.docs.config_page FILE`.

Invariant: the page depends on the dataclasses of ``config`` alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from kvedit.config import Config
from kvedit.config_file import bounds, type_of
from kvedit.files import write_atomic

_INTRODUCTION = """\
# Configuration

Each store has its settings in `kvedit.toml` in its folder. The file names only what differs from
the defaults:

```toml
[gate]
min_paraphrase = 0.5
```

An unknown name, a value of the wrong type or one out of range is refused. The file is read when a
store is opened, and the journal keeps the settings of each edit.

This page is made from the program by `make docs`; a test fails when it is out of date.
"""


def page() -> str:
    """The page about all settings, as Markdown: one table for each section."""
    return "\n".join([_INTRODUCTION, *(_section_page(section) for section in fields(Config))])


def _section_page(section: Field[Any]) -> str:
    kind: Any = section.default_factory
    introduction = " ".join(str(kind.__doc__).split())
    table = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    rows = "\n".join([*table, *map(_row, fields(kind))])
    return f"## [{section.name}]\n\n{introduction}\n\n{rows}\n"


def _row(item: Field[Any]) -> str:
    default = {} if item.default is MISSING else item.default
    return (
        f"| `{item.name}` | `{json.dumps(default)}` | {_values(item)} | {item.metadata['help']} |"
    )


def _values(item: Field[Any]) -> str:
    """What a setting may be, in words."""
    kind = type_of(item)
    if item.metadata.get("choices"):
        return " or ".join(f"`{choice}`" for choice in item.metadata["choices"])
    if kind in _KINDS:
        return _KINDS[kind]
    return f"{'whole number' if kind is int else 'number'}, {bounds(item)}"


_KINDS = {str: "text", bool: "`true` or `false`", dict: "a table"}


if __name__ == "__main__":
    write_atomic(Path(sys.argv[1]), page().encode())
