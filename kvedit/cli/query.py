"""Commands that only look: ask and chat (the model), list, show, similar, history, status, report.

Invariant: but for `ask` and `chat`, nothing here imports torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvedit.cli.common import (
    Settings,
    json_option,
    knowledge_base,
    next_step,
    note,
    read_only,
)

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase

CHAT_HELP = "/new starts over, /exit or Ctrl-D ends the chat"


@click.command()
@click.argument("prompt")
@click.option("--at", type=click.IntRange(min=0), metavar="REV", help="Ask the model of REV.")
@click.option("--before", is_flag=True, help="Show the base model's answer beside it.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Where a longer answer is cut.",
)
@json_option
@click.pass_obj
def ask(
    settings: Settings,
    prompt: str,
    at: int | None,
    before: bool,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Ask the model something and print its answer.

    PROMPT is the question, or '-' for standard input.

    \b
    Examples:
      kvedit ask "夢中情爐是什麼?"
      kvedit ask "Who was Ada Lovelace?" --before
      kvedit ask "What is Porto?" --at 2
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.progress import make_reporter
    from kvedit.cli.tables import answer_lines

    question = _prompt_text(prompt)
    with knowledge_base(settings, make_reporter(quiet=settings.quiet or as_json)) as base:
        answers = {
            "prompt": question,
            "revision": base.store.head() if at is None else at,
            "answer": base.ask(question, at=at, max_new_tokens=max_new_tokens),
            "before": base.ask_base(question) if before else None,
        }
    if as_json:
        print_json(answers)
    else:
        print_lines(answer_lines(answers))


def _prompt_text(prompt: str) -> str:
    """The prompt itself, or standard input for '-'; an empty one is a usage error."""
    if prompt == "-":
        from kvedit.files import read_text

        prompt = read_text("-")
    if not prompt.strip():
        raise click.UsageError('the prompt is empty: ask something, e.g. kvedit ask "What is X?"')
    return prompt.strip()


@click.command()
@json_option
@click.pass_obj
def chat(settings: Settings, as_json: bool) -> None:
    """Talk with the model, line by line.

    It sees the whole conversation: /new starts over, /exit or Ctrl-D ends the chat. With --json the
    conversation is printed at the end as one document.

    \b
    Examples:
      kvedit chat
      kvedit chat --json < questions.txt
    """
    from kvedit.cli.output import print_json
    from kvedit.cli.progress import make_reporter

    reporter = make_reporter(quiet=settings.quiet or as_json)
    with knowledge_base(settings, reporter) as base:
        reporter.stop()  # the terminal belongs to the user now
        revision = base.store.head()
        note(settings, f"revision {revision}; {CHAT_HELP}")
        messages = _converse(base, silent=as_json)
    if as_json:
        print_json({"revision": revision, "messages": messages})


def _converse(base: KnowledgeBase, *, silent: bool) -> list[dict[str, str]]:
    """Answer questions until the input ends; returns the conversation."""
    messages: list[dict[str, str]] = []
    for question in _questions():
        if question == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": question})
        answer = base.chat(messages)
        messages.append({"role": "assistant", "content": answer})
        if not silent:
            click.echo(answer)
    return messages


def _questions() -> Iterator[str]:
    """What the user types, line by line, until /exit or the end of the input."""
    read = _typed_line if sys.stdin.isatty() else _piped_line
    while line := read():
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _piped_line() -> str:
    """A line of standard input, which must be UTF-8 whatever the locale; '' at its end."""
    from kvedit.files import decode

    return decode(sys.stdin.buffer.readline(), "standard input")


def _typed_line() -> str:
    """A line typed at a prompt that can be edited; '' at Ctrl-D."""
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() arrow keys and a history
    try:
        return input("> ") + "\n"
    except EOFError:
        return ""


@click.command("list")
@click.option(
    "--state",
    type=click.Choice(["committed", "pending", "rejected", "removed", "all"]),
    default="committed",
    show_default=True,
    help="Which facts.",
)
@json_option
@click.pass_obj
def list_facts(settings: Settings, state: str, as_json: bool) -> None:
    """List the facts and how they are doing.

    \b
    Health:
      recalled   it was recalled when last checked
      regressed  it was not
      stale      its last check is many revisions ago
      unchecked  it was never checked since it was committed

    \b
    Examples:
      kvedit list
      kvedit list --state all --json
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.tables import facts_table

    with read_only(settings) as store:
        rows = store.facts(None if state == "all" else state)
    if as_json:
        print_json([row.to_json() for row in rows])
    elif rows:
        print_lines(facts_table(rows))
    else:
        note(settings, "no facts" if state == "all" else f"no {state} facts")
        next_step(settings, "add", "KEY", "FILE")


