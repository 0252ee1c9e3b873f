"""`python -m tests.bench several`: one process against several, and one of several killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, require, run, show


@click.command()
@options.given(*options.common, options.facts(16), *options.others)
@click.option(
    "--processes",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="How many are compared with one.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of each process, the single one too.",
)
@click.option("--group", default="8", show_default=True, metavar="N|auto", help="As for ingest.")
@click.pass_obj
def several(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Ingest the same facts in one process and in several; kill one of several.

    Exit code 4 if the runs did not commit and recall the same, or a kill left anything behind.

    \b
    Examples:
      python -m tests.bench several --data ../shared/data
      python -m tests.bench several --data ../shared/data --facts 32 --processes 4
    """
    from tests.bench.several import SeveralOptions, sheets
    from tests.bench.several import several as measure

    result = run(settings, measure, SeveralOptions(**given))
    show("Several processes", given["model"] or "kvedit-tiny", "", sheets(result))
    keep(result, json_file)
    require(result.equal and result.clean, "several processes did not do what one does")
