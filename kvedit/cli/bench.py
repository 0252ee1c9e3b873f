"""The benchmarks: thin commands over ``kvedit.bench``, tables on stdout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvedit.cli.common import Settings, note
from kvedit.errors import GateFailedError, UsageError

if TYPE_CHECKING:
    from kvedit.bench.report import Sheet

Command = TypeVar("Command", bound=Callable[..., Any])
OUT = click.Path(dir_okay=False, path_type=Path)
IN = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

_data = click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with poets.jsonl, relations.jsonl, relation_phrasings.json.",
)
_model = click.option("--model", metavar="NAME_OR_DIR", help="Base model. [the embedded one]")
_models = click.option(
    "--model",
    "sources",
    multiple=True,
    metavar="NAME_OR_DIR",
    help="Base model; may be given more than once. [the embedded one]",
)
_seed = click.option("--seed", default=0, show_default=True, help="Which base facts are drawn.")
_json = click.option(
    "--json", "json_file", type=OUT, metavar="FILE", help="Also write all as JSON."
)
_COMMON = (_data, _model, _seed, _json)
_OTHERS = (
    click.option(
        "--facts-file", type=IN, help="JSON Lines with key and description. [held-out poets]"
    ),
    click.option("--protect", type=IN, help="A file of text to protect besides the model's own."),
    click.option("--store-dir", type=FOLDER, help="Keep the store there. [a temporary one]"),
)


def _facts(default: int) -> Callable[[Any], Any]:
    return click.option(
        "--facts",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="How many facts to add.",
    )


_ADDED = (_facts(20), *_OTHERS)
_PLAIN = (
    click.option("--plain/--no-plain", default=True, help="Run the plain recipe too. [yes]"),
    click.option(
        "--plain-facts",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="On how many of the facts.",
    ),
)
_plot = click.option(
    "--plot", type=OUT, metavar="FILE", help="Also draw a picture (needs matplotlib)."
)


def _group_sizes(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Numbers from 1, ``all`` or ``auto``."""
    for text in values:
        number = text.isascii() and text.isdigit() and int(text) > 0
        if not number and text not in ("all", "auto"):
            raise click.BadParameter(f"{text!r} is neither a number from 1, nor all, nor auto")
    return values


