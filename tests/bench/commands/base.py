"""`python -m tests.bench base`: what the base model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run, show


@click.command()
@options.given(*options.common, options.base_sample)
@click.pass_obj
def base(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """What the base model recalls of the facts it was pretrained on, and of others.

    \b
    Examples:
      python -m tests.bench base --data ../shared/data
    """
    from tests.bench import report
    from tests.bench.retain import BenchOptions
    from tests.bench.retain import base as measure

    result = run(settings, measure, BenchOptions(**given))
    sheet = report.base_sheet("Exact greedy recall of the base model", result.base)
    show("The base model", result.model, report.BRACKETS, [sheet])
    keep(result, json_file)
