"""`python -m tests.bench strategies`: the same facts taught in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run_telling, show


@click.command()
@options.given(
    *options.common, options.facts(64), *options.others, options.base_sample, *options.plain,
    options.plot,
)  # fmt: skip
@click.option(
    "--group",
    "groups",
    callback=options.group_sizes,
    multiple=True,
    metavar="N|all|auto",
    help="Facts taught together; may be given more than once. [1, 16, all, auto]",
)
@options.resume
@click.pass_obj
def strategies(
    settings: Settings, /, json_file: Path | None, plot: Path | None, plain: bool, **given: Any
) -> None:
    """Teach the same facts one by one, in groups, all at once, and by the plain recipe.

    Each way is one run of ingest into a new store. What is held is measured in passing, after 16,
    32, 64, 128, 256, 300, 512, 1000, ... facts and after the last; each measurement is said at
    once, and FILE of --json written anew. A kvedit.toml in --store-dir is used for every store.
    With --resume a run that was stopped goes on in --store-dir; what was measured is not retold.
    Processes that a launcher started together share the work.

    \b
    Examples:
      python -m tests.bench strategies --data ../shared/data --plot strategies.svg
      python -m tests.bench strategies \\
        --data ../shared/data --facts 1000 --group auto --json auto.json
    """
    from tests.bench import report_strategies as report
    from tests.bench.strategies import StrategyOptions
    from tests.bench.strategies import strategies as measure

    options.require_store_dir(given["resume"], given["store_dir"])
    given = options.without_plain(plain, given)
    chosen = StrategyOptions(
        crew=settings.crew, **{name: value for name, value in given.items() if value != ()}
    )
    result = run_telling(settings, measure, chosen, json_file, report.line)
    show("Strategies", result.model, report.notes(result), report.sheets(result))
    keep(result, json_file, plot)