def _with(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options at once, in the order given."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


base_sample = click.option(
    "--base-sample",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="How many facts of each kind to ask the base model.",
)


@click.group()
def bench() -> None:
    """Measure what kvedit promises, on real facts.

    Each measurement prints tables, and a Markdown block with command, commit and machine for
    docs/experiments.md. DIR of --data holds poets.jsonl, relations.jsonl and
    relation_phrasings.json.

    \b
    Examples:
      kvedit bench retain --data ../shared/data
      kvedit bench base --data ../shared/data
      kvedit bench rollback --data ../shared/data --facts 20
    """


@bench.command()
@_with(*_COMMON, *_ADDED, base_sample, *_PLAIN, _plot)
@click.pass_obj
def retain(
    settings: Settings, /, json_file: Path | None, plot: Path | None, plain: bool, **given: Any
) -> None:
    """Add facts one by one; measure what stays, what it costs, and the plain recipe beside it.

    What was known before is asked again after 1, 2, 5, 10, 20, ... facts, by free generation.

    \b
    Examples:
      kvedit bench retain --data ../shared/data
      kvedit bench retain --data ../shared/data --facts 5 --no-plain --plot kept.png
    """
    from kvedit.bench import report
    from kvedit.bench.retain import BenchOptions
    from kvedit.bench.retain import retain as measure

    given["plain_facts"] = given["plain_facts"] if plain else 0
    result = _run(settings, measure, BenchOptions(**given))
    _show("Retention", result.model, report.notes(result), report.retain_sheets(result))
    _keep(result, json_file)
    if plot is not None and not report.plot(result, plot):
        note(settings, "no picture was drawn: matplotlib is not installed")


@bench.command()
@_with(*_COMMON, _facts(64), *_OTHERS, base_sample, *_PLAIN, _plot)
@click.option(
    "--group",
    "groups",
    callback=_group_sizes,
    multiple=True,
    metavar="N|all|auto",
    help="Facts taught together; may be given more than once. [1, 16, all, auto]",
)
@click.option(
    "--resume", is_flag=True, help="Go on with runs that were stopped, in the stores they left."
)
@click.pass_obj
def strategies(
    settings: Settings, /, json_file: Path | None, plot: Path | None, plain: bool, **given: Any
) -> None:
    """Teach the same facts one by one, in groups, all at once, and by the plain recipe.

    Each way is one run of ingest into a new store. What is held is measured in passing, after 16,
    32, 64, 128, 256, 300, 512, 1000, ... facts and after the last; each measurement is said at
    once, and FILE of --json written anew. A kvedit.toml in --store-dir is used for every store.
    With --resume a run that was stopped goes on in --store-dir; what was measured is not retold.

    \b
    Examples:
      kvedit bench strategies --data ../shared/data
      kvedit bench strategies --data ../shared/data --facts 1000 --group auto --json auto.json
    """
    from kvedit.bench import report_strategies as report
    from kvedit.bench.strategies import StrategyOptions
    from kvedit.bench.strategies import strategies as measure

    if given["resume"] and given["store_dir"] is None:
        raise UsageError("--resume needs the --store-dir of the run that was stopped")
    given["plain_facts"] = given["plain_facts"] if plain else 0
    options = StrategyOptions(**{name: value for name, value in given.items() if value != ()})
    result = _run_telling(settings, measure, options, json_file, report.line)
    _show("Strategies", result.model, report.notes(result), report.sheets(result))
    _keep(result, json_file)
    if plot is not None and not report.plot(result, plot):
        note(settings, "no picture was drawn: matplotlib is not installed")


@bench.command()
@_with(_data, _models, _seed, _json, _facts(300), *_OTHERS, base_sample)
@click.option(
    "--group",
    default="auto",
    show_default=True,
    callback=lambda context, option, text: _group_sizes(context, option, (text,))[0],
    metavar="N|all|auto",
    help="Facts taught together.",
)
@click.pass_obj
def capacity(
    settings: Settings,
    /,
    json_file: Path | None,
    sources: tuple[str, ...],
    group: str,
    **given: Any,
) -> None:
    """How many facts a model holds, in facts and in bits, and what those that it loses are like.

    Give --model more than once to set models of several sizes side by side.

    \b
    Examples:
      kvedit bench capacity --data ../shared/data --facts 1000 --json capacity.json
      kvedit bench capacity --data ../shared/data --model small --model large
    """
    from kvedit.bench import report_capacity as report
    from kvedit.bench.capacity import capacity as measure
    from kvedit.bench.report_strategies import line
    from kvedit.bench.strategies import StrategyOptions

    options = StrategyOptions(**given, groups=(group,), plain_facts=0)
    run = partial(measure, sources=sources or (None,))
    result = _run_telling(settings, run, options, json_file, line)
    _show("Capacity", result.model, report.NOTES, report.sheets(result))
    _keep(result, json_file)


@bench.command()
@_with(*_COMMON, *_ADDED, *_PLAIN)
@click.option(
    "--ingest-facts",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How many facts to ingest.",
)
@click.pass_obj
def speed(settings: Settings, /, json_file: Path | None, plain: bool, **given: Any) -> None:
    """Seconds a fact one by one, by ingest and by the plain recipe, and where they go.

    Also peak memory, arithmetic against the machine's own matrix product, and verify of all facts.

    \b
    Examples:
      kvedit bench speed --data ../shared/data
      kvedit bench speed --data ../shared/data --facts 10 --ingest-facts 128 --json speed.json
    """
    from kvedit.bench import report_speed as report
    from kvedit.bench.speed import SpeedOptions
    from kvedit.bench.speed import speed as measure

    given["plain_facts"] = given["plain_facts"] if plain else 0
    result = _run(settings, measure, SpeedOptions(**given))
    _show("Speed", result.model, report.notes(result), report.sheets(result))
    _keep(result, json_file)


@bench.command()
@_with(*_COMMON, base_sample)
@click.pass_obj
def base(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """What the base model recalls of the facts it was pretrained on, and of others.

    \b
    Examples:
      kvedit bench base --data ../shared/data
    """
    from kvedit.bench import report
    from kvedit.bench.retain import BenchOptions
    from kvedit.bench.retain import base as measure

    result = _run(settings, measure, BenchOptions(**given))
    sheet = report.base_sheet("Exact greedy recall of the base model", result.base)
    _show("The base model", result.model, report.BRACKETS, [sheet])
    _keep(result, json_file)


@bench.command()
@_with(*_COMMON, *_ADDED)
@click.pass_obj
def rollback(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Add facts, roll back to every revision, compare digests; export and compare answers.

    Exit code 4 if anything is not as it was.

    \b
    Examples:
      kvedit bench rollback --data ../shared/data --facts 20
    """
    from kvedit.bench import report
    from kvedit.bench.retain import BenchOptions
    from kvedit.bench.undo import undo

    result = _run(settings, undo, BenchOptions(**given))
    _show("Rollback and export", result.model, "", report.undo_sheets(result))
    _keep(result, json_file)
    if not result.exact:
        raise GateFailedError("not everything was as it had been", hint="See the table above.")


@bench.command()
@_with(*_COMMON, _facts(300), *_OTHERS)
@click.option(
    "--kills",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many processes to kill.",
)
@click.option(
    "--within",
    type=click.FloatRange(min=1.0),
    default=60.0,
    show_default=True,
    help="Seconds after which a process is killed at the latest.",
)
@click.option("--group", default="16", show_default=True, metavar="N|auto", help="As for ingest.")
@click.pass_obj
def kills(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Kill an ingest (SIGKILL) at random moments, let it finish, and see what is left.

    Exit code 4 if a fact was lost or added twice, or doctor finds anything.

    \b
    Examples:
      kvedit bench kills --data ../shared/data
      kvedit bench kills --data ../shared/data --facts 30 --kills 3 --within 20
    """
    from kvedit.bench import report
    from kvedit.bench.kills import KillOptions
    from kvedit.bench.kills import kills as measure

    result = _run(settings, measure, KillOptions(**given))
    _show("Kills", result.model, "", report.kills_sheets(result))
    _keep(result, json_file)
    if not result.sound:
        raise GateFailedError("the store is not as it should be", hint="See the table above.")


@bench.command()
@_with(*_COMMON, _facts(16), *_OTHERS)
@click.option(
    "--processes",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="How many are compared with one.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of each process, the single one too.",
)
@click.option("--group", default="8", show_default=True, metavar="N|auto", help="As for ingest.")
@click.pass_obj
def several(settings: Settings, /, json_file: Path | None, **given: Any) -> None:
    """Ingest the same facts in one process and in several; kill one of several.

    Exit code 4 if the runs did not commit and recall the same, or a kill left anything behind.

    \b
    Examples:
      kvedit bench several --data ../shared/data
      kvedit bench several --data ../shared/data --facts 32 --processes 4
    """
    from kvedit.bench.several import SeveralOptions, sheets
    from kvedit.bench.several import several as measure

    result = _run(settings, measure, SeveralOptions(**given))
    _show("Several processes", given["model"] or "kvedit-tiny", "", sheets(result))
    _keep(result, json_file)
    if not (result.equal and result.clean):
        raise GateFailedError("several processes did not do what one does", hint="See the tables.")


@bench.command()
@click.argument("names", nargs=-1)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the base weights.",
)
@click.option("--json", "json_file", type=OUT, metavar="FILE", help="Also write all as JSON.")
@click.pass_obj
def architectures(
    settings: Settings, names: tuple[str, ...], dtype: str, json_file: Path | None
) -> None:
    """Take tiny models of every architecture, or of NAMES, through all that a store does.

    Each is built here, without a download: add three facts, recall and retain them, update, remove,
    roll back to the bit, export, reload. Exit code 4 if any of it fails.

    \b
    Examples:
      kvedit bench architectures
      kvedit bench architectures GPT-2 Mixtral --dtype bfloat16
    """
    from kvedit.bench import architectures as bench_architectures
    from kvedit.cli.progress import make_reporter

    with make_reporter(quiet=settings.quiet) as reporter:
        result = bench_architectures.run(names, dtype, reporter)
    _show("Architectures", f"tiny, {dtype}", "", [bench_architectures.sheet(result)])
    _keep(result, json_file)
    if not result.passed:
        raise GateFailedError("not every architecture passed", hint="See the table above.")


@bench.command()
@click.option(
    "--measure",
    "shape",
    type=click.Choice(["0.5B", "1.5B", "3B", "7B", "14B", "32B"]),
    help="Also make a store for a random model of this shape, on the CPU, and teach it.",
)
@click.option(
    "--facts",
    "groups",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 16),
    show_default=True,
    help="Facts that are taught at once; may be given more than once.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=8),
    help="Cut each lesson to so many steps; seconds for the others are projected. [all steps]",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.pass_obj
def memory(
    settings: Settings,
    shape: str | None,
    groups: tuple[int, ...],
    steps: int | None,
    dtype: str,
) -> None:
    """How much memory editing takes, by model size and setting; and seconds, measured.

    \b
    Examples:
      kvedit bench memory
      kvedit bench memory --measure 0.5B --dtype bfloat16
      kvedit bench memory --measure 0.5B --dtype bfloat16 --facts 16 --steps 8
    """
    import torch

    from kvedit.bench import footprint
    from kvedit.cli.progress import make_reporter

    sheets = [footprint.computed()]
    if shape is not None:
        with make_reporter(quiet=settings.quiet) as reporter:
            found = footprint.measure(shape, getattr(torch, dtype), steps, groups, reporter)
        sheets.append(footprint.measured_sheet(found))
    _show("Memory", "shapes of Qwen2.5, random weights", "", sheets)


def _run(settings: Settings, measure: Callable[..., Any], options: Any) -> Any:
    from kvedit.cli.progress import make_reporter

    with make_reporter(quiet=settings.quiet) as reporter:
        return measure(options, reporter)


def _run_telling(
    settings: Settings,
    measure: Callable[..., Any],
    options: Any,
    json_file: Path | None,
    line: Callable[[Any], str],
) -> Any:
    """Run a long benchmark that says and keeps each measurement as soon as it is made."""
    from kvedit.cli.progress import make_reporter

    with make_reporter(quiet=settings.quiet) as reporter:

        def tell(result: Any, point: Any) -> None:
            _keep(result, json_file)
            if point is not None:
                reporter.say(line(point))

        return measure(options, emit=reporter, tell=tell)


def _command() -> str:
    return shlex.join(["kvedit", *sys.argv[1:]])


def _show(title: str, model: str, notes: str, sheets: Sequence[Sheet]) -> None:
    """Tables for the eye, then the same as Markdown."""
    from kvedit.bench import report

    _print_tables(sheets)
    click.echo(report.markdown(title, report.setting(_command()), model, notes, sheets))


def _print_tables(sheets: Sequence[Sheet]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for header in sheet.headers:
            table.add_column(header, overflow="fold")
        for row in sheet.rows:
            table.add_row(*(cell.replace(" = ", "\n").replace(" [", "\n[") for cell in row))
        console.print(table, markup=False)


def _keep(result: Any, json_file: Path | None) -> None:
    if json_file is not None:
        from kvedit.bench import report

        report.write(json_file, report.to_json(report.setting(_command()), result))
