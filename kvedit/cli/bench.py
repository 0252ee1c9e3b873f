"""`kvedit bench`: what editing costs and holds on the user's own model and facts.

Invariants: heavy imports inside functions; a benchmark works in temporary stores and never touches
the user's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from kvedit.cli.common import Settings, json_option
from kvedit.cli.ingest import group_size
from kvedit.errors import GateFailedError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
model_option = click.option("--model", metavar="NAME_OR_DIR", help="Base model. [the embedded one]")
config_option = click.option("--config", type=FILE, help="A kvedit.toml with settings to use.")
facts_argument = click.argument("facts", metavar="FACTS")


def limit_option(default: int) -> Callable[[Any], Any]:
    """`--limit` of a benchmark over a file of facts."""
    text = "Take the first N facts."
    number = click.IntRange(min=1)
    return click.option(
        "--limit", type=number, default=default, show_default=True, metavar="N", help=text
    )


@click.group()
def bench() -> None:
    """Measure a model and facts of your own.

    Everything happens in temporary stores; yours is not touched. FACTS is a file as for `ingest`.
    With --json the result is one document: what was run, on what machine, and all values.

    \b
    Examples:
      kvedit bench speed facts.jsonl
      kvedit bench architectures llama gpt2
    """


@bench.command()
@facts_argument
@model_option
@config_option
@limit_option(32)
@click.option(
    "--single", type=click.IntRange(min=0), default=4, show_default=True, metavar="N",
    help="How many of them to add one by one.",
)  # fmt: skip
@json_option
@click.pass_obj
def speed(
    settings: Settings, facts: str, model: str | None, config: Path | None, limit: int, single: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Seconds a fact, one by one and in groups, and where the time goes.

    \b
    Examples:
      kvedit bench speed facts.jsonl
      kvedit bench speed facts.jsonl --model path/to/model --limit 64 --single 8
    """
    from kvedit.bench import speed as measure

    setup = measure.Setup(model=model, facts=measure.load_facts(facts, limit), config=config)
    _run(settings, measure, "speed", lambda emit: measure.speed(setup, single, emit), as_json)


@bench.command()
@click.argument("facts", metavar="[FACTS]", required=False)
@model_option
@config_option
@click.option("--estimate", is_flag=True, help="Only estimate; do not load the model.")
@json_option
@click.pass_obj
def memory(
    settings: Settings, facts: str | None, model: str | None, config: Path | None, estimate: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """The memory that editing takes: estimated, then the measured peak of one edit.

    The edit is of the first of FACTS, or of one that is made up.

    \b
    Examples:
      kvedit bench memory --model path/to/model
      kvedit bench memory --model path/to/model --estimate
    """
    from kvedit.bench import memory as measure
    from kvedit.bench.speed import Setup, load_facts

    setup = Setup(model=model, facts=load_facts(facts, 1) if facts else (), config=config)
    _run(settings, measure, "memory",
         lambda emit: measure.memory(setup, emit, measured=not estimate), as_json)  # fmt: skip


@bench.command()
@facts_argument
@model_option
@config_option
@limit_option(32)
@click.option(
    "--group", "groups", multiple=True, default=("1", "8", "auto"), show_default=True,
    metavar="N|auto", callback=lambda context, option, values: [
        group_size(context, option, value) for value in values
    ],
    help="Facts that are trained together; may be given more than once.",
)  # fmt: skip
@json_option
@click.pass_obj
def strategies(
    settings: Settings, facts: str, model: str | None, config: Path | None, limit: int,
    groups: list[int | None], as_json: bool,
) -> None:  # fmt: skip
    """Train the same facts in groups of several sizes, and compare what is held.

    For each size: recall, phrasings never trained on, locality, facts committed before the last
    edit, and seconds a fact.

    \b
    Examples:
      kvedit bench strategies facts.jsonl
      kvedit bench strategies facts.jsonl --group 16 --group auto --limit 128
    """
    from kvedit.bench import strategies as measure
    from kvedit.bench.speed import Setup, load_facts

    setup = Setup(model=model, facts=load_facts(facts, limit), config=config)
    _run(settings, measure, "strategies",
         lambda emit: measure.strategies(setup, groups, emit), as_json)  # fmt: skip


@bench.command()
@click.argument("families", nargs=-1)
@click.option("--model", metavar="NAME_OR_DIR", help="Try the architecture of this model.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
@json_option
@click.pass_obj
def architectures(
    settings: Settings, families: tuple[str, ...], model: str | None, trust_remote_code: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Whether models of an architecture can be edited, undone and exported.

    A small model with random weights is made for --model, for each of FAMILIES (transformers' model
    types), or for every family that kvedit knows. Exit code 4 if any of it fails.

    \b
    Examples:
      kvedit bench architectures --model path/to/model
      kvedit bench architectures llama qwen3 gpt2
    """
    from kvedit.bench import architectures as measure

    def run(emit: Any) -> Any:
        return measure.architectures(model, families, emit, trust=trust_remote_code)

    result = _run(settings, measure, "architectures", run, as_json)
    if not result.passed:
        raise GateFailedError("not every architecture passed", hint="See the table above.")


def _run(
    settings: Settings, module: Any, name: str, measure: Callable[[Any], Any], as_json: bool
) -> Any:
    """Measure, and print the result as tables or as one JSON document."""
    from kvedit.bench import tables
    from kvedit.cli.output import print_json
    from kvedit.cli.progress import make_reporter

    began = datetime.now(UTC)
    with make_reporter(quiet=settings.quiet) as reporter:
        result = measure(reporter)
    words = ["kvedit", *sys.argv[1:]]
    made = module.tables(result)
    document = tables.document(name, words, began, result, made, notes=module.NOTES)
    if as_json:
        print_json(document)
    else:
        tables.print_tables(document)
        click.echo(module.NOTES)
    return result
