"""`python -m tests.bench verify`: how long a check of all facts takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings
from tests.bench.commands import options
from tests.bench.commands.show import keep, run, show


@click.command()
@options.given(
    options.data, options.model, options.json_file, options.facts(1000),
    options.kind("known", default="known"), options.facts_file, options.store_dir,
)  # fmt: skip
@click.pass_obj
def verify(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """How long verify takes, over a store of so many facts that is made without training.

    Facts are written down as committed, the weights stay as they are. By default they are poets
    that the model learned in pretraining (--kind known), so that the answers, which decide how long
    generation goes on, are those of a model that holds its facts.

    \b
    Examples:
      python -m tests.bench verify --data ../shared/data
      python -m tests.bench verify \\
        --data ../shared/data --facts 3000 --kind poets --json verify.json
    """
    from tests.bench import verification
    from tests.bench.retain import BenchOptions

    result = run(settings, verification.verification, BenchOptions(**given))
    show("Verification", result.model, verification.NOTES, verification.sheets(result))
    keep(result, json_file)
