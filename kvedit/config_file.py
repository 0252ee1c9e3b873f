"""Settings as fields of dataclasses, and how a TOML file is read into them.

Invariant: a setting that is misspelt, of the wrong type or out of range is refused, never ignored.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

from kvedit.errors import UsageError

_INFINITY = float("inf")
LARGEST = 2**63 - 1  # of any number in the settings
OLD_SETTINGS = Path(__file__).parent / "data" / "old_settings.toml"


def setting(
    default: Any, low: float = 0, high: float = _INFINITY, *, help: str, choices: str = ""
) -> Any:
    """A field with a default, the range of its values (both ends included) and its meaning; of a
    text the words that it may be, with spaces between them, any if there are none.
    """
    limits = {"low": low, "high": high, "choices": tuple(choices.split())}
    return field(default=default, metadata={**limits, "help": help})


def read(path: Path, kind: type) -> dict[str, Any]:
    """The sections of a file as dataclasses, by name: the fields of ``kind``, each one's default
    where the file does not say, or is not there.

    Raises UsageError, naming the file and the setting, for anything it cannot take.
    """
    document = _document(path)
    _refuse_unknown(path, "section", document, kind)
    return {item.name: _section(path, document, item) for item in fields(kind)}


@cache
def old_settings(change: str) -> dict[str, dict[str, str]]:
    """By section and old name: the new name (``renamed``), or what to do (``removed``).

    ``read`` refuses an old name and says the new one; the second migration of the store's database
    writes the new names into the settings that earlier edits recorded.
    """
    text = OLD_SETTINGS.read_text(encoding="utf-8")
    changes: dict[str, dict[str, dict[str, str]]] = tomllib.loads(text)
    return changes[change]


def _document(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} cannot be read: it is not a file", hint="Move it away.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        raise UsageError(f"{path} is not valid TOML: {error}", hint="Correct it.") from error
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror}"
        raise UsageError(what, hint="Check that you may read it.") from error


def _section(path: Path, document: dict[str, Any], section: Field[Any]) -> Any:
    """One table of the file as its dataclass."""
    name, kind = section.name, cast(type, section.default_factory)
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} must be a table", hint=f"Write [{name}] on its own line.")
    _refuse_old_names(path, name, table)
    _refuse_unknown(path, f"setting in [{name}]", table, kind)
    types = {item.name: item for item in fields(kind)}
    where = f"{path}: [{name}]"
    return kind(**{key: _value(f"{where} {key}", table[key], types[key]) for key in table})


def _refuse_old_names(path: Path, section: str, table: dict[str, Any]) -> None:
    """Refuse a setting that was renamed or removed."""
    renamed = [
        (old, new) for old, new in old_settings("renamed").get(section, {}).items() if old in table
    ]
    if renamed:
        old, new = renamed[0]
        others = ", ".join(f"{new} instead of {old}" for old, new in renamed)
        raise UsageError(f"{path}: [{section}] {old} is now called {new}", hint=f"Write {others}.")
    for old in table:
        if hint := old_settings("removed").get(section, {}).get(old):
            raise UsageError(f"{path}: [{section}] {old} was removed", hint=hint)


def _refuse_unknown(path: Path, what: str, table: dict[str, Any], kind: type) -> None:
    """Refuse a name that the dataclass does not have."""
    names = [item.name for item in fields(kind)]
    for name in table:
        if name not in names:
            guess = get_close_matches(name, names, n=1)
            hint = f"Did you mean {guess[0]}?" if guess else f"Known: {', '.join(names)}."
            raise UsageError(f"{path}: unknown {what}: {name}", hint=hint)


def type_of(item: Field[Any]) -> type:
    """The type of a setting's values: that of its default."""
    return dict if item.default is MISSING else type(item.default)


def bounds(item: Field[Any]) -> str:
    """The range of a numeric setting, in words."""
    low, high = item.metadata["low"], item.metadata["high"]
    return f"at least {low}" if high == _INFINITY else f"between {low} and {high}"


_KINDS: dict[type, str] = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a text in quotes",
    dict: "a table",
}  # fmt: skip


def _value(where: str, value: Any, item: Field[Any]) -> object:
    """Check one value against the type of its default and its range."""
    expected = type_of(item)
    numeric = expected in (int, float)
    default = {} if item.default is MISSING else item.default
    hint = f"Correct it, or take the line out: the default is {json.dumps(default)}."
    if numeric and type(value) in (int, float) and abs(value) > LARGEST:
        what = f"{where} must be {bounds(item)} and below 2^63, got {value!r:.40}"
        raise UsageError(what, hint=hint)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        what = f"{where} must be {_KINDS[expected]}, got {value!r:.40}"
        raise UsageError(what, hint=hint)
    if numeric and not item.metadata["low"] <= value <= item.metadata["high"]:  # NaN too
        raise UsageError(f"{where} must be {bounds(item)}, got {value}", hint=hint)
    if (choices := item.metadata.get("choices")) and value not in choices:
        raise UsageError(f"{where} must be {' or '.join(choices)}, got {value!r:.40}", hint=hint)
    if isinstance(value, dict):
        _refuse_unwritable(where, value)
    return value


def _refuse_unwritable(where: str, options: dict[str, Any]) -> None:
    """Refuse options of a template that JSON, in which the store keeps them, cannot hold."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        hint = "Write texts, numbers, true, false, lists and tables; a date goes in quotes."
        raise UsageError(f"{where} holds what JSON cannot: {error}", hint=hint) from error
