"""`python -m tests.bench retain`: facts one by one, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run, show


@click.command()
@options.given(
    *options.common, options.facts(20), *options.others, options.base_sample, *options.plain,
    options.plot,
)  # fmt: skip
@click.option(
    "--true-facts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Add the facts a second time, with N facts of the model's own pretraining protected.",
)
@click.pass_obj
def retain(
    settings: Settings, /, json_file: Path | None, plot: Path | None, plain: bool, **given: Any
) -> None:
    """Add facts one by one; measure what stays, what it costs, and the plain recipe beside it.

    What was known before is asked again after 1, 2, 5, 10, 20, ... facts, by free generation. With
    --true-facts there is a second row for a store that protects true facts besides what the model
    says; none of those is asked.

    \b
    Examples:
      python -m tests.bench retain --data ../shared/data
      python -m tests.bench retain --data ../shared/data --true-facts 600
      python -m tests.bench retain --data ../shared/data --facts 5 --no-plain --plot kept.png
    """
    from tests.bench import report
    from tests.bench.retain import BenchOptions
    from tests.bench.retain import retain as measure

    result = run(settings, measure, BenchOptions(**options.without_plain(plain, given)))
    show("Retention", result.model, report.notes(result), report.retain_sheets(result))
    keep(result, json_file, plot)
