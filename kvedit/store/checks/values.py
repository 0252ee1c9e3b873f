"""The types of values in a database from elsewhere: SQLite keeps anything in any column.

Column names mean the same in every table, so a result is checked by its columns' names.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from kvedit.errors import CorruptStoreError
from kvedit.trust.names import RESTORE

_T = TypeVar("_T")
_NONE = type(None)
_NUMBERS = (
    "id", "fact_id", "edit_id", "revision", "parent", "restores", "last_checked_revision", "passed",
)  # fmt: skip
_TEXTS = (
    "name", "value", "key", "norm_key", "description", "lang", "aliases", "prompts", "paraphrases",
    "locality", "questions", "statements", "written", "state", "created_at", "updated_at",
    "norm_alias", "kind", "reasons", "report", "config", "started_at", "weights_digest", "fact",
    "protocol", "prompt", "role", "path", "digest",
)  # fmt: skip
_OPTIONAL_TEXTS = (
    "delta", "finished_at", "before", "after", "expected", "answer", "source", "last_checked_at",
    "last", "why", "relation_of", "norm_subject", "dropped",
)  # fmt: skip
_ALLOWED: dict[str, frozenset[type]] = {
    **dict.fromkeys(_NUMBERS, frozenset({int, _NONE})),
    **dict.fromkeys(_TEXTS, frozenset({str})),
    **dict.fromkeys(_OPTIONAL_TEXTS, frozenset({str, _NONE})),
    "margin": frozenset({float, int, _NONE}),
}


def require_types(columns: Sequence[str], rows: Sequence[Sequence[Any]], where: str) -> None:
    """Raise CorruptStoreError for a value of a type, or a number of a sign, that no row has."""
    for name, values in zip(columns, zip(*rows, strict=True), strict=False):
        allowed = _ALLOWED.get(name)
        if allowed is None:
            continue
        if wrong := set(map(type, values)) - allowed:
            kinds = ", ".join(sorted(kind.__name__ for kind in wrong))
            what = f"{where}: a value of the column {name} has a wrong type ({kinds})"
            raise CorruptStoreError(what, hint=RESTORE)
        if float in allowed and not all(math.isfinite(value or 0.0) for value in values):
            raise CorruptStoreError(f"{where}: a value of {name} is infinite", hint=RESTORE)
        if name in _NUMBERS and min((v for v in values if v is not None), default=0) < 0:
            what = f"{where}: a value of the column {name} is negative"
            raise CorruptStoreError(what, hint=RESTORE)


def from_json(text: str, kind: type[_T], what: str) -> _T:
    """A value that the database keeps as JSON; raises CorruptStoreError for another one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CorruptStoreError(f"{what} is no JSON: {reason:.200}", hint=RESTORE) from error
    if not isinstance(value, kind):
        raise CorruptStoreError(f"{what} is no JSON {kind.__name__}", hint=RESTORE)
    return value
