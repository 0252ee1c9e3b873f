"""What an edit or a check tells the outside, as it happens and at its end.

Invariants:
- An event is frozen and holds plain values only: it may cross threads and be stored.
- ``to_json`` gives a document that strict JSON can carry (no NaN, no infinity); its
  ``message_type`` names the kind.  Fields may be added, never renamed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from kvedit.metrics import wilson

JsonDict = dict[str, object]


@dataclass(frozen=True, slots=True)
class Similar:
    """A key that is close to another; the score runs from 0 to 100 (the same)."""

    key: str
    score: float


@dataclass(frozen=True, slots=True)
class Score:
    """``passed`` of ``n`` probes under one protocol: ``teacher-forced`` or ``generated``."""

    passed: int = 0
    n: int = 0
    protocol: str = "teacher-forced"

    @property
    def rate(self) -> float | None:
        """The share passed, or None when nothing was probed."""
        return self.passed / self.n if self.n else None

    def interval(self) -> tuple[float, float]:
        """The Wilson 95% interval of the share, as fractions."""
        return wilson(self.passed, self.n)

    def to_json(self) -> JsonDict:
        """A JSON document with the rate and the interval beside the counts."""
        return {
            "passed": self.passed,
            "n": self.n,
            "protocol": self.protocol,
            "rate": self.rate,
            "interval": list(self.interval()),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where a running edit stands."""

    message_type: ClassVar[str] = "status"
    phase: str
    key: str | None = None
    step: int = 0
    total: int = 0
    loss: float | None = None
    recall: tuple[int, int] | None = None
    retention: tuple[int, int] | None = None
    text: str = ""

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning_:
    """Something the user should know that does not stop the work."""

    message_type: ClassVar[str] = "warning"
    text: str
    code: str = ""
    key: str | None = None

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionCheck:
    """One earlier fact, re-checked at a revision; ``margin`` in logits, None if not measured."""

    message_type: ClassVar[str] = "retention"
    key: str
    revision: int
    passed: bool
    margin: float | None = None
    kind: str = "retention"

    def to_json(self) -> JsonDict:
        """A JSON document of all fields."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditReport:
    """How one edit ended; times in seconds, ranks per matrix, keys in ``broke`` were forced.

    ``key`` is for showing; ``keys`` are those of all facts that the edit was about.  ``refused``
    has what the gate said of each attempt that it refused; ``again`` earlier facts were taught once
    more with these, from the base model on.  ``before`` are those of its ``seconds`` that processes
    spent which ended in a lesson it went on with.  ``moved`` is how far each edited matrix is from
    the base model's since then, as a share of its Frobenius norm.
    """

    message_type: ClassVar[str] = "edit"
    kind: str
    outcome: str
    key: str
    revision: int | None = None
    parent: int | None = None
    reasons: tuple[str, ...] = ()
    reliability: Score = Score()
    generalization: Score = Score()
    locality: Score = Score()
    retention: Score = Score()
    steps: int = 0
    seconds: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    similar: tuple[Similar, ...] = ()
    broke: tuple[str, ...] = ()
    delta: str | None = None
    text_before: str | None = None
    text_after: str | None = None
    keys: tuple[str, ...] = ()
    not_learned: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    retrained: int = 0
    resumed_seconds: float = 0.0
    relative_norms: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> JsonDict:
        """A JSON document of all fields, scores with rate and interval."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestProgress:
    """How far a run over many facts has come; ``total`` are those it set out to teach.

    ``unchanged`` were held before it began; ``retention`` is the latest measurement of earlier
    facts; the times are in seconds, None while nothing is known.
    """

    message_type: ClassVar[str] = "progress"
    done: int
    total: int
    committed: int = 0
    rejected: int = 0
    failed: int = 0
    unchanged: int = 0
    retention: Score = Score()
    seconds_per_fact: float | None = None
    seconds_left: float | None = None

    def to_json(self) -> JsonDict:
        """A JSON document of all fields, the score with rate and interval."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last message of a run: totals under the names the command chose."""

    message_type: ClassVar[str] = "summary"
    fields: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> JsonDict:
        """A flat JSON document: the fields beside ``message_type``."""
        plain = {str(name): _plain(value) for name, value in self.fields.items()}
        return {**plain, "message_type": self.message_type}


Event = Status | Warning_ | RetentionCheck | EditReport | IngestProgress | Summary


def _document(
    event: Status | Warning_ | RetentionCheck | EditReport | IngestProgress,
) -> JsonDict:
    """All fields of an event as plain values, its kind first."""
    body = {item.name: _plain(getattr(event, item.name)) for item in fields(event)}
    return {"message_type": event.message_type, **body}


def _plain(value: object) -> object:
    """Turn a field into what strict JSON can carry."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Score):
        return value.to_json()
    if isinstance(value, Similar):
        return {"key": value.key, "score": value.score}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
