"""docs/cli.md, made from the help of the commands: `python -m tests.docs.cli_page docs/cli.md`.

Invariant: the page depends on the commands alone, not on the terminal or the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from kvedit.cli import cli

WIDTH = 80
INTRODUCTION = """\
# Command line

This page is made from the commands' own help by `make docs`; a test fails when it is out of date.

Answers go to standard output; progress, warnings, hints and errors go to standard error. Every
query takes `--json` and prints one document. `add`, `ingest`, `update`, `remove`, `rollback` and
`verify` with `--json` print JSON Lines: objects with a `message_type` of `status`, `warning`,
`retention`, `edit` or (`ingest`) `progress`, and as the last line a `summary`. Later versions may
add fields but do not rename any.

The store is the folder given by `--store`, else by the environment variable `KVEDIT_STORE`, else
`./store`.
"""


def help_text(command: click.Command, *path: str) -> str:
    """The help of one command as `kvedit ... --help` prints it on a terminal of fixed width."""
    context: click.Context | None = None
    for name in path[:-1]:
        context = _context(cli, name, context)
    return command.get_help(_context(command, path[-1], context)).strip()


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        help_option_names=["-h", "--help"],
        color=False,
    )


def sections() -> Iterator[str]:
    """The parts of the page, in the order of the commands."""
    yield INTRODUCTION
    yield _section("kvedit", help_text(cli, "kvedit"))
    for name, command in cli.commands.items():
        yield _section(f"kvedit {name}", help_text(command, "kvedit", name))
        inner = command.commands if isinstance(command, click.Group) else {}
        for part, one in inner.items():
            yield _section(f"kvedit {name} {part}", help_text(one, "kvedit", name, part))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{click.unstyle(text)}\n```\n"


def page() -> str:
    """The whole page."""
    return "\n".join(sections())


@click.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
def main(file: Path | None) -> None:
    """Print docs/cli.md, or write it to FILE."""
    if file is None:
        click.echo(page(), nl=False)
        return
    from kvedit.files import write_atomic

    write_atomic(file, page().encode())


if __name__ == "__main__":
    main()
