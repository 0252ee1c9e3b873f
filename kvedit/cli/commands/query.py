"""Commands that read the store: list, show, similar, history, status, report.

Invariant: nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

import click

from kvedit.cli import common
from kvedit.cli.common import Settings, json_option, note, read_only
from kvedit.cli.output import print_result, size_text, table
from kvedit.cli.parameters import COUNT, FILE
from kvedit.cli.tables.facts import (
    edits_table,
    fact_document,
    fact_parts,
    facts_table,
    status_table,
)
from kvedit.files import require_writable

RESULTS = 500  # of a fact, at most, that its latest scores are counted in


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
    from kvedit.store.integrity import is_half_made

    with read_only(settings) as store:
        rows = store.facts(None if state == "all" else state)
        half_made = is_half_made(store)
    if rows or as_json:
        print_result(as_json, [row.to_json() for row in rows], facts_table(rows))
    else:
        note(settings, "no facts" if state == "all" else f"no {state} facts")
        common.next_step(settings, *(("init",) if half_made else ("add", "KEY", "FILE")))


@click.command()
@click.argument("key")
@json_option
@click.pass_obj
def show(settings: Settings, key: str, as_json: bool) -> None:
    """Show one fact: description, health, edits and the latest checks.

    KEY may also be an alias. Each check has a margin, in logits: how far the answer's weakest token
    is ahead of the best other one. A small margin is easily lost; below zero the model answers
    something else. A fact is asked in other languages than its own, too. The kinds of checks:

    \b
      recall       a phrasing that was trained, asked in the fact's own edit
      retention    the same, asked after a later edit
      paraphrase   a phrasing that was never trained
      portability  a question about the fact that was never trained

    \b
    Examples:
      kvedit show 夢中情爐
      kvedit show Porto --json
    """
    with read_only(settings) as store:
        row = store.require(key)
        edits = store.history(row.fact.key)
        results = store.results(row.id, RESULTS)
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
    from kvedit.store import integrity

    with read_only(settings) as store:
        fields = integrity.status(store)
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
    rejected and why, the latest edits, and plots over time. Nothing is measured for it: run
    `verify` first for current figures. It names no folder of this machine by more than its last
    name, but it holds the texts of the facts.

    \b
    Examples:
      kvedit report
      kvedit --store poems report -o poems.html
    """
    from kvedit.store.report import html_report

    require_writable(file)
    with read_only(settings) as store:
        html_report.write(store, file)
        head = store.head()
    size = file.stat().st_size
    document = {"path": str(file), "revision": head, "bytes": size}
    print_result(as_json, document, f"wrote {file}: revision {head}, {size_text(size)}")
