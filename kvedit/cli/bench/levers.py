"""`kvedit bench levers`: what each part of the method is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.bench import options
from kvedit.cli.bench.show import keep, run_telling, show
from kvedit.cli.common import Settings


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
      kvedit bench levers --data ../shared/data --plot levers.svg
      kvedit bench levers --data ../shared/data --facts 300 --group auto --no-plain
    """
    from kvedit.bench import report_strategies as report
    from kvedit.bench.levers import levers as measure
    from kvedit.bench.strategies import StrategyOptions

    given = options.without_plain(plain, given)
    chosen = StrategyOptions(**given, groups=(group,))
    result = run_telling(settings, measure, chosen, json_file, report.line)
    show("Levers", result.model, report.notes(result), report.sheets(result))
    keep(result, json_file, plot)
