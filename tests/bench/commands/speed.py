"""`python -m tests.bench speed`: what teaching costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run, show


@click.command()
@options.given(*options.common, options.facts(20), *options.others, *options.plain, options.plot)
@click.option(
    "--ingest-facts",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How many facts to ingest.",
)
@click.pass_obj
def speed(
    settings: Settings, /, json_file: Path | None, plot: Path | None, plain: bool, **given: Any
) -> None:
    """Seconds a fact one by one, by ingest and by the plain recipe, and where they go.

    Also peak memory, arithmetic against the machine's own matrix product, and verify of all facts.

    \b
    Examples:
      python -m tests.bench speed --data ../shared/data --plot speed.png
      python -m tests.bench speed \\
        --data ../shared/data --facts 10 --ingest-facts 128 --json speed.json
    """
    from tests.bench import report_speed as report
    from tests.bench.speed import SpeedOptions
    from tests.bench.speed import speed as measure

    result = run(settings, measure, SpeedOptions(**options.without_plain(plain, given)))
    show("Speed", result.model, report.notes(result), report.sheets(result))
    keep(result, json_file, plot)
