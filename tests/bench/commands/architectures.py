"""`python -m tests.bench architectures`: every family of models through all that a store does."""

from __future__ import annotations

from pathlib import Path

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, require, show


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the base weights.",
)
@options.json_file
@click.pass_obj
def architectures(
    settings: Settings, names: tuple[str, ...], dtype: str, json_file: Path | None
) -> None:
    """Take tiny models of every architecture, or of NAMES, through all that a store does.

    Each is built here, without a download: add three facts, recall and retain them, update, remove,
    roll back to the bit, export, reload. Exit code 4 if any of it fails.

    \b
    Examples:
      python -m tests.bench architectures
      python -m tests.bench architectures GPT-2 Mixtral --dtype bfloat16
    """
    from kvedit.cli.progress import make_reporter
    from tests.bench import architectures as bench_architectures

    with make_reporter(quiet=settings.quiet) as reporter:
        result = bench_architectures.run(names, dtype, reporter)
    show("Architectures", f"tiny, {dtype}", "", [bench_architectures.sheet(result)])
    keep(result, json_file)
    require(result.passed, "not every architecture passed")
