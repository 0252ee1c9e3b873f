"""Events: what an edit or a check reports while it runs and at its end.

Invariants:
- An event is frozen and contains plain values only: it may cross threads and be stored.
- ``to_json`` returns a document of strict JSON (no NaN, no infinity) whose ``message_type`` names
  the kind.  Fields may be added, never renamed.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar

from kvedit.metrics import wilson

JsonDict = dict[str, object]


@dataclass(frozen=True, slots=True)
class Similar:
    """A key that is similar to another; the score goes from 0 to 100 (the same key)."""

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
        return {**asdict(self), "rate": self.rate, "interval": list(self.interval())}


@dataclass(frozen=True, slots=True)
class _Message:
    """What the events have in common."""

    message_type: ClassVar[str]

    def to_json(self) -> JsonDict:
        """A JSON document of all fields, ``message_type`` first; scores have rate and interval."""
        body = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        return {"message_type": self.message_type, **body}


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(_Message):
    """The progress of a running edit: ``step`` of ``total``; counts are (passed, of how many)."""

    message_type: ClassVar[str] = "status"
    phase: str
    key: str | None = None
    step: int = 0
    total: int = 0
    loss: float | None = None
    recall: tuple[int, int] | None = None
    retention: tuple[int, int] | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning_(_Message):
    """Something the user should know; the command continues."""

    message_type: ClassVar[str] = "warning"
    text: str
    code: str = ""
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionCheck(_Message):
    """One earlier fact, checked at a revision; ``margin`` in logits, None if not measured.

    ``answers`` counts its held-out questions, where they were asked.
    """

    message_type: ClassVar[str] = "retention"
    key: str
    revision: int
    passed: bool
    margin: float | None = None
    kind: str = "retention"
    answers: Score = Score(protocol="generated")


@dataclass(frozen=True, slots=True, kw_only=True)
class EditReport(_Message):
    """The result of one edit; times in seconds, ranks by matrix.

    ``key`` is for display, ``keys`` are those of all facts the edit changed.  ``not_learned`` are
    the keys of a group's facts that were left out; ``broke`` are the keys of earlier facts that a
    forced edit damaged.  ``refusals`` are the gate's reasons against each earlier attempt,
    ``retrained`` counts the committed facts trained once more in a compaction.
    ``resumed_seconds``, a part of ``seconds``, were spent by processes that ended before the edit
    was resumed.  ``relative_norms`` are the Frobenius norms of the accumulated deltas, as shares of
    the base matrices' norms.  ``perplexity`` of ordinary text is a multiple of the base model's,
    None for a model that reads none.  ``answers`` counts the facts' held-out questions that were
    answered freely, ``perturbation_gap`` is how many times as perplexing their texts are in another
    order (the geometric mean): neither is a reason to reject an edit.
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
    answers: Score = Score(protocol="generated")
    perturbation_gap: float | None = None
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
    perplexity: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestProgress(_Message):
    """The progress of an ingest: ``done`` of ``total`` facts.

    ``unchanged`` facts were committed before it started; ``retention`` is the latest score of
    earlier facts; times are in seconds, None before the first measurement.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last message of a command: its totals, by name."""

    message_type: ClassVar[str] = "summary"
    fields: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> JsonDict:
        """A flat JSON document: the fields beside ``message_type``."""
        plain = {str(name): _plain(value) for name, value in self.fields.items()}
        return {**plain, "message_type": self.message_type}


Event = Status | Warning_ | RetentionCheck | EditReport | IngestProgress | Summary


def _plain(value: object) -> object:
    """Turn a field into what strict JSON can carry."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Score):
        return value.to_json()
    if isinstance(value, Similar):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
