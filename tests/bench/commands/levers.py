"""`python -m tests.bench levers`: what each part of the method is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run_telling, show


@click.command()
@options.given(
    *options.common, options.facts(128), *options.others, options.base_sample, *options.plain,
    options.group("64"), options.plot,
)  # fmt: skip
@click.pass_obj
def levers(
    settings: Settings, /, json_file: Path | None, plot: Path | None, group: str, plain: bool,
    **given: Any,
) -> None:  # fmt: skip
    """Teach the same facts with everything, without one lever at a time, and by the plain recipe.

    The levers: the price of what moves, the replay of protected text, the search for what the
    model knows, the rehearsal of earlier facts, the small weight of tokens that lead, and
    beginning anew. All start from the same store and are asked the same questions, as in bench
    strategies.

    \b
    Examples:
      python -m tests.bench levers --data ../shared/data --plot levers.svg
      python -m tests.bench levers --data ../shared/data --facts 300 --group auto --no-plain
    """
    from tests.bench import report_strategies as report
    from tests.bench.levers import levers as measure
    from tests.bench.strategies import StrategyOptions

    given = options.without_plain(plain, given)
    chosen = StrategyOptions(**given, groups=(group,))
    result = run_telling(settings, measure, chosen, json_file, report.line)
    show("Levers", result.model, report.notes(result), report.sheets(result))
    keep(result, json_file, plot)
