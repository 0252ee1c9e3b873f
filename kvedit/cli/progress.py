"""Reporters: what a command says while it works.

A reporter is called with every event and is used as a context manager around the work. On a
terminal it is one live line, elsewhere a plain line now and then, with --json one JSON object a
line on stdout. Invariants: only the JSON reporter writes to stdout; a result given twice (once as
it happened, once in the command's return value) is written once.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from kvedit.events import Event, Status

PLAIN_INTERVAL_SECONDS = 5.0


def status_line(event: Status) -> str:
    """The numbers of a status event in one short line, without its phase and bar."""
    parts = []
    if event.loss is not None:
        parts.append(f"loss {event.loss:.3f}")
    if event.recall is not None:
        parts.append("recall {}/{}".format(*event.recall))
    if event.retention is not None:
        parts.append("retention {}/{}".format(*event.retention))
    if event.text:
        parts.append(event.text)
    return "  ".join(parts)


class Reporter:
    """Says nothing but warnings; the base of the others and the reporter of -q."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; what comes later is written as plain lines."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        kind = event.to_json()["message_type"]
        handler = getattr(self, f"on_{kind}", None)
        if handler is not None:
            handler(event)

    def say(self, text: str) -> None:
        """A remark for a human."""

    def on_warning(self, event: Any) -> None:
        """Warnings are for everyone: nothing regresses silently."""
        self.write(f"{click.style('warning:', fg='yellow')} {event.text}")

    def write(self, line: str) -> None:
        """One line to stderr."""
        click.echo(line, err=True)


class PlainReporter(Reporter):
    """A plain line when the phase changes, and every few seconds within one."""

    def __init__(self) -> None:
        self._phase: tuple[str, str | None] | None = None
        self._last = 0.0

    def say(self, text: str) -> None:
        """Print it."""
        self.write(text)

    def on_status(self, event: Status) -> None:
        """Print it if it is news."""
        now, phase = time.monotonic(), (event.phase, event.key)
        if phase == self._phase and now - self._last < PLAIN_INTERVAL_SECONDS:
            return
        self._phase, self._last = phase, now
        steps = f"{event.step}/{event.total}" if event.total else ""
        parts = (event.key or "", event.phase, steps, status_line(event))
        self.write("  ".join(part for part in parts if part))


class LiveReporter(Reporter):
    """One live line on a terminal, gone when the work is done."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> LiveReporter:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("loading the model", total=None, numbers="")
        self._progress.start()
        return self

    def stop(self) -> None:
        """Take the live line away; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = None

    def say(self, text: str) -> None:
        """Print it above the live line."""
        self.write(text)

    def write(self, line: str) -> None:
        """One line, above the live line while there is one."""
        if self._progress is None:
            super().write(line)
        else:
            from rich.text import Text

            self._progress.console.print(Text.from_ansi(line), soft_wrap=True)

    def on_status(self, event: Status) -> None:
        """Redraw the line."""
        if self._progress is None or self._task is None:
            return
        steps = f"{event.step}/{event.total}  " if event.total else ""
        self._progress.update(
            self._task,
            description=f"{event.key}  {event.phase}" if event.key else event.phase,
            completed=event.step,
            total=event.total or None,
            numbers=steps + status_line(event),
        )


class JsonReporter(Reporter):
    """Every event as one JSON object a line on stdout."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._written: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Write it, unless it is a result that was written already."""
        fields = event.to_json()
        line = json.dumps(fields, ensure_ascii=False)
        if fields["message_type"] in ("edit", "retention"):
            if line in self._written:
                return
            self._written.add(line)
        click.echo(line, file=self._stream)


def make_reporter(*, quiet: bool, as_json: bool = False) -> Reporter:
    """The reporter that fits the options and where stderr goes."""
    if as_json:
        return JsonReporter()
    if quiet:
        return Reporter()
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()
