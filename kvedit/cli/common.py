"""What every command shares: settings, the error border, options, and how stores are opened.

Invariants: nothing here imports torch, rich or sqlite-utils at import time; a missing store or an
unknown key is reported before the model is loaded; every error becomes its exit code in one place
(`KveditGroup.invoke`), with a traceback only at -vv.
"""

from __future__ import annotations

import logging
import os
import shlex
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvedit import __version__
from kvedit.cli.output import clean
from kvedit.errors import KveditError

if TYPE_CHECKING:
    from kvedit.cli.progress import Reporter
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.store.store import Store

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
LOG_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options. `verbosity`: -1 quiet, 0 normal, 1 verbose, 2 debugging; `rank`: of
    several processes that run the command together, of which only 0 writes files.
    """

    store: str | None = None
    verbosity: int = 0
    rank: int = 0

    @property
    def quiet(self) -> bool:
        """Whether only answers, results and errors are wanted."""
        return self.verbosity < 0

    def command(self, *words: str) -> str:
        """A kvedit command line to suggest, for the same store, quoted for a shell."""
        store = ("--store", self.store) if self.store else ()
        return shlex.join(("kvedit", *store, *words))


class KveditGroup(click.Group):
    """The command group; its `invoke` is the one place where errors become exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into a message on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            command = _settings(ctx).command("status")
            _fail(ctx, "interrupted", f"run `{command}` to see the state of the store")
            code = EXIT_INTERRUPTED
        except KveditError as error:
            _fail(ctx, error.message, error.hint)
            code = error.exit_code
        except OSError as error:
            _fail(ctx, _os_message(error), "")
            code = EXIT_ERROR
        except Exception as error:  # whatever else happens is a defect of kvedit
            _fail(ctx, f"unexpected {type(error).__name__}: {error}", _defect_hint(ctx))
            code = EXIT_ERROR
        ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order they were added: the order in which they are needed."""
        return list(self.commands)


def _settings(ctx: click.Context) -> Settings:
    return ctx.obj if isinstance(ctx.obj, Settings) else Settings()


def _fail(ctx: click.Context, message: str, hint: str) -> None:
    if _settings(ctx).verbosity >= 2:
        click.echo(traceback.format_exc().rstrip(), err=True)
    fail(message, hint)


def fail(message: str, hint: str) -> None:
    """An error on stderr, and what to do next."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {clean(message)}", err=True)
    for line in hint.splitlines():
        click.echo(f"{click.style('hint:', fg='yellow')} {clean(line)}", err=True)


def _os_message(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _defect_hint(ctx: click.Context) -> str:
    if _settings(ctx).verbosity >= 2:
        return "this is a bug in kvedit; please report it with the lines above"
    return "this is a bug in kvedit; run it again as `kvedit -vv ...` for the traceback"


def configure_logging(verbosity: int) -> None:
    """Send log lines to stderr; below -vv without those of the libraries."""
    level = LOG_LEVELS[max(-1, min(2, verbosity))]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("kvedit").setLevel(level)
    if verbosity >= 2:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def json_option(command: Command) -> Command:
    """`--json` of a query: one document on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def json_lines_option(command: Command) -> Command:
    """`--json` of an edit: JSON Lines on stdout, the last one a summary."""
    text = "Print JSON Lines (status, warning, retention, edit; last: summary)."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def force_option(command: Command) -> Command:
    """`--force` of an edit: commit although a check failed."""
    text = "Commit even if a check fails, and say what the edit broke."
    return click.option("--force", is_flag=True, help=text)(command)


def note(settings: Settings, text: str) -> None:
    """A remark for a person on stderr; nothing with -q."""
    if not settings.quiet:
        click.echo(text, err=True)


def next_step(settings: Settings, *words: str) -> None:
    """Suggest the command that usually comes next."""
    note(settings, f"{click.style('next:', fg='cyan')} {settings.command(*words)}")


def description_of(file: str | None, text: str | None) -> str:
    """The description given as FILE ('-' = stdin) or --text; exactly one of them."""
    if (file is None) == (text is None):
        given = "both were" if file is not None else "neither was"
        raise click.UsageError(
            "give the description once: a FILE (- for standard input) or --text TEXT; "
            f"{given} given"
        )
    from kvedit.facts.readers import read_description

    return read_description(file, text=text)


@contextmanager
def read_only(settings: Settings) -> Iterator[Store]:
    """The store, for commands that only read it; never imports torch."""
    from kvedit.store.store import Store, resolve_store

    with Store.open(resolve_store(settings.store), readonly=True) as store:
        yield store


def require_keys(settings: Settings, keys: Sequence[str]) -> None:
    """Fail on an unknown key (or store) now, not after loading the model."""
    with read_only(settings) as store:
        for key in keys:
            store.require(key)


@contextmanager
def knowledge_base(
    settings: Settings, reporter: Reporter, *, create: bool = False
) -> Iterator[KnowledgeBase]:
    """The opened knowledge base; with `create`, a missing store is made, with a message."""
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    missing = not Store.exists(path)
    if missing and not create:
        Store.open(path, readonly=True)  # raises, and says how to make a store
    with reporter:
        if missing:
            reporter.say(f"no store at {path} yet: creating one with the embedded model")
        from kvedit.editing.knowledge_base import KnowledgeBase

        make = KnowledgeBase.create if missing else KnowledgeBase.open
        with make(path, on_event=reporter) as base:
            yield base


def show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Callback of `--version`."""
    if value and not ctx.resilient_parsing:
        click.echo(f"kvedit {__version__}")
        ctx.exit()
