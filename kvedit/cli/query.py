"""Commands that read: ask and chat (the model), list, show, similar, history, status, report.

Invariant: but for `ask` and `chat`, nothing here imports torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvedit.cli import common
from kvedit.cli.common import COUNT, FILE, Settings, json_option, note, read_only
from kvedit.cli.output import clean, pairs, print_json, print_result, size_text, styled, table
from kvedit.cli.progress import make_reporter
from kvedit.cli.tables import edits_table, fact_document, fact_parts, facts_table, status_table

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase

CHAT_HELP = "/new starts a new conversation, Ctrl-C ends an answer, /exit or Ctrl-D the chat"


@click.command()
@click.argument("prompt")
@click.option("--at", type=click.IntRange(min=0), metavar="REV", help="Ask the model of REV.")
@click.option("--compare-base", is_flag=True, help="Show the base model's answer as well.")
@click.option("--max-new-tokens", type=COUNT, default=256, show_default=True, metavar="N",
              help="Stop the answer after N tokens.")  # fmt: skip
@json_option
@click.pass_obj
def ask(settings: Settings, prompt: str, at: int | None, compare_base: bool, max_new_tokens: int,
        as_json: bool) -> None:  # fmt: skip
    """Ask the model a question and print its answer.

    PROMPT is the question, or '-' for standard input.

    \b
    Examples:
      kvedit ask "夢中情爐是什麼?"
      kvedit ask "Who was Ada Lovelace?" --compare-base
      kvedit ask "What is Porto?" --at 2
    """
    question = _question(prompt)
    streams = at is None and not (compare_base or as_json) and _on_terminal()
    reporter = make_reporter(quiet=settings.quiet or as_json)
    with common.knowledge_base(settings, reporter) as base:
        if streams:
            reporter.stop()
            _stream(base, [{"role": "user", "content": question}], limit=max_new_tokens)
            return
        revision = base.store.head() if at is None else at
        answer = base.ask(question, at=at, max_new_tokens=max_new_tokens)
        limit = max_new_tokens
        base_answer = base.ask_base(question, max_new_tokens=limit) if compare_base else None
    if base_answer is None and not as_json:
        click.echo(clean(answer))
        return
    document = {"prompt": question, "revision": revision, "answer": answer}
    at_head = (styled(f"revision {revision}", "green"), answer)
    rows = [(styled("base model", "yellow"), base_answer), at_head]
    print_result(as_json, {**document, "base_answer": base_answer}, pairs(rows))


def _question(prompt: str) -> str:
    """The prompt, or what standard input has for '-'; raises UsageError for an empty one."""
    if prompt == "-":
        from kvedit.files import read_text

        prompt = read_text("-")
    if not (question := prompt.strip()):
        raise click.UsageError('the prompt is empty: ask something, e.g. kvedit ask "What is X?"')
    return question


@click.command()
@json_option
@click.pass_obj
def chat(settings: Settings, as_json: bool) -> None:
    """Chat with the model, line by line.

    The model sees the whole conversation. Answers appear as they are generated; Ctrl-C ends one
    early. /new starts a new conversation, /exit or Ctrl-D ends the chat. With --json the
    conversation is printed at the end as one document.

    \b
    Examples:
      kvedit chat
      kvedit chat --json < questions.txt
    """
    reporter = make_reporter(quiet=settings.quiet or as_json)
    with common.knowledge_base(settings, reporter) as base:
        reporter.stop()  # the terminal belongs to the user now
        revision = base.store.head()
        note(settings, f"revision {revision}; {CHAT_HELP}")
        messages = _converse(base, silent=as_json)
    if as_json:
        print_json({"revision": revision, "messages": messages})


def _converse(base: KnowledgeBase, *, silent: bool) -> list[dict[str, str]]:
    """Answer questions until the input ends; returns the conversation."""
    messages: list[dict[str, str]] = []
    read = _typed_line if sys.stdin.isatty() else _piped_line
    for question in map(str.strip, iter(read, "")):
        if question == "/exit":
            break
        if question == "/new":
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            answer = base.chat(messages) if silent else _stream(base, messages)
            messages.append({"role": "assistant", "content": answer})
    return messages


def _on_terminal() -> bool:
    return sys.stdout.isatty()


def _stream(base: KnowledgeBase, messages: Sequence[Mapping[str, str]], *, limit: int = 256) -> str:
    """Print the answer as it is generated; Ctrl-C ends it there, and not the chat."""
    answer = ""
    with suppress(KeyboardInterrupt):
        for piece in base.stream(messages, limit=limit):
            answer += piece
            click.echo(clean(piece), nl=False)
    click.echo()
    return answer


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
@click.option("--state", type=click.Choice(["committed", "pending", "rejected", "removed", "all"]),
              default="committed", show_default=True, help="Which facts.")  # fmt: skip
@json_option
@click.pass_obj
def list_facts(settings: Settings, state: str, as_json: bool) -> None:
    """List the facts and whether they are still recalled.

    \b
    Health:
      recalled   recalled at the last check
      regressed  not recalled at the last check
      stale      the last check was many revisions ago
      unchecked  not checked since it was committed

    \b
    Examples:
      kvedit list
      kvedit list --state all --json
    """
    with read_only(settings) as store:
        rows = store.facts(None if state == "all" else state)
    if rows or as_json:
        print_result(as_json, [row.to_json() for row in rows], facts_table(rows))
    else:
        note(settings, "no facts" if state == "all" else f"no {state} facts")
        common.next_step(settings, "add", "KEY", "FILE")


@click.command()
@click.argument("key")
@json_option
@click.pass_obj
def show(settings: Settings, key: str, as_json: bool) -> None:
    """Show one fact: description, health, edits and the latest checks.

    KEY may also be an alias.

    \b
    Examples:
      kvedit show 夢中情爐
      kvedit show Porto --json
    """
    with read_only(settings) as store:
        row = store.require(key)
        edits = store.history(row.fact.key)
        results = store.results(row.id, 20)
    document = fact_document(row, edits, results)
    print_result(as_json, document, *fact_parts(row, edits, results))


@click.command()
@click.argument("text")
@click.option("--threshold", type=click.FloatRange(0, 100), default=85.0, show_default=True,
              help="Lowest similarity to list.")  # fmt: skip
@click.option("--limit", type=COUNT, default=5, show_default=True, help="At most N keys.",
              metavar="N")  # fmt: skip
@json_option
@click.pass_obj
def similar(settings: Settings, text: str, threshold: float, limit: int, as_json: bool) -> None:
    """List the keys that are similar to TEXT.

    The most similar key comes first; a score of 100 means the same. Case, spaces, punctuation, and
    the difference between Simplified and Traditional characters are ignored.

    \b
    Examples:
      kvedit similar 梦中情炉
      kvedit similar "ada lovelase" --threshold 70
    """
    from kvedit.facts.keys import similar as find_similar

    with read_only(settings) as store:
        matches = find_similar(text, store.keys(), threshold=threshold, limit=limit)
    if matches or as_json:
        document = [{"key": one.key, "score": one.score} for one in matches]
        rows = [(f"{one.score:.0f}", one.key) for one in matches]
        print_result(as_json, document, table(("score", "key"), rows))
    else:
        note(settings, f"no key has a similarity of {threshold:g}; try a lower --threshold")


@click.command()
@click.argument("key", required=False)
@click.option("--limit", type=COUNT, metavar="N", help="The latest N edits only.")
@json_option
@click.pass_obj
def history(settings: Settings, key: str | None, limit: int | None, as_json: bool) -> None:
    """List all edits, or those of one fact.

    The latest edit comes first. Rejected, failed and interrupted edits are listed too, with their
    reasons.

    \b
    Examples:
      kvedit history
      kvedit history 夢中情爐 --limit 5
    """
    with read_only(settings) as store:
        if key is not None:
            key = store.require(key).fact.key
        edits = store.history(key)[:limit]
    if edits or as_json:
        print_result(as_json, [edit.to_json() for edit in edits], edits_table(edits))
    else:
        note(settings, "no edits yet")


@click.command()
@json_option
@click.pass_obj
def status(settings: Settings, as_json: bool) -> None:
    """Show the state of the store.

    Model, revision, facts and their health, how far the weights are from the base model, and sizes
    on disk.

    \b
    Examples:
      kvedit status
      kvedit --store poems status --json
    """
    with read_only(settings) as store:
        fields = store.status()
    print_result(as_json, fields, status_table(fields))


@click.command()
@click.option(
    "-o", "--output", "file", type=FILE,
    default=Path("kvedit-report.html"), show_default=True, help="Where to write the page.",
)  # fmt: skip
@json_option
@click.pass_obj
def report(settings: Settings, file: Path, as_json: bool) -> None:
    """Write one HTML page about the store, which needs no network.

    It shows the facts and how well they are recalled, which of them need attention, what was
    rejected and why, the edits, and plots over time. Nothing is measured for it: run `verify` first
    for current figures.

    \b
    Examples:
      kvedit report
      kvedit --store poems report -o poems.html
    """
    from kvedit.store import html_report

    with read_only(settings) as store:
        html_report.write(store, file)
        head = store.head()
    size = file.stat().st_size
    document = {"path": str(file), "revision": head, "bytes": size}
    print_result(as_json, document, f"wrote {file}: revision {head}, {size_text(size)}")
