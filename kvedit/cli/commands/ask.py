"""Commands that ask the model: ask, chat, explain, diff."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import common
from kvedit.cli.common import Settings, json_option, note, read_only
from kvedit.cli.output import clean, pairs, print_json, print_result, styled
from kvedit.cli.parameters import COUNT, REVISION
from kvedit.cli.progress import make_reporter
from kvedit.cli.tables.answers import diff_parts, explanation_parts, source_lines
from kvedit.errors import TextTooLongError

if TYPE_CHECKING:
    from kvedit.asking.questions import Answer
    from kvedit.asking.recall import Recalled, Source
    from kvedit.editing.knowledge_base import KnowledgeBase

CHAT_HELP = "/new starts a new conversation, Ctrl-C ends an answer, /exit or Ctrl-D the chat"


def recall_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that recall; the function gets them as ``recall`` and ``show``."""

    @wraps(function)
    def call(
        *args: Any, recall: bool, recall_from: str | None, show_recall: bool, **more: Any
    ) -> None:
        function(*args, recall=recall_from or recall or show_recall, show=show_recall, **more)

    options = (
        click.option("--recall", is_flag=True, help="Put the texts of the facts that a question"
                     " names before it."),
        click.option("--recall-from", type=click.Choice(["model", "store"]), help="The same, with"
                     " the model's own recitation or the store's text. [[recall] source]"),
        click.option("--show-recall", is_flag=True, help="The same, and say on stderr which facts"
                     " the answer stood on."),
    )  # fmt: skip
    for option in reversed(options):
        call = option(call)
    return call


@click.command()
@click.argument("prompt")
@click.option("--at", type=REVISION, metavar="REV", callback=common.kept_revision,
              help="Ask the model of REV.")  # fmt: skip
@click.option("--compare-base", is_flag=True, help="Show the base model's answer as well.")
@recall_options
@click.option("--max-new-tokens", type=COUNT, default=256, show_default=True, metavar="N",
              help="Stop the answer after N tokens.")  # fmt: skip
@json_option
@click.pass_obj
def ask(settings: Settings, prompt: str, at: int | None, compare_base: bool, recall: bool | str,
        show: bool, max_new_tokens: int, as_json: bool) -> None:  # fmt: skip
    """Ask the model a question and print its answer.

    PROMPT is the question, or '-' for standard input.

    \b
    Examples:
      kvedit ask "夢中情爐是什麼?"
      kvedit ask "Who was Ada Lovelace?" --compare-base
      kvedit ask "What is Porto?" --at 2
      kvedit ask "Which river flows through Porto?" --recall
    """
    question, limit = _question(prompt), max_new_tokens
    messages = [{"role": "user", "content": question}]
    streams = at is None and not (compare_base or as_json) and _on_terminal()
    reporter = make_reporter(quiet=settings.quiet or as_json)
    with common.knowledge_base(settings, reporter) as base:
        if streams:
            reporter.stop()
            _stream(base, _recalled(base, messages, recall, show), limit=limit)
            return
        answer = base.answer(messages, at=at, max_new_tokens=limit, recall=recall)
        base_answer = base.ask_base(question, max_new_tokens=limit) if compare_base else None
    if show and not as_json:
        _say_sources(answer)
    if base_answer is None and not as_json:
        click.echo(clean(answer.text))
        return
    at_head = (styled(f"revision {answer.revision}", "green"), answer.text)
    document = _answer_document(question, answer, base_answer, recall)
    print_result(as_json, document, pairs([(styled("base model", "yellow"), base_answer), at_head]))


def _answer_document(
    question: str, answer: Answer, base_answer: str | None, recall: bool | str
) -> dict[str, object]:
    document = {
        "prompt": question, "revision": answer.revision, "answer": answer.text, "cut": answer.cut,
    }  # fmt: skip
    sources = {"sources": [one.to_json() for one in answer.sources]} if recall else {}
    return {**document, "base_answer": base_answer, **sources}


def _question(prompt: str) -> str:
    """The prompt, or what standard input has for '-'; raises UsageError for an empty one."""
    if prompt == "-":
        from kvedit.files import read_text

        prompt = read_text("-")
    if not (question := prompt.strip()):
        raise click.UsageError('the prompt is empty: ask something, e.g. kvedit ask "What is X?"')
    return question


