"""Commands that change what the model knows: add, update, study, remove, rollback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import common
from kvedit.cli.common import Settings, force_option, json_lines_option, next_step, note
from kvedit.cli.output import edit_parts, print_json_line, print_parts
from kvedit.cli.parameters import FILE, REVISION, SOURCE
from kvedit.cli.progress import make_reporter

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.events import EditReport
    from kvedit.facts.fact import Question

EXIT_CODES = {"committed": 0, "unchanged": 0, "rejected": 3, "failed": 3, "canceled": 130}


def run_edit(settings: Settings, as_json: bool, edit: Callable[[KnowledgeBase], EditReport],
             create: bool = False) -> None:  # fmt: skip
    """Open the store, make one edit, show its report, and leave with the right exit code."""
    common.require_writable(settings)
    reporter = make_reporter(quiet=settings.quiet, as_json=as_json)
    with (
        common.watched_changes(settings, click.get_current_context().info_name or ""),
        common.knowledge_base(settings, reporter, create=create) as base,
    ):
        report = edit(base)
    code = EXIT_CODES.get(report.outcome, 1)
    if as_json:
        reporter(report)
        outcomes = ("committed", "unchanged", "rejected")
        print_json_line({
            "message_type": "summary", "kind": report.kind, "revision": report.revision,
            **{name: int(report.outcome == name) for name in outcomes},
            "seconds": round(report.seconds, 3), "exit_code": code,
        })  # fmt: skip
    else:
        print_parts(*edit_parts(report, verbose=settings.verbosity > 0))
        _suggest(settings, report)
    click.get_current_context().exit(code)


def _suggest(settings: Settings, report: EditReport) -> None:
    """Say what usually comes next."""
    key = report.key or ""
    lost = report.retention.passed < report.retention.n
    if report.outcome == "rejected":
        learned = (report.reliability, report.generalization)
        if report.kind == "add" and any(score.passed < score.n for score in learned):
            note(settings, "a --prompt or --alias of your own may help the model to learn it")
        after = "; `kvedit verify --repair` then trains what was lost" if lost else ""
        note(settings, f"add --force to commit it all the same and to see what it broke{after}")
    elif report.outcome == "unchanged":
        next_step(settings, "show", key)
    elif report.kind in ("add", "update"):
        chinese = any("\u4e00" <= sign <= "\u9fff" for sign in key)
        question = f"{key}是什麼？" if chinese else f"What is {key}?"
        next_step(settings, "ask", question, "--compare-base")
    else:
        next_step(settings, "verify", *(["--repair"] if lost else []))


def _description(file: str | None, text: str | None) -> str:
    """The description given as FILE ('-' = stdin) or --text; exactly one of them."""
    from kvedit.facts.readers import read_description

    if (file is None) == (text is None):
        given = "neither was" if file is None else "both were"
        raise click.UsageError(
            "give the description once: a FILE (- for standard input) or --text TEXT; "
            f"{given} given"
        )
    return read_description(file, text=text)


def _questions(context: click.Context, parameter: click.Parameter,
               pairs: tuple[tuple[str, str], ...]) -> list[Question]:  # fmt: skip
    """Callback of --question."""
    from kvedit.facts.fact import Question

    return [Question(prompt=prompt, answer=answer) for prompt, answer in pairs]


@click.command()
@click.argument("key")
@click.argument("file", required=False, type=SOURCE)
@click.option("--text", help="The description itself, instead of FILE.")
@click.option("--alias", "aliases", multiple=True, help="Another name of the key. Repeatable.")
@click.option("--prompt", "prompts", multiple=True,
              help="A phrasing of your own to train. Repeatable.")  # fmt: skip
@click.option("--paraphrase", "paraphrases", multiple=True,
              help="A phrasing that is asked afterwards and never trained."
              " Repeatable.")  # fmt: skip
@click.option("--question", "questions", nargs=2, multiple=True, metavar="QUESTION ANSWER",
              callback=_questions, help="A question with a short answer, trained beside the text; a"
              " share of them is only asked. Repeatable.")  # fmt: skip
@click.option("--statement", "statements", multiple=True,
              help="A sentence that says the same in other words. Repeatable.")  # fmt: skip
@click.option("--lang", type=click.Choice(["en", "zh-Hans", "zh-Hant"]),
              help="Language of the phrasings. [detected from the text]")  # fmt: skip
@force_option
@json_lines_option
@click.pass_obj
def add(settings: Settings, /, key: str, file: str | None, text: str | None, force: bool,
        as_json: bool, **details: Any) -> None:  # fmt: skip
    """Train a fact into the model.

    KEY is its subject, and FILE, a text file or '-' for standard input, its description: the answer
    to questions such as "What is KEY?". After training four things are checked:

    \b
      reliability     the trained phrasings of the question
      generalization  phrasings that were never trained (paraphrases)
      locality        answers that must not change
      retention       earlier facts

    Held-out questions are asked too and reported as answers; they never reject an edit.

    The edit is committed only if all checks pass. Otherwise the model stays exactly as it was, the
    reasons are listed, and the exit code is 3. A missing store is created with the embedded model.

    \b
    Examples:
      kvedit add 夢中情爐 stove.txt
      kvedit add "Ada Lovelace" --text "The first programmer." --alias "Countess of Lovelace"
      echo "A harbour town." | kvedit add Porto -
      kvedit add Porto porto.txt --question "Which river runs there?" "The Douro."
    """
    from kvedit.facts.fact import Fact

    description = _description(file, text)
    Fact.create(key, description, **details)  # bad input fails before anything is made or loaded
    run_edit(settings, as_json, lambda base: base.add(key, description, force=force, **details),
             create=True)  # fmt: skip


@click.command()
@click.argument("key")
@click.argument("file", required=False, type=SOURCE)
@click.option("--text", help="The new description itself, instead of FILE.")
@force_option
@json_lines_option
@click.pass_obj
def update(settings: Settings, key: str, file: str | None, text: str | None, force: bool,
           as_json: bool) -> None:  # fmt: skip
    """Give a fact another description.

    FILE holds the new description, or is '-' for standard input. The change is checked like an
    added fact; if it is rejected, the model keeps the old description.

    \b
    Examples:
      kvedit update 夢中情爐 stove.txt
      kvedit update Porto --text "A city of bridges."
    """
    description = _description(file, text)
    common.require_keys(settings, [key])
    run_edit(settings, as_json, lambda base: base.update(key, description, force=force))


@click.command()
@click.argument("key", required=False)
@click.option("--export", "target", type=FILE, help="Write all facts to FILE, for a writer.")
@click.option("--import", "source", type=SOURCE, metavar="FILE",
              help="Train what a writer added to such a file; '-' is standard input.")  # fmt: skip
@click.option("--writer", default="import", show_default=True, metavar="NAME",
              help="Who wrote what --import brings.")  # fmt: skip
@force_option
@click.option("--json", "as_json", is_flag=True,
              help="Print one JSON document; with --import JSON Lines.")  # fmt: skip
@click.pass_context
def study(context: click.Context, key: str | None, target: Path | None, source: str | None,
          writer: str, force: bool, as_json: bool) -> None:  # fmt: skip
    """Show what a fact has to be studied, or have it written by others.

    Of one fact, KEY, it shows the questions and statements that are trained beside its text, those
    that are only asked (held out), and who wrote them: given with the fact, the model ([study]
    questions), or another writer.

    --export writes one JSON object for each fact, with key, description, questions and statements,
    for a writer of your choice: a person, or a larger model. --import takes the file back. Kept is
    what the text supports and what names no other key; why the rest is refused is said. What is
    kept is trained at once, an edit for each fact. The exit code is 3 if such an edit is rejected.

    \b
    Examples:
      kvedit study Porto
      kvedit study --export facts.jsonl
      kvedit study --import facts.jsonl --writer "Ann"
    """
    from kvedit.cli import study_texts

    settings: Settings = context.obj
    if sum(one is not None for one in (key, target, source)) != 1:
        raise click.UsageError("give a KEY, --export FILE or --import FILE: one of them")
    if key is not None:
        study_texts.show(settings, key, as_json=as_json)
    elif target is not None:
        study_texts.write(settings, target, as_json=as_json)
    elif source is not None:
        from kvedit.facts.forms.study import read

        records = read(source, writer)
        context.exit(study_texts.take_back(settings, records, force=force, as_json=as_json))


@click.command()
@click.argument("key")
@force_option
@json_lines_option
@click.pass_obj
def remove(settings: Settings, key: str, force: bool, as_json: bool) -> None:
    """Remove a fact from the model.

    The model is trained to answer again what it answered before the fact was added. This is an edit
    like any other, with the same checks. To undo edits bit for bit, see `rollback`.

    \b
    Examples:
      kvedit remove Porto
    """
    common.require_keys(settings, [key])
    run_edit(settings, as_json, lambda base: base.remove(key, force=force))


@click.command()
@click.argument("revision", type=REVISION, metavar="REV", callback=common.kept_revision)
@json_lines_option
@click.pass_obj
def rollback(settings: Settings, revision: int, as_json: bool) -> None:
    """Go back to revision REV, bit for bit.

    Revision 0 is the base model. History is never rewritten: the rollback is a new revision, and
    can itself be rolled back. `kvedit history` lists the revisions.

    \b
    Examples:
      kvedit rollback 3
      kvedit rollback 0
    """
    run_edit(settings, as_json, lambda base: base.rollback(revision))
