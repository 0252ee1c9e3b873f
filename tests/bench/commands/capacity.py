"""`python -m tests.bench capacity`: how much a model holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run_telling, show


@click.command()
@options.given(
    options.data, options.models, options.seed, options.json_file, options.facts(300),
    *options.others, options.base_sample, options.group("auto"), options.resume, options.plot,
)  # fmt: skip
@click.pass_obj
def capacity(
    settings: Settings, /, json_file: Path | None, plot: Path | None, group: str, **given: Any
) -> None:
    """How many facts a model holds, in facts and in bits, and what those that it loses are like.

    Give --model more than once to set models of several sizes side by side. What is held is
    measured in passing, so that groups of a given size show at which number facts begin to be lost
    or refused. With --resume a run that was stopped goes on in --store-dir; what was measured is
    not retold. Processes that a launcher started together share the work.

    \b
    Examples:
      python -m tests.bench capacity --data ../shared/data --facts 1000 --json capacity.json
      python -m tests.bench capacity \\
        --data ../shared/data --model small --model large --plot both.png
      python -m tests.bench capacity --data ../shared/data --facts 512 --group 128 --store-dir held
    """
    from tests.bench import report_capacity as report
    from tests.bench.capacity import capacity as measure
    from tests.bench.report_strategies import line
    from tests.bench.strategies import StrategyOptions

    options.require_store_dir(given["resume"], given["store_dir"])
    sources = given.pop("sources") or (None,)
    chosen = StrategyOptions(**given, crew=settings.crew, groups=(group,), plain_facts=0)
    result = run_telling(settings, partial(measure, sources=sources), chosen, json_file, line)
    show("Capacity", result.model, report.NOTES, report.sheets(result))
    keep(result, json_file, plot)