@click.command()
@recall_options
@json_option
@click.pass_obj
def chat(settings: Settings, recall: bool | str, show: bool, as_json: bool) -> None:
    """Chat with the model, line by line.

    The model sees the whole conversation. Answers appear as they are generated; Ctrl-C ends one
    early. /new starts a new conversation, /exit or Ctrl-D ends the chat. With --json the
    conversation is printed at the end as one document.

    \b
    Examples:
      kvedit chat
      kvedit chat --recall
      kvedit chat --json < questions.txt
    """
    reporter = make_reporter(quiet=settings.quiet or as_json)
    with common.knowledge_base(settings, reporter) as base:
        reporter.stop()  # the terminal belongs to the user now
        revision = base.store.head()
        note(settings, f"revision {revision}; {CHAT_HELP}")
        talk = _Conversation(base, recall=recall, show=show, silent=as_json)
        talk.run()
    if as_json:
        document = {"revision": revision, "messages": talk.messages}
        sources = {"sources": [one.to_json() for one in talk.sources]} if recall else {}
        print_json({**document, **sources})


class _Conversation:
    """Questions, answered until the input ends."""

    def __init__(self, base: KnowledgeBase, *, recall: bool | str, show: bool,
                 silent: bool) -> None:  # fmt: skip
        self._base, self._recall, self._show, self._silent = base, recall, show, silent
        self.messages: list[dict[str, str]] = []
        self.sources: tuple[Source, ...] = ()

    def run(self) -> None:
        """Read questions and answer them."""
        read = _typed_line if sys.stdin.isatty() else _piped_line
        for question in map(str.strip, iter(read, "")):
            if question == "/exit":
                break
            if question == "/new":
                self.messages = []
            elif question:
                self.messages.append({"role": "user", "content": question})
                self._answer_last()

    def _answer_last(self) -> None:
        """Answer the last message; at a terminal one that is too long is not the chat's end."""
        try:
            self.messages.append({"role": "assistant", "content": self._answer()})
        except TextTooLongError as error:
            if not sys.stdin.isatty():
                raise
            self.messages.pop()
            common.fail(error.message, f"{error.hint} {CHAT_HELP}")

    def _answer(self) -> str:
        if self._silent:
            answer = self._base.answer(self.messages, recall=self._recall)
            self.sources = answer.sources
            return answer.text
        found = _recalled(self._base, self.messages, self._recall, self._show)
        return _stream(self._base, found)


def _recalled(base: KnowledgeBase, messages: Sequence[Mapping[str, str]], recall: bool | str,
              show: bool) -> Sequence[Mapping[str, str]]:  # fmt: skip
    """The messages with what they recall, which is said with ``show``."""
    if not recall:
        return messages
    found = base.recall(messages, source=recall)
    if show:
        _say_sources(found)
    return found.messages


def _say_sources(found: Answer | Recalled) -> None:
    for line in source_lines(found):
        click.echo(line, err=True)


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


@click.command()
@click.argument("question")
@click.option("--at", type=REVISION, metavar="REV", help="Explain the answer of REV. [the head]")
@click.option("--limit", type=COUNT, default=5, show_default=True, metavar="N",
              help="List at most N facts.")  # fmt: skip
@click.option("--max-new-tokens", type=COUNT, default=96, show_default=True, metavar="N",
              help="Compare the first N tokens of answers.")  # fmt: skip
@json_option
@click.pass_obj
def explain(settings: Settings, question: str, at: int | None, limit: int, max_new_tokens: int,
            as_json: bool) -> None:  # fmt: skip
    """Why does the model say that? Find the edit that changed an answer, and the facts near it.

    Revisions are rebuilt and asked, about as many as the logarithm of their number to base 2.

    \b
    Examples:
      kvedit explain "Who was Ada Lovelace?"
      kvedit explain "What is Porto?" --at 2 --json
    """
    asked = _question(question)
    with common.knowledge_base(settings, make_reporter(quiet=settings.quiet or as_json)) as base:
        found = base.explain(asked, at=at, limit=limit, max_new_tokens=max_new_tokens)
    print_result(as_json, found.to_json(), *explanation_parts(found))


@click.command()
@click.argument("before", type=REVISION, metavar="REV")
@click.argument("after", type=REVISION, metavar="REV")
@click.option("--ask", "asked", type=click.IntRange(min=0), default=32, show_default=True,
              metavar="N", help="Ask about at most N facts at both revisions, those that changed"
              " first; 0 loads no model.")  # fmt: skip
@json_option
@click.pass_obj
def diff(settings: Settings, before: int, after: int, asked: int, as_json: bool) -> None:
    """Which facts, and which answers about them, differ between two revisions.

    A fact that no edit changed is listed if the model answers otherwise about it.

    \b
    Examples:
      kvedit diff 3 7
      kvedit diff 0 12 --ask 0 --json
    """
    from kvedit.asking.diff import RevisionDiff, changed_facts

    if asked:
        reporter = make_reporter(quiet=settings.quiet or as_json)
        with common.knowledge_base(settings, reporter) as base:
            found = base.diff(before, after, ask=asked)
    else:
        with read_only(settings) as store:
            found = RevisionDiff(
                before=before, after=after, facts=tuple(changed_facts(store, before, after))
            )
    print_result(as_json, found.to_json(), *diff_parts(found))
