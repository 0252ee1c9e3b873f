"""`kvedit bench`: what editing costs and holds on the user's own model and facts.

Invariants: heavy imports inside functions; a benchmark works in temporary stores and never touches
the user's own.
"""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import click

from kvedit.cli.commands.ingest import group_size
from kvedit.cli.common import Settings, json_option
from kvedit.cli.parameters import COUNT, INPUT_FILE, SOURCE
from kvedit.errors import GateFailedError

model_option = click.option("--model", metavar="NAME_OR_DIR", help="Base model. [the embedded one]")
config_option = click.option("--config", type=INPUT_FILE,
                             help="A kvedit.toml with settings to use.")  # fmt: skip
limit_option = click.option("--limit", type=COUNT, default=32, show_default=True, metavar="N",
                            help="Take the first N facts.")  # fmt: skip


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
@click.argument("facts", metavar="FACTS", type=SOURCE)
@model_option
@config_option
@limit_option
@click.option("--single", type=click.IntRange(min=0), default=4, show_default=True, metavar="N",
              help="How many of them to add one by one.")  # fmt: skip
@json_option
@click.pass_obj
def speed(settings: Settings, /, single: int, as_json: bool, **given: Any) -> None:
    """Seconds a fact, one by one and in groups, and where the time goes.

    \b
    Examples:
      kvedit bench speed facts.jsonl
      kvedit bench speed facts.jsonl --model path/to/model --limit 64 --single 8
    """
    from kvedit.bench import speed as module

    _run(settings, module, partial(module.speed, _setup(**given), single), as_json)


@bench.command()
@click.argument("facts", metavar="[FACTS]", required=False, type=SOURCE)
@model_option
@config_option
@click.option("--estimate", is_flag=True, help="Only estimate; do not load the model.")
@json_option
@click.pass_obj
def memory(settings: Settings, /, estimate: bool, as_json: bool, **given: Any) -> None:
    """The memory that editing takes: estimated, then the measured peak of one edit.

    The edit is of the first of FACTS, or of one that is made up.

    \b
    Examples:
      kvedit bench memory --model path/to/model
      kvedit bench memory --model path/to/model --estimate
    """
    from kvedit.bench import memory as module

    measure = partial(module.memory, _setup(limit=1, **given), measured=not estimate)
    _run(settings, module, measure, as_json)


@bench.command()
@click.argument("facts", metavar="FACTS", type=SOURCE)
@model_option
@config_option
@limit_option
@click.option("--group", "groups", multiple=True, default=("1", "8", "auto"), show_default=True,
              metavar="N|auto", callback=lambda ctx, option, texts: [
                  group_size(ctx, option, text) for text in texts],
              help="Facts that are trained together; may be given more than once.")  # fmt: skip
@json_option
@click.pass_obj
def strategies(settings: Settings, /, groups: list[int | None], as_json: bool,
               **given: Any) -> None:  # fmt: skip
    """Train the same facts in groups of several sizes, and compare what is recalled.

    For each size: recall, phrasings never trained on, locality, facts committed before the last
    edit, and seconds a fact.

    \b
    Examples:
      kvedit bench strategies facts.jsonl
      kvedit bench strategies facts.jsonl --group 16 --group auto --limit 128
    """
    from kvedit.bench import strategies as module

    _run(settings, module, partial(module.strategies, _setup(**given), groups), as_json)


@bench.command()
@click.argument("families", nargs=-1)
@click.option("--model", metavar="NAME_OR_DIR", help="Try the architecture of this model.")
@click.option("--trust-remote-code", is_flag=True, help="Run the model's own code.")
@json_option
@click.pass_obj
def architectures(settings: Settings, families: tuple[str, ...], model: str | None,
                  trust_remote_code: bool, as_json: bool) -> None:  # fmt: skip
    """Whether models of an architecture can be edited, undone and exported.

    A small model with random weights is made for --model, for each of FAMILIES (transformers' model
    types), or for every family that kvedit knows. Exit code 4 if any of it fails.

    \b
    Examples:
      kvedit bench architectures --model path/to/model
      kvedit bench architectures llama qwen3 gpt2
    """
    from kvedit.bench import architectures as module

    measure = partial(module.architectures, model, families, trust=trust_remote_code)
    if not _run(settings, module, measure, as_json).passed:
        raise GateFailedError("not every architecture passed", hint="See the result above.")


def _setup(*, facts: str | None, limit: int, **given: Any) -> Any:
    from kvedit.bench.speed import Setup, load_facts

    return Setup(facts=load_facts(facts, limit) if facts else (), **given)


def _run(settings: Settings, module: Any, measure: Callable[..., Any], as_json: bool) -> Any:
    """Measure, and print the result as tables or as one JSON document."""
    from kvedit.bench import tables
    from kvedit.cli.output import print_json
    from kvedit.cli.progress import make_reporter

    began, name = datetime.now(UTC), module.__name__.rpartition(".")[2]
    with make_reporter(quiet=settings.quiet) as reporter:
        result = measure(emit=reporter)
    words, shown = ["kvedit", *sys.argv[1:]], module.tables(result)
    document = tables.document(name, words, began, result, shown, notes=module.NOTES)
    if as_json:
        print_json(document)
    else:
        tables.print_tables(document)
        click.echo(module.NOTES)
    return result
