"""`kvedit bench base`: what the base model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.bench import options
from kvedit.cli.bench.show import keep, run, show
from kvedit.cli.common import Settings


@click.command()
@options.given(*options.common, options.base_sample)
@click.pass_obj
def base(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """What the base model recalls of the facts it was pretrained on, and of others.

    \b
    Examples:
      kvedit bench base --data ../shared/data
    """
    from kvedit.bench import report
    from kvedit.bench.retain import BenchOptions
    from kvedit.bench.retain import base as measure

    result = run(settings, measure, BenchOptions(**given))
    sheet = report.base_sheet("Exact greedy recall of the base model", result.base)
    show("The base model", result.model, report.BRACKETS, [sheet])
    keep(result, json_file)
