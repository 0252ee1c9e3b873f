"""Reporters for runs over many facts: how far it has come, not every step of every edit.

Invariants: as in `progress`; a fact that is refused is always named, what went well is counted.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from kvedit.cli.output import percent, seconds_text
from kvedit.cli.progress import (
    PLAIN_INTERVAL_SECONDS,
    JsonReporter,
    LiveReporter,
    PlainReporter,
    Reporter,
)

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kvedit.events import EditReport, Event, IngestProgress, Score, Status

STATUS_INTERVAL_SECONDS = 1.0
COUNTED_BEFORE = "similar-key"  # a warning on each fact would drown what matters


def progress_line(event: IngestProgress) -> str:
    """'12/1500 facts  3 h 2 min left  11 committed  retention 98% (93-100%)  8.2 s/fact'.

    What matters most stands first: a narrow terminal cuts the end.
    """
    parts = [f"{event.done}/{event.total} facts"]
    if event.seconds_left:
        parts.append(f"{seconds_text(event.seconds_left)} left")
    parts.append(f"{event.committed} committed")
    parts += [f"{n} {name}" for name in ("rejected", "failed") if (n := getattr(event, name))]
    if event.retention.rate is not None:
        parts.append(f"retention {_share(event.retention)}")
    if event.seconds_per_fact is not None:
        parts.append(f"{event.seconds_per_fact:.1f} s/fact")
    return "  ".join(parts)


def _share(score: Score) -> str:
    low, high = (round(100 * bound) for bound in score.interval())
    return f"{percent(score.rate or 0.0)} ({low}-{high}%)"


def _refusal(event: EditReport) -> str | None:
    """A line for an edit that did not happen."""
    if event.outcome in ("committed", "unchanged"):
        return None
    return f"{event.outcome} {event.kind} {event.key}: {'; '.join(event.reasons)}"


class QuietIngest(Reporter):
    """Says nothing but warnings."""

    def on_warning(self, event: Any) -> None:
        """All but those that were counted before the first edit."""
        if event.code != COUNTED_BEFORE:
            super().on_warning(event)


class PlainIngest(QuietIngest, PlainReporter):
    """A plain line now and then, for logs."""

    def __init__(self) -> None:
        super().__init__()
        self._told = 0.0

    def on_status(self, event: Status) -> None:
        """What is done to the whole; the steps of single facts are too many."""
        if event.key is None:
            super().on_status(event)

    def on_progress(self, event: IngestProgress) -> None:
        """Print it if the last one is some time ago, and at the end."""
        now = time.monotonic()
        if now - self._told >= PLAIN_INTERVAL_SECONDS or event.done == event.total:
            self._told = now
            self.write(progress_line(event))

    def on_edit(self, event: EditReport) -> None:
        """Name what was refused."""
        if line := _refusal(event):
            self.write(line)


class LiveIngest(QuietIngest, LiveReporter):
    """Two live lines on a terminal: the edit at hand, and all facts."""

    def __init__(self) -> None:
        super().__init__()
        self._all: TaskID | None = None

    def on_progress(self, event: IngestProgress) -> None:
        """Redraw the line of all facts."""
        if self._progress is None:
            return
        if self._all is None:
            self._all = self._progress.add_task("all facts", total=event.total, numbers="")
        numbers = progress_line(event)
        self._progress.update(self._all, completed=event.done, total=event.total, numbers=numbers)

    def on_edit(self, event: EditReport) -> None:
        """Name what was refused, above the live lines."""
        if line := _refusal(event):
            self.write(line)


class JsonIngest(JsonReporter):
    """Every event as a JSON object a line; of the steps of edits one a second."""

    def __init__(self) -> None:
        super().__init__()
        self._told = 0.0

    def __call__(self, event: Event) -> None:
        """Write it, unless a status was written just now."""
        if event.message_type == "status":
            now = time.monotonic()
            if now - self._told < STATUS_INTERVAL_SECONDS:
                return
            self._told = now
        super().__call__(event)


def make_ingest_reporter(*, quiet: bool, as_json: bool) -> Reporter:
    """The reporter that fits the options and where stderr goes."""
    if as_json:
        return JsonIngest()
    if quiet:
        return QuietIngest()
    return LiveIngest() if sys.stderr.isatty() else PlainIngest()
