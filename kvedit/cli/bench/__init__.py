"""The benchmarks: a module for each command, thin over ``kvedit.bench``; tables on stdout.

Invariant: as everywhere in the command line, what is heavy is imported when a command runs.
"""

from __future__ import annotations

import click

from kvedit.cli.bench.architectures import architectures
from kvedit.cli.bench.base import base
from kvedit.cli.bench.capacity import capacity
from kvedit.cli.bench.kills import kills
from kvedit.cli.bench.levers import levers
from kvedit.cli.bench.memory import memory
from kvedit.cli.bench.plot import plot
from kvedit.cli.bench.retain import retain
from kvedit.cli.bench.rollback import rollback
from kvedit.cli.bench.several import several
from kvedit.cli.bench.speed import speed
from kvedit.cli.bench.strategies import strategies
from kvedit.cli.bench.verify import verify

COMMANDS = (
    retain, strategies, levers, capacity, speed, verify, base, rollback, kills, several,
    architectures, memory, plot,
)  # fmt: skip


@click.group()
def bench() -> None:
    """Measure what kvedit promises, on real facts.

    Each measurement prints tables, and a Markdown block with command, commit and machine for
    docs/experiments.md. DIR of --data holds poets.jsonl, relations.jsonl and
    relation_phrasings.json. What --json kept is drawn by plot.

    \b
    Examples:
      kvedit bench retain --data ../shared/data
      kvedit bench base --data ../shared/data
      kvedit bench rollback --data ../shared/data --facts 20
      kvedit bench plot strategies.json -o strategies.png
    """


for command in COMMANDS:
    bench.add_command(command)
