"""Running a benchmark from the command line, and showing, keeping and drawing what it found."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli.common import Settings
from kvedit.errors import GateFailedError

if TYPE_CHECKING:
    from tests.bench.report import Sheet

_ANY = 10_000  # columns: more than any table needs
SEE_TABLE = "See the table above."


def run(settings: Settings, measure: Callable[..., Any], options: Any) -> Any:
    """What a benchmark finds; its progress goes to stderr."""
    from kvedit.cli.progress import make_reporter

    with make_reporter(quiet=settings.quiet) as reporter:
        return measure(options, reporter)


def run_telling(
    settings: Settings,
    measure: Callable[..., Any],
    options: Any,
    json_file: Path | None,
    line: Callable[[Any], str],
) -> Any:
    """Run a long benchmark that says and keeps each measurement as soon as it is made."""
    from kvedit.cli.progress import make_reporter

    with make_reporter(quiet=settings.quiet) as reporter:

        def tell(result: Any, point: Any) -> None:
            keep(result, json_file)
            if point is not None:
                reporter.say(line(point))

        return measure(options, emit=reporter, tell=tell)


def show(title: str, model: str, notes: str, sheets: Sequence[Sheet]) -> None:
    """Tables for the eye, where they are not too wide for it, then all of them as Markdown."""
    from tests.bench import report

    _print_tables(sheets)
    click.echo(report.markdown(title, report.setting(_command()), model, notes, sheets))


def keep(result: Any, json_file: Path | None, picture: Path | None = None) -> None:
    """Write a result as JSON and as a picture, where they are wanted."""
    if json_file is None and picture is None:
        return
    from tests.bench import report

    text = report.to_json(report.setting(_command()), result)
    if json_file is not None:
        report.write(json_file, text)
    if picture is not None:
        from tests.bench import plots

        plots.draw(plots.read(text, "the result"), picture)


def require(passed: bool, message: str) -> None:
    """Exit code 4 for a measurement that found something wrong."""
    if not passed:
        raise GateFailedError(message, hint=SEE_TABLE)


def _command() -> str:
    return shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])


def _print_tables(sheets: Sequence[Sheet]) -> None:
    from rich.console import Console
    from rich.measure import measure_renderables
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for header in sheet.headers:
            table.add_column(header, overflow="fold")
        for row in sheet.rows:
            table.add_row(*(cell.replace(" = ", "\n").replace(" [", "\n[") for cell in row))
        whole = measure_renderables(console, console.options.update(max_width=_ANY), [table])
        if whole.minimum <= console.width:
            console.print(table, markup=False)  # else words would be cut into pieces
