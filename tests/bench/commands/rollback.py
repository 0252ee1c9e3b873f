"""`python -m tests.bench rollback`: whether everything can be undone to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, require, run, show


@click.command()
@options.given(*options.common, options.facts(20), *options.others)
@click.pass_obj
def rollback(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Add facts, roll back to every revision, compare digests; export and compare answers.

    Exit code 4 if anything is not as it was.

    \b
    Examples:
      python -m tests.bench rollback --data ../shared/data --facts 20
    """
    from tests.bench import report
    from tests.bench.retain import BenchOptions
    from tests.bench.undo import undo

    result = run(settings, undo, BenchOptions(**given))
    show("Rollback and export", result.model, "", report.undo_sheets(result))
    keep(result, json_file)
    require(result.exact, "not everything was as it had been")
