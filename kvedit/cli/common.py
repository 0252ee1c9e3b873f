"""What every command shares: settings, the error border, options, and how stores are opened.

Invariants: nothing here imports torch, rich or sqlite-utils at import time; a missing store or an
unknown key is reported before the model is loaded; every error becomes its exit code in one place
(`KveditGroup.invoke`), with a traceback only at -vv.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kvedit import mapped
from kvedit.cli import endings, environment, streams
from kvedit.cli.output import clean, print_json_line, printed_json
from kvedit.errors import KveditError

if TYPE_CHECKING:
    from kvedit.cli.progress import Reporter
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.store.store import Store

EXIT_INTERRUPTED = 130
_HALF_MADE = "kvedit.half_made"
LOG_LEVELS = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
json_lines_option = click.option(
    "--json", "as_json", is_flag=True,
    help="Print JSON Lines (status, warning, retention, edit; last: summary).",
)  # fmt: skip
force_option = click.option(
    "--force", is_flag=True, help="Commit even if a check fails, and say what the edit broke."
)


_SUGGESTED = re.compile(r"(?<=`)kvedit(?= [a-z]+)|(?<=: )kvedit(?= [a-z]+)|(?<=Run )kvedit(?= )")
"""Where the hint of an error names a command line."""


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
        """Whether only answers, results and errors are printed."""
        return self.verbosity < 0

    def command(self, *words: str) -> str:
        """A kvedit command line to suggest, for the same store, quoted for a shell."""
        store = ("--store", self.store) if self.store else ()
        return shlex.join(("kvedit", *store, *words))

    def for_store(self, hint: str) -> str:
        """A hint, with --store in the command lines that it suggests for this one."""
        return _SUGGESTED.sub(lambda _: self.command(), hint)


class KveditGroup(click.Group):
    """The command group; its `invoke` is the one place where errors become exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into a message on stderr and an exit code.

        With --json a program that reads stdout gets the error too, as one line, unless the command
        has printed its document.
        """
        as_json = "--json" in [*ctx._protected_args, *ctx.args]
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, BrokenPipeError):
            raise
        except click.ClickException as error:
            vars(error)["message"] = clean(error.message)  # click declares it final
            print_error_line(as_json, error.format_message(), "", error.exit_code)
            raise
        except (Exception, KeyboardInterrupt) as error:
            settings = ctx.obj if isinstance(ctx.obj, Settings) else Settings()
            if settings.verbosity >= 2:
                click.echo(clean(traceback.format_exc().rstrip()), err=True)
            message, hint, code = explain_error(error, settings)
            ending = endings.Ending.of(ctx)
            alone = ending is not None and ending.kind == endings.ONE_DOCUMENT
            fields = ending.fields() if ending and alone else {}
            print_error_line(as_json, message, hint, code, **fields)
            fail(message, hint)
            if ending is not None and not streams.broken_output():
                ending.tell(as_json=as_json, code=code)
            ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order they were added: the order in which they are needed."""
        return list(self.commands)


def print_error_line(as_json: bool, message: str, hint: str, code: int, **more: object) -> None:
    """An error as a JSON line on stdout."""
    if as_json and not printed_json() and not streams.broken_output():
        fields = {"message": message, "hint": hint, "exit_code": code, **more}
        print_json_line({"message_type": "error", **fields})


