"""Reporters: what a command says while it works.

A reporter is called with every event and is used as a context manager around the work. On a
terminal it draws live lines, elsewhere it writes a plain line now and then, with --json one JSON
object a line on stdout. Of a run over ``many`` facts it shows how far the run has come instead of
every step of every edit. Invariants: only the JSON reporter writes to stdout; a result that comes
twice (as an event, and as the command's return value) is written once; a refused fact is named.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

import click

from kvedit.cli.output import clean, interval_text, json_text, percent, seconds_text

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kvedit.events import EditReport, Event, IngestProgress, Status

PLAIN_INTERVAL_SECONDS = 5.0
STEPS_INTERVAL_SECONDS = 30.0  # of the steps of one edit among many
STATUS_INTERVAL_SECONDS = 1.0
SIMILAR_KEY = "similar-key"  # of many facts these are counted before the first edit


def status_line(event: Status) -> str:
    """The numbers of a status event in one short line, without its phase and bar."""
    parts = [] if event.loss is None else [f"loss {event.loss:.3f}"]
    for name, counts in (("recall", event.recall), ("retention", event.retention)):
        if counts is not None:
            parts.append("{} {}/{}".format(name, *counts))
    return "  ".join([*parts, *([event.text] if event.text else [])])


def progress_line(event: IngestProgress) -> str:
    """'12/1500 facts  3 h 2 min left  11 committed  retention 98% (93-100%)  8.2 s/fact'.

    What matters most stands first: a narrow terminal cuts the end.
    """
    parts = [f"{event.done}/{event.total} facts"]
    if event.seconds_left:
        parts.append(f"{seconds_text(event.seconds_left)} left")
    parts.append(f"{event.committed} committed")
    parts += [f"{n} {name}" for name in ("rejected", "failed") if (n := getattr(event, name))]
    if (rate := event.retention.rate) is not None:
        parts.append(f"retention {percent(rate)} ({interval_text(event.retention)})")
    if event.seconds_per_fact is not None:
        parts.append(f"{event.seconds_per_fact:.1f} s/fact")
    return "  ".join(parts)


class Reporter:
    """Writes warnings alone; the base of the others and the reporter of -q."""

    def __init__(self, *, many: bool = False) -> None:
        self.many = many

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; what comes later is written as plain lines."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        handler = getattr(self, f"on_{event.message_type}", None)
        if handler is not None:
            handler(event)

    def say(self, text: str) -> None:
        """A remark for a person; nothing with -q and --json."""

    def on_warning(self, event: Any) -> None:
        """Warnings are written for everyone: nothing regresses silently."""
        if not (self.many and event.code == SIMILAR_KEY):
            self.write(f"{click.style('warning:', fg='yellow')} {clean(event.text)}")

    def write(self, line: str) -> None:
        """One line to stderr."""
        click.echo(line, err=True)


class TalkingReporter(Reporter):
    """What reporters for people have in common."""

    def say(self, text: str) -> None:
        """Print it."""
        self.write(clean(text))

    def on_edit(self, event: EditReport) -> None:
        """Of many facts name those that were refused."""
        if self.many and event.outcome not in ("committed", "unchanged"):
            self.say(f"{event.outcome} {event.kind} {event.key}: {'; '.join(event.reasons)}")


class PlainReporter(TalkingReporter):
    """A plain line when the phase changes, and every few seconds within one; of many facts the
    steps of an edit now and then.
    """

    def __init__(self, *, many: bool = False) -> None:
        super().__init__(many=many)
        self._phase: tuple[str, str | None] | None = None
        self._status_time = self._progress_time = 0.0

    def on_status(self, event: Status) -> None:
        """Print it if it is news; the steps of single facts are too many of a long run."""
        now, phase = time.monotonic(), (event.phase, event.key)
        within = self.many and event.key is not None
        least = STEPS_INTERVAL_SECONDS if within else PLAIN_INTERVAL_SECONDS
        if (within or phase == self._phase) and now - self._status_time < least:
            return
        self._phase, self._status_time = phase, now
        steps = f"{event.step}/{event.total}" if event.total else ""
        parts = (event.key or "", event.phase, steps, status_line(event))
        self.say("  ".join(part for part in parts if part))

    def on_progress(self, event: IngestProgress) -> None:
        """Print it if the last one is some time ago, and at the end."""
        now = time.monotonic()
        if now - self._progress_time >= PLAIN_INTERVAL_SECONDS or event.done == event.total:
            self._progress_time = now
            self.write(progress_line(event))


class LiveReporter(TalkingReporter):
    """Live lines on a terminal, gone when the work is done: the running edit, and all facts."""

    def __init__(self, *, many: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        super().__init__(many=many)
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20), TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._step = self._progress.add_task("loading the model", total=None, numbers="")
        self._run: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def stop(self) -> None:
        """Take the live lines away; a second call does nothing."""
        if self._progress.live.is_started:
            self._progress.stop()

    def write(self, line: str) -> None:
        """One line, above the live lines while there are any."""
        from rich.text import Text

        self._progress.console.print(Text.from_ansi(line), soft_wrap=True)

    def on_status(self, event: Status) -> None:
        """Redraw the line of the running edit."""
        steps = f"{event.step}/{event.total}  " if event.total else ""
        self._progress.update(
            self._step, completed=event.step, total=event.total or None,
            description=clean(f"{event.key}  {event.phase}" if event.key else event.phase),
            numbers=steps + clean(status_line(event)),
        )  # fmt: skip

    def on_progress(self, event: IngestProgress) -> None:
        """Redraw the line of all facts."""
        if self._run is None:
            self._run = self._progress.add_task("all facts", total=event.total, numbers="")
        numbers = progress_line(event)
        self._progress.update(self._run, completed=event.done, total=event.total, numbers=numbers)


class JsonReporter(Reporter):
    """Every event as one JSON object a line on stdout; of many facts a status a second."""

    def __init__(self, *, many: bool = False) -> None:
        super().__init__(many=many)
        self._written: set[str] = set()
        self._status_time = 0.0

    def __call__(self, event: Event) -> None:
        """Write it, unless it is a result that was written already, or too early a status."""
        if self.many and event.message_type == "status":
            now = time.monotonic()
            if now - self._status_time < STATUS_INTERVAL_SECONDS:
                return
            self._status_time = now
        line = json_text(event.to_json())
        if event.message_type in ("edit", "retention"):
            if line in self._written:
                return
            self._written.add(line)
        click.echo(line)


class Counting:
    """How far something that takes a while has come: a line on stderr every few seconds."""

    def __init__(self, quiet: bool, what: str) -> None:
        self._quiet, self._what = quiet, what
        self._time = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say it, if the last time was some time ago; ``total`` is 0 where it is not known."""
        now = time.monotonic()
        if not self._quiet and now - self._time >= PLAIN_INTERVAL_SECONDS:
            self._time = now
            click.echo(f"{done:,}{f' of {total:,}' if total else ''} {self._what}", err=True)


def make_reporter(*, quiet: bool, as_json: bool = False, many: bool = False) -> Reporter:
    """The reporter that fits the options and where stderr goes."""
    if as_json:
        return JsonReporter(many=many)
    if quiet:
        return Reporter(many=many)
    return LiveReporter(many=many) if sys.stderr.isatty() else PlainReporter(many=many)
