"""The command line: `kvedit [--store DIR] COMMAND`.

Thin on purpose: commands parse, call the library, and show what it returns. Invariants: answers go
to stdout and everything else to stderr; importing this package imports neither torch nor rich nor
sqlite-utils, so that `kvedit --help` is quick.
"""

from __future__ import annotations

import os
import signal
import sys

import click

from kvedit.cli.check import backup, doctor, export, verify
from kvedit.cli.common import (
    EXIT_INTERRUPTED,
    KveditGroup,
    Settings,
    configure_logging,
    fail,
    show_version,
)
from kvedit.cli.edit import add, init, remove, rollback, update
from kvedit.cli.ingest import ingest
from kvedit.cli.query import ask, chat, history, list_facts, report, show, similar, status
from kvedit.errors import KveditError

EXIT_CODES = """\b
Exit codes:
  0 done    1 error    2 usage    3 some facts rejected or failed
  4 a gate failed (verify --fail-under, doctor, export)
  10 no store    11 locked    12 store newer than the program
  13 model does not match the store    130 interrupted"""


LAUNCHED = (
    ("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"), ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)  # fmt: skip
"""How launchers number the processes that they start: number, and how many there are."""


@click.group(
    cls=KveditGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--store",
    metavar="DIR",
    help="Where the facts are kept. [$KVEDIT_STORE, or ./store]",
)
@click.option("-v", "--verbose", count=True, help="Say more; -vv also shows tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Only answers, results and errors.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context, store: str | None, verbose: int, quiet: bool) -> None:
    """Write facts into a language model's weights, check them, and take them out again.

    Every change is an edit that is either committed as a new revision or leaves the model exactly
    as it was.

    \b
    First steps:
      kvedit add "Ada Lovelace" --text "The first programmer."
      kvedit ingest facts.jsonl
      kvedit ask "Who was Ada Lovelace?" --before
      kvedit list
      kvedit verify
      kvedit rollback 0
    """
    verbosity = -1 if quiet else min(verbose, 2)
    configure_logging(verbosity)
    ctx.obj = Settings(store=store, verbosity=verbosity, crew=ctx.obj)  # the crew that main has met


COMMANDS = (
    init, add, ingest, update, remove, ask, chat, list_facts, show, similar, history, status,
    report, verify, rollback, doctor, backup, export,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def several_processes() -> bool:
    """Whether a launcher started this command more than once, by what it says in the environment:
    `accelerate launch`, torchrun, and MPI where accelerate calls it.
    """
    counts = [os.environ.get(size, "1") for rank, size in LAUNCHED if rank in os.environ]
    return "MASTER_ADDR" in os.environ and any(count not in ("", "1") for count in counts)


def run_together() -> None:
    """Process 0 runs the command; the others help where it lets them, and end with it."""
    configure_logging(0)
    from kvedit.distributed.crew import Crew
    from kvedit.distributed.processes import follow

    try:
        crew = Crew()
    except KveditError as error:
        fail(error.message, error.hint)
        sys.exit(error.exit_code)
    code: object = 0
    try:
        if crew.rank:
            follow(crew)
        else:
            cli(prog_name="kvedit", obj=crew)
    except KveditError as error:  # of the others; the command has its own border
        fail(error.message, error.hint)
        code = error.exit_code
    except SystemExit as end:
        code = end.code
    finally:
        crew.end()
    crew.exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    """Entry point of the `kvedit` script."""
    try:
        if several_processes():
            run_together()
        else:
            # Whoever stops a service or a container means Ctrl-C.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            cli(prog_name="kvedit")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