@click.command()
@click.argument("key")
@json_option
@click.pass_obj
def show(settings: Settings, key: str, as_json: bool) -> None:
    """Show one fact: text, health, edits and last checks.

    KEY may also be an alias.

    \b
    Examples:
      kvedit show 夢中情爐
      kvedit show Porto --json
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.tables import fact_document, fact_lines

    with read_only(settings) as store:
        row = store.require(key)
        edits = store.history(row.fact.key)
        results = store.results(row.id, 20)
    if as_json:
        print_json(fact_document(row, edits, results))
    else:
        print_lines(fact_lines(row, edits, results))


@click.command()
@click.argument("text")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 100),
    default=85.0,
    show_default=True,
    help="Least similarity, 0 to 100.",
)
@click.option("--limit", type=click.IntRange(min=1), default=5, show_default=True)
@json_option
@click.pass_obj
def similar(settings: Settings, text: str, threshold: float, limit: int, as_json: bool) -> None:
    """List the keys that resemble TEXT.

    The most similar comes first. Case, spaces, punctuation, and Simplified and Traditional forms do
    not count as differences.

    \b
    Examples:
      kvedit similar 梦中情炉
      kvedit similar "ada lovelase" --threshold 70
    """
    from kvedit.cli.output import print_json, print_lines, table
    from kvedit.facts.keys import similar as find_similar

    with read_only(settings) as store:
        found = find_similar(text, store.keys(), threshold=threshold, limit=limit)
    if as_json:
        print_json([{"key": one.key, "score": one.score} for one in found])
    elif found:
        print_lines(table(("score", "key"), [(f"{one.score:.0f}", one.key) for one in found]))
    else:
        note(settings, f"no key resembles this at {threshold:g} or more; try a lower --threshold")


@click.command()
@click.argument("key", required=False)
@click.option("--limit", type=click.IntRange(min=1), help="Only the latest so many edits.")
@json_option
@click.pass_obj
def history(settings: Settings, key: str | None, limit: int | None, as_json: bool) -> None:
    """List the edits, all or those of KEY.

    The latest comes first. Refused, failed and interrupted edits are listed too, with their
    reasons.

    \b
    Examples:
      kvedit history
      kvedit history 夢中情爐 --limit 5
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.tables import edits_table

    with read_only(settings) as store:
        if key is not None:
            key = store.require(key).fact.key
        edits = store.history(key)[:limit]
    if as_json:
        print_json([edit.to_json() for edit in edits])
    elif edits:
        print_lines(edits_table(edits))
    else:
        note(settings, "no edits yet")


@click.command()
@json_option
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Show where the store stands.

    Model, revision, facts and their health, and sizes on disk.

    \b
    Examples:
      kvedit status
      kvedit --store poems status --json
    """
    from kvedit.cli.output import print_json, print_lines
    from kvedit.cli.tables import status_lines

    with read_only(settings) as store:
        fields = store.status()
    if as_json:
        print_json(fields)
    else:
        print_lines(status_lines(fields))


@click.command()
@click.option(
    "-o", "--output", "file", type=click.Path(dir_okay=False, path_type=Path),
    default=Path("kvedit-report.html"), show_default=True, help="Where to write the page.",
)  # fmt: skip
@json_option
@click.pass_obj
def report(settings: Settings, file: Path, as_json: bool) -> None:
    """Write one offline HTML page about the store.

    What it holds and how well, which facts to look at first, what was refused and why, the edits,
    and pictures of how it grew. Nothing is measured; run verify before it for fresh figures.

    \b
    Examples:
      kvedit report
      kvedit --store poems report -o poems.html
    """
    from kvedit.cli.output import print_json, size_text
    from kvedit.store import html_report

    with read_only(settings) as store:
        html_report.write(store, file)
        head = store.head()
    size = file.stat().st_size
    if as_json:
        print_json({"path": str(file), "revision": head, "bytes": size})
    else:
        click.echo(f"wrote {file}: revision {head}, {size_text(size)}")