def explain_error(error: BaseException, settings: Settings) -> tuple[str, str, int]:
    """Message, hint and exit code of an error."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        hint = f"run `{settings.command('status')}` to see the state of the store"
        return "interrupted", hint, EXIT_INTERRUPTED
    if isinstance(error, KveditError):
        return error.message, settings.for_store(error.hint), error.exit_code
    if isinstance(error, OSError):
        if not error.filename and (why := streams.broken_output()):
            return f"cannot write to standard output: {why}", "", 1
        reason = error.strerror or str(error) or type(error).__name__
        hint = "check the disk, and that you may read and write there"
        return f"{error.filename}: {reason}" if error.filename else reason, hint, 1
    if failed := mapped.failure("a file", error):
        return failed.message, failed.hint, failed.exit_code
    if isinstance(error, Exception) and (setting := environment.misread(error)):
        message = f"{setting} in the environment is not understood: {error}"
        return message, "Unset it, or set it as the library that reads it wants it.", 2
    advice = "run it again as `kvedit -vv ...` for the traceback"
    if settings.verbosity >= 2:
        advice = "please report it with the lines above"
    message = f"unexpected {type(error).__name__}: {error}"
    return message, f"this is a bug in kvedit; {advice}", 1


def fail(message: str, hint: str) -> None:
    """An error on stderr, and what to do next."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {clean(message)}", err=True)
    for line in hint.splitlines():
        click.echo(f"{click.style('hint:', fg='yellow')} {clean(line)}", err=True)


class _CleanFormatter(logging.Formatter):
    """Log lines that cannot steer the terminal, whatever they quote."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with control characters escaped."""
        return clean(super().format(record))


def configure_logging(verbosity: int) -> None:
    """Send log lines to stderr; below -vv without those of the libraries."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_CleanFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("kvedit").setLevel(LOG_LEVELS[verbosity])
    if verbosity < 2:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def note(settings: Settings, text: str) -> None:
    """A remark for a person on stderr; nothing with -q."""
    if not settings.quiet:
        click.echo(clean(text), err=True)


def next_step(settings: Settings, *words: str) -> None:
    """Suggest the command that usually comes next."""
    if not settings.quiet:
        command = clean(settings.command(*words))
        click.echo(f"{click.style('next:', fg='cyan')} {command}", err=True)


@contextmanager
def read_only(settings: Settings) -> Iterator[Store]:
    """The store, for commands that only read it; never imports torch."""
    from kvedit.store.store import Store, resolve_store

    with Store.open(resolve_store(settings.store), readonly=True) as store:
        _say_half_made(settings, store)
        yield store


def _say_half_made(settings: Settings, store: Store) -> None:
    """Say, once a command, that the making of the store was interrupted."""
    from kvedit.store.integrity import is_half_made

    context = click.get_current_context(silent=True)
    said = {} if context is None else context.find_root().meta
    if is_half_made(store) and not said.get(_HALF_MADE):
        said[_HALF_MADE] = True
        command = settings.command("init")
        note(settings, f"the store {store.path} is half made: `{command}` was interrupted; run it"
             " again, with the same options, and it goes on")  # fmt: skip


def watched_changes(settings: Settings, kind: str) -> AbstractContextManager[None]:
    """An error that leaves the block ends the command with what was changed in it."""
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    return endings.watched(lambda: Store.open(path, readonly=True), kind)


def require_keys(settings: Settings, keys: Sequence[str]) -> None:
    """Fail on an unknown key (or store) now, not after loading the model."""
    with read_only(settings) as store:
        for key in keys:
            store.require(key)


def kept_revision(
    context: click.Context, parameter: click.Parameter, value: int | None
) -> int | None:
    """Callback of a revision: fail on one whose weights are not there before a model is loaded."""
    if value is not None and isinstance(context.obj, Settings):
        with read_only(context.obj) as store:
            store.require_kept(value)
    return value


def require_writable(settings: Settings) -> None:
    """Fail on a store that cannot be written now, not after loading the model; a missing one is
    left to whoever makes it.
    """
    from kvedit.store.store import Store, resolve_store

    path = resolve_store(settings.store)
    if Store.exists(path):
        with Store.open(path) as store, store.lock():
            pass


@contextmanager
def knowledge_base(settings: Settings, reporter: Reporter, *,
                   create: bool = False) -> Iterator[KnowledgeBase]:  # fmt: skip
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
        from kvedit.model.devices import choose_threads

        choose_threads()
        if not missing:
            with read_only(settings):  # says so if the store is half made
                pass
        make = KnowledgeBase.create if missing else KnowledgeBase.open
        with make(path, on_event=reporter) as base:
            yield base
