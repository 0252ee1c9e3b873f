"""Commands that forget for good: erase and prune; both say beforehand what they end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import common, output
from kvedit.cli.commands.edit import run_edit
from kvedit.cli.common import Settings, force_option, json_lines_option, json_option, note
from kvedit.cli.output import print_json, print_json_line, print_parts
from kvedit.cli.progress import make_reporter
from kvedit.facts.keys import in_words

if TYPE_CHECKING:
    from kvedit.store.forget.plans import ErasePlan, PrunePlan

yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, only.")


@click.command()
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@dry_run_option
@yes_option
@force_option
@json_lines_option
@click.pass_obj
def erase(settings: Settings, keys: tuple[str, ...], dry_run: bool, yes: bool, force: bool,
          as_json: bool) -> None:  # fmt: skip
    """Take facts out for good, from the store and from the weights.

    The text leaves the database, its history and probes, deltas, checkpoints, caches and new
    backups. The weights become those of the latest revision that has all other facts and never knew
    this one; if there is none, the other facts are trained again from the base model, which takes
    about as long as adding them did. The journal keeps that something was erased, not what.
    Revisions that knew the fact can no longer be restored or asked. Backups, exports and input
    files that exist already are not touched: delete them yourself.

    What will be done is listed first and has to be confirmed. If the checks refuse the new weights,
    nothing is erased. To take a fact out and keep its history, see `remove`.

    \b
    Examples:
      kvedit erase Porto --dry-run
      kvedit erase Porto
      kvedit erase Porto "Ada Lovelace" --yes
    """
    with common.read_only(settings) as store:
        plan = store.erase_plan([store.require(key).id for key in keys])
        pace = store.pace()
    _announce(plan, erase_lines(plan, pace), as_json=as_json, dry_run=dry_run)
    if not dry_run and _confirmed(settings, yes, f"erase {in_words(plan.keys)} for good?"):
        run_edit(settings, as_json, lambda base: base.erase(*keys, force=force))


@click.command()
@click.option("--before", type=click.IntRange(min=0), metavar="REV", required=True,
              help="The first revision to keep.")  # fmt: skip
@dry_run_option
@yes_option
@json_option
@click.pass_obj
def prune(settings: Settings, before: int, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Drop deltas that no revision from REV on needs.

    A checkpoint of REV is written, read back and compared first; it then stands for the deltas
    before it. Revisions before REV can no longer be restored, except the base model, 0, and those
    of which everything is needed by later ones. The journal keeps them all, and no fact changes.

    \b
    Examples:
      kvedit prune --before 100 --dry-run
      kvedit prune --before 100
    """
    with common.read_only(settings) as store:
        plan = store.prune_plan(before)
    _announce(plan, prune_lines(plan), as_json=as_json and dry_run, dry_run=dry_run)
    if dry_run or not (plan.dropped or plan.checkpoints):
        return
    if _confirmed(settings, yes, "drop them?"):
        reporter = make_reporter(quiet=settings.quiet or as_json)
        watched = common.watched_changes(settings, "prune")
        with watched, common.knowledge_base(settings, reporter) as base:
            done = base.prune(before)
        text = f"dropped {len(done.dropped)} deltas, {output.size_text(done.delta_bytes)}"
        output.print_result(as_json, asdict(done), text)


def _announce(plan: ErasePlan | PrunePlan, lines: Sequence[tuple[str, str]], *, as_json: bool,
              dry_run: bool) -> None:  # fmt: skip
    """What will be done; on stderr, unless it is all that was asked for."""
    if as_json:
        if dry_run:
            print_json({"dry_run": True, **asdict(plan)})
        else:
            print_json_line({"message_type": "plan", **asdict(plan)})
    else:
        print_parts(output.pairs(lines), file=sys.stdout if dry_run else sys.stderr)
        if dry_run:
            click.echo("nothing was changed")


def _confirmed(settings: Settings, yes: bool, question: str) -> bool:
    """Whether to go on; without --yes a person is asked, and a script is told what to add."""
    if yes:
        return True
    if not _on_terminal():
        raise click.UsageError("this cannot be undone: add --yes to confirm it")
    if click.confirm(question, err=True):
        return True
    note(settings, "nothing was changed")
    return False


def _on_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def erase_lines(plan: ErasePlan, pace: tuple[int, float]) -> list[tuple[str, str]]:
    """What erasing does, and what will no longer be possible."""
    from kvedit.store.lineage import revisions_text

    lines = [("erases", f"{in_words(plan.keys)}: text, history, probes, weights that knew it")]
    lines.append(("journal", "keeps that something was erased, not what"))
    lines.append(("the model", _model_text(plan, pace)))
    if plan.lost:
        lines.append(("no longer", f"restored or asked: {revisions_text(plan.lost)}"))
        size = output.size_text(plan.delta_bytes)
        files = "1 file is" if plan.delta_files == 1 else f"{plan.delta_files} files are"
        lines.append(("deltas", f"{files} removed, {size}"))
    lines.append(("as before", f"restored or asked: {revisions_text(plan.kept)}"))
    if plan.protected:
        lines.append(("protected", f"{plan.protected} texts that contain it are removed too"))
    if plan.shared_with:
        lines.append(("not erased", f"facts that have the text too: {in_words(plan.shared_with)}"))
    lines.append(("not reached", "backups, exports and input files that exist already"))
    return lines


def _model_text(plan: ErasePlan, pace: tuple[int, float]) -> str:
    """Where the weights come from, and how long that may take."""
    if plan.restores is not None:
        which = f"which has {'all other' if plan.restores else 'no'} facts"
        return f"gets the weights of revision {plan.restores}, {which}"
    count, seconds = pace
    each = f", about {output.seconds_text(seconds / count * plan.retrained)}" if count else ""
    others = "other fact" if plan.retrained == 1 else "other facts"
    return f"is trained again from the base model with {plan.retrained} {others}{each}"


def prune_lines(plan: PrunePlan) -> list[tuple[str, Any]]:
    """What pruning does, and what will no longer be possible."""
    from kvedit.store.lineage import revisions_text

    lines = [("deltas", f"all are needed by the revisions from {plan.before} on")]
    if plan.dropped:
        size = output.size_text(plan.delta_bytes)
        lines = [("drops", f"the deltas of {len(plan.dropped)} revisions, {size}")]
    if plan.checkpoints:
        lines.append(("drops", f"checkpoints of {revisions_text(plan.checkpoints)}"))
    if plan.stands_on is not None:
        lines.append(("instead", f"a checkpoint of revision {plan.stands_on}"))
    if plan.lost:
        lines.append(("no longer", f"restored or asked: {revisions_text(plan.lost)}"))
        lines.append(("also", "removing a fact of those revisions restores the base's answers"))
    lines.append(("as before", f"restored or asked: {revisions_text(plan.kept)}"))
    return lines
