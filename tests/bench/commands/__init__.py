"""The benchmarks: a module for each command, thin over its measurement; tables on stdout.

Invariant: as everywhere in the command line, what is heavy is imported when a command runs.
"""

from __future__ import annotations

import click

from kvedit.cli.common import KveditGroup, Settings, configure_logging
from tests.bench.commands.architectures import architectures
from tests.bench.commands.base import base
from tests.bench.commands.capacity import capacity
from tests.bench.commands.kills import kills
from tests.bench.commands.levers import levers
from tests.bench.commands.memory import memory
from tests.bench.commands.plot import plot
from tests.bench.commands.retain import retain
from tests.bench.commands.rollback import rollback
from tests.bench.commands.several import several
from tests.bench.commands.speed import speed
from tests.bench.commands.strategies import strategies
from tests.bench.commands.verify import verify

COMMANDS = (
    retain, strategies, levers, capacity, speed, verify, base, rollback, kills, several,
    architectures, memory, plot,
)  # fmt: skip


@click.group(cls=KveditGroup)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def bench(ctx: click.Context, quiet: bool) -> None:
    """Measure what kvedit promises, on real facts.

    Each measurement prints tables, and a Markdown block with command, commit and machine for
    docs/log. DIR of --data holds poets.jsonl, relations.jsonl and
    relation_phrasings.json. What --json kept is drawn by plot.

    \b
    Examples:
      python -m tests.bench retain --data ../shared/data
      python -m tests.bench base --data ../shared/data
      python -m tests.bench rollback --data ../shared/data --facts 20
      python -m tests.bench plot strategies.json -o strategies.png
    """
    configure_logging(0)
    ctx.obj = Settings(verbosity=-1 if quiet else 0)


for command in COMMANDS:
    bench.add_command(command)
