"""The command line: `kvedit [--store DIR] COMMAND`.

Thin on purpose: commands parse, call the library, and show what it returns. Invariants: answers go
to stdout and everything else to stderr; importing this package imports neither torch nor rich nor
sqlite-utils, so that `kvedit --help` is quick.
"""

import io
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout

import click

from kvedit import __version__
from kvedit.cli import streams
from kvedit.cli.commands.ask import ask, chat, diff, explain
from kvedit.cli.commands.bench import bench
from kvedit.cli.commands.doctor import backup, doctor
from kvedit.cli.commands.edit import add, remove, rollback, study, update
from kvedit.cli.commands.erase import erase, prune
from kvedit.cli.commands.export import export
from kvedit.cli.commands.ingest import ingest
from kvedit.cli.commands.init import init, trust
from kvedit.cli.commands.query import history, list_facts, report, show, similar, status
from kvedit.cli.commands.verify import verify
from kvedit.cli.common import (
    EXIT_INTERRUPTED,
    KveditGroup,
    Settings,
    configure_logging,
    fail,
)
from kvedit.cli.parameters import demand_texts
from kvedit.distributed.launch import launched_rank, leave, shared_store
from kvedit.errors import KveditError

EXIT_CODES = """\b
Exit codes:
  0 done    1 error    2 usage    3 some facts rejected or failed
  4 a gate failed (verify --fail-under, doctor, export)
  10 no store    11 locked    12 store newer than the program
  13 model does not match the store    130 interrupted"""

COMMANDS = (
    init, add, ingest, update, study, remove, ask, chat, explain, list_facts, show, similar,
    history, diff, status, report, verify, rollback, erase, prune, doctor, backup, trust, export,
    bench,
)  # fmt: skip
SHARED = ("add", "ingest", "verify")
"""Commands that several processes run together; the others run on rank 0 alone."""


@click.group(
    cls=KveditGroup,
    commands=COMMANDS,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--store",
    metavar="DIR",
    type=click.Path(),
    help="Folder of the store. [$KVEDIT_STORE, or ./store]",
)
@click.option("-v", "--verbose", count=True, help="More output; -vv also shows tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Only answers, results and errors.")
@click.version_option(__version__, message="kvedit %(version)s")
@click.pass_context
def cli(ctx: click.Context, store: str | None, verbose: int, quiet: bool) -> None:
    """Train facts into a language model's weights, check them, and remove them again.

    Every change is an edit: it is committed as a new revision, or the model stays exactly as it
    was.

    \b
    First steps:
      kvedit add "Ada Lovelace" --text "The first programmer."
      kvedit ingest facts.jsonl
      kvedit ask "Who was Ada Lovelace?" --compare-base
      kvedit list
      kvedit verify
      kvedit rollback 0
    """
    if os.environ.get("NO_COLOR"):  # see no-color.org
        ctx.color = False
    verbosity = -1 if quiet else min(verbose, 2)
    configure_logging(verbosity)
    rank = launched_rank()
    if rank is not None and ctx.invoked_subcommand in SHARED:
        store = ctx.with_resource(shared_store(store))
    elif rank:
        ctx.exit()
    ctx.obj = Settings(store=store, verbosity=verbosity, rank=rank or 0)


for command in COMMANDS:
    demand_texts(command)


def run_together(rank: int) -> int:
    """Run the command as one of several processes, of which only rank 0 prints; the exit code."""
    output = io.StringIO()
    code: object = 0
    with ExitStack() as stack:
        if rank:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(output))
        try:
            cli(prog_name="kvedit")
        except SystemExit as end:
            code = end.code
    return leave(code if isinstance(code, int) else int(code is not None), output.getvalue())


def main() -> None:
    """Entry point of the `kvedit` script."""
    streams.prepare()
    try:
        # Whoever stops a service or a container means Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        rank = launched_rank()
        if rank is not None:
            sys.exit(run_together(rank))
        cli(prog_name="kvedit")
    except KveditError as error:  # before there was a command
        fail(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
