"""`python -m tests.bench kills`: an ingest that is killed again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, require, run, show


@click.command()
@options.given(*options.common, options.facts(300), *options.others)
@click.option(
    "--kills",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many processes to kill.",
)
@click.option(
    "--within",
    type=click.FloatRange(min=1.0),
    default=30.0,
    show_default=True,
    help="Each kill comes when so many more facts are judge, and up to so many seconds later.",
)
@click.option("--group", default="16", show_default=True, metavar="N|auto", help="As for ingest.")
@click.pass_obj
def kills(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Kill an ingest (SIGKILL) at random moments, let it finish, and see what is left.

    The kills are spread over the whole ingest: one for each so many facts.

    Exit code 4 if a fact was lost or added twice, or doctor finds anything.

    \b
    Examples:
      python -m tests.bench kills --data ../shared/data --kind relations
      python -m tests.bench kills --data ../shared/data --facts 30 --kills 3 --within 20
    """
    from tests.bench import report
    from tests.bench.kills import KillOptions
    from tests.bench.kills import kills as measure

    result = run(settings, measure, KillOptions(**given))
    show("Kills", result.model, "", report.kills_sheets(result))
    keep(result, json_file)
    require(result.sound, "the store is not as it should be")
