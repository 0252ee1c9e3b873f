"""The rows of a store as other folders see them, and their conversion to database columns.

Invariants:
- Rows are frozen; a dict or a database row never leaves the store.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptStoreError, InvalidFactError
from kvedit.events import JsonDict
from kvedit.facts.fact import Fact
from kvedit.facts.keys import KeyForm, normalise
from kvedit.store.checks.values import from_json
from kvedit.trust.names import RESTORE

Row = dict[str, Any]
_TEXTS = ("key", "description", "lang", "relation_of", "source")
_LISTS = ("aliases", "prompts", "paraphrases", "locality", "questions", "statements", "written")
"""Columns of JSON arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FactRow:
    """A fact and its state.

    ``revision`` is the last commit that changed it; ``health`` is ``recalled``, ``regressed``,
    ``stale`` (checked too many revisions ago) or ``unchecked``; ``margin`` is in logits.
    """

    id: int
    fact: Fact
    state: str
    created_at: str
    updated_at: str
    revision: int | None = None
    health: str = "unchecked"
    margin: float | None = None
    last_checked_revision: int | None = None
    last_checked_at: str | None = None

    def to_json(self) -> JsonDict:
        """A flat JSON document: the fact's parts and the row's."""
        return {
            "id": self.id, **self.fact.to_json(), "state": self.state, "revision": self.revision,
            "health": self.health, "margin": self.margin,
            "last_checked_revision": self.last_checked_revision,
            "last_checked_at": self.last_checked_at,
            "created_at": self.created_at, "updated_at": self.updated_at,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class FactChange:
    """What an edit changes in a fact; None means that the model does not contain it."""

    fact_id: int
    before: Fact | None
    after: Fact | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One probe's outcome, ``margin`` in logits; the store fills in the last three fields."""

    fact_id: int | None
    kind: str
    protocol: str
    prompt: str
    expected: str | None
    answer: str | None
    passed: bool
    margin: float | None = None
    edit_id: int | None = None
    revision: int | None = None
    created_at: str | None = None


@dataclass(frozen=True, slots=True)
class ProbeCount:
    """How many probes of one kind passed, of ``n``, at one revision and under one protocol.

    ``ties`` of them were asked teacher-forced, were numerical ties, and were decided by free
    generation; ``ties_passed`` of these passed.
    """

    revision: int
    kind: str
    protocol: str
    passed: int
    n: int
    ties: int = 0
    ties_passed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRow:
    """One journalled change; ``keys`` are those of the facts that it changes.

    ``gone`` says why the weights of its revision can no longer be made: ``erased`` or ``pruned``.
    """

    id: int
    kind: str
    state: str
    parent: int
    revision: int | None
    delta: str | None
    keys: tuple[str, ...]
    reasons: tuple[str, ...]
    report: Mapping[str, object]
    config: Mapping[str, object]
    started_at: str
    finished_at: str | None
    gone: str = ""

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        document = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**document, "keys": list(self.keys), "reasons": list(self.reasons)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionRow:
    """A committed model state; 0 is the base, ``restores`` is set by a rollback.

    ``dropped`` says why the delta is no longer kept: ``erased`` or ``pruned``.
    """

    id: int
    parent: int | None
    edit_id: int | None
    kind: str
    restores: int | None
    delta: str | None
    weights_digest: str
    created_at: str
    dropped: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedRow:
    """A protected text: role ``control`` (trained on) or ``locality`` (probed only).

    ``prompt`` is empty for free text; ``source`` says where the text came from.
    """

    role: str
    prompt: str
    answer: str
    source: str = ""
    id: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """The edited matrices as of a revision; ``digest`` is the SHA-256 of its manifest."""

    revision: int
    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class InterruptedEdit:
    """An edit that a killed process left open, and its facts' keys."""

    edit_id: int
    kind: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check: level ``ok``, ``warning`` or ``error``."""

    level: str
    what: str
    hint: str = ""


def to_text(value: object) -> str:
    """JSON for a database column."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def fact_text(fact: Fact | None) -> str | None:
    """A fact for a database column."""
    return None if fact is None else to_text(fact.to_json())


def fact_from_text(text: str | None) -> Fact | None:
    """The inverse of ``fact_text``; raises CorruptStoreError."""
    return None if text is None else _fact(from_json(text, dict, "a fact in the history"))


def _fact(document: Mapping[str, object]) -> Fact:
    try:
        return Fact.from_json(document)
    except InvalidFactError as error:
        key = str(document.get("key"))
        what = f"the fact {key!r:.80} in the database is no fact: {error.message:.200}"
        raise CorruptStoreError(what, hint=RESTORE) from error


def fact_columns(fact: Fact, form: KeyForm = normalise) -> Row:
    """The columns of ``facts`` that hold the fact itself, and its names in normal form."""
    document, subject = fact.to_json(), fact.relation_of
    return {
        "norm_key": form(fact.key),
        "norm_subject": normalise(subject) if subject else None,
        **{name: document.get(name) for name in _TEXTS},
        **{name: to_text(document.get(name, [])) for name in _LISTS},
    }


def fact_from_columns(row: Row) -> Fact:
    """The inverse of ``fact_columns``; raises CorruptStoreError."""
    what = f"of the fact {row['key']!r:.80}"
    lists = {name: from_json(row[name], list, f"the column {name} {what}") for name in _LISTS}
    return _fact({**{name: row[name] for name in _TEXTS}, **lists})


def edit_from(row: Row, keys: tuple[str, ...], gone: str = "") -> EditRow:
    """An edit from its database row; raises CorruptStoreError."""
    what = f"of edit {row['id']}"
    parsed: Row = {
        name: from_json(row[name], dict, f"the {name} {what}") for name in ("report", "config")
    }
    require_report(parsed["report"], what)
    parsed |= {"reasons": reasons_from(row["reasons"], what), "keys": keys, "gone": gone}
    return EditRow(**{**row, **parsed})


def reasons_from(text: str, what: str) -> tuple[str, ...]:
    """The reasons of an edit's outcome; raises CorruptStoreError."""
    reasons = from_json(text, list, f"the reasons {what}")
    if not all(isinstance(reason, str) for reason in reasons):
        raise CorruptStoreError(f"the reasons {what} are no texts", hint=RESTORE)
    return tuple(reasons)


def require_report(report: Mapping[str, object], what: str) -> None:
    """Raise CorruptStoreError for a report whose numbers are none."""
    norms = report.get("relative_norms") or {}
    numbers = [report.get("seconds", 0.0)]
    numbers += norms.values() if isinstance(norms, dict) else [norms]
    if not all(map(_is_plain_number, numbers)):
        raise CorruptStoreError(f"the report {what} has a value that is no number", hint=RESTORE)


def _is_plain_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST < value < _LARGEST  # type: ignore[operator]


_LARGEST = 1e300  # of a number in a report: a larger one, or NaN, would make others infinite


def probe_from(row: Row) -> ProbeRow:
    """A probe's outcome from its database row."""
    columns = {name: value for name, value in row.items() if name not in ("id", "passed")}
    return ProbeRow(passed=bool(row["passed"]), **columns)
