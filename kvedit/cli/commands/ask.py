"""Commands that ask the model: ask and chat."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from kvedit.cli import common
from kvedit.cli.common import Settings, json_option, note
from kvedit.cli.output import clean, pairs, print_json, print_result, styled
from kvedit.cli.parameters import COUNT, REVISION
from kvedit.cli.progress import make_reporter

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase

CHAT_HELP = "/new starts a new conversation, Ctrl-C ends an answer, /exit or Ctrl-D the chat"


@click.command()
@click.argument("prompt")
@click.option("--at", type=REVISION, metavar="REV", help="Ask the model of REV.")
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
