"""What a run over many facts is asked to do, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvedit.events import EditReport, Score
from kvedit.facts.fact import Fact


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """``group`` facts at a time (None: adapted to success); when to stop; ``retry_rejected``: try
    again what was rejected in earlier runs; ``first_check``: commits before the first verification;
    ``sample``: how many facts a verification in between asks; ``places``: where the fact of a key
    stands in the input, for messages.
    """

    group: int | None = None
    limit: int | None = None
    max_failures: int | None = None
    max_seconds: float | None = None
    retry_rejected: bool = False
    skip_invalid: bool = False
    first_check: int = 16
    sample: int = 64
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FactOutcome:
    """How one fact ended: ``committed``, ``rejected``, ``failed``, or ``invalid`` (not tried)."""

    fact: Fact
    outcome: str
    reasons: tuple[str, ...] = ()
    revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestReport:
    """A run: the outcomes of what was tried, then what was not.

    ``rejected_before`` were rejected in earlier runs and not tried again, ``remaining`` counts the
    facts that were not reached;
    ``stopped`` tells why: ``limit``, ``failures``, ``errors``, ``time``, ``interrupted``,
    ``error`` (which is in ``error``) or nothing. ``retention`` and ``lost`` (keys) come from the
    last verification.
    """

    outcomes: tuple[FactOutcome, ...]
    unchanged: int = 0
    rejected_before: tuple[FactOutcome, ...] = ()
    remaining: int = 0
    stopped: str = ""
    error: Exception | None = None
    retention: Score = field(default_factory=Score)
    lost: tuple[str, ...] = ()
    repaired: tuple[EditReport, ...] = ()
    revision: int = 0
    seconds: float = 0.0

    def count(self, outcome: str) -> int:
        """How many facts of this run ended so."""
        return sum(one.outcome == outcome for one in self.outcomes)

    def require_end(self) -> IngestReport:
        """This report; raises the error that ended the run, if one did."""
        if self.error is not None:
            raise self.error
        return self
