"""`python -m tests.bench plot`: a picture of a result that was kept."""

from __future__ import annotations

from pathlib import Path

import click

from tests.bench.commands import options


@click.command()
@click.argument("result", type=options.IN)
@options.picture
def plot(result: Path, output: Path) -> None:
    """Draw the RESULT that retain, strategies, capacity or speed kept with --json.

    The same picture as by their --plot, without measuring again; also of a run that was stopped.

    \b
    Examples:
      python -m tests.bench plot auto.json -o auto.png
      python -m tests.bench plot capacity.json -o capacity.svg
    """
    from tests.bench import plots

    plots.draw(plots.read(result.read_text(encoding="utf-8"), str(result)), output)
