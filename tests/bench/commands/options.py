"""The options that benchmarks share.

Invariant: an option has one name, one meaning and one default wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kvedit.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Any], Any]
OUT = click.Path(dir_okay=False, path_type=Path)
IN = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

data = click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with poets.jsonl, relations.jsonl, relation_phrasings.json.",
)
model = click.option("--model", metavar="NAME_OR_DIR", help="Base model. [the embedded one]")
models = click.option(
    "--model",
    "sources",
    multiple=True,
    metavar="NAME_OR_DIR",
    help="Base model; may be given more than once. [the embedded one]",
)
seed = click.option("--seed", default=0, show_default=True, help="Which base facts are drawn.")
json_file = click.option(
    "--json", "json_file", type=OUT, metavar="FILE", help="Also write all as JSON."
)
PICTURES = (".png", ".svg", ".pdf")


def _picture(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refused before hours of measuring, not after."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise click.BadParameter(f"{path.name} must end in {', '.join(PICTURES)}")
    return path


plot = click.option(
    "--plot",
    type=OUT,
    callback=_picture,
    metavar="FILE",
    help="Also draw a picture (.png, .svg, .pdf).",
)
picture = click.option(
    "-o", "--output", type=OUT, callback=_picture, required=True, help="Picture: .png, .svg, .pdf."
)
facts_file = click.option(
    "--facts-file", type=IN, help="JSON Lines with key and description, instead of --kind."
)
store_dir = click.option(
    "--store-dir",
    type=FOLDER,
    help="Keep the store there; a kvedit.toml in it is used. [a temporary one]",
)
protect = click.option(
    "--protect", type=IN, help="A file of text to protect besides the model's own."
)
base_sample = click.option(
    "--base-sample",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="How many facts of each kind to ask the base model.",
)


resume = click.option(
    "--resume", is_flag=True, help="Go on with runs that were stopped, in the stores they left."
)


def kind(*more: str, default: str = "poets") -> Option:
    """Which facts of the data folder are taught."""
    return click.option(
        "--kind",
        type=click.Choice([*more, "poets", "relations"]),
        default=default,
        show_default=True,
        help="Facts to teach, of those that pretraining did not see.",
    )


def facts(default: int) -> Option:
    """How many facts are taught."""
    return click.option(
        "--facts",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="How many facts to add.",
    )


common = (data, model, seed, json_file)
others = (kind(), facts_file, protect, store_dir)
plain = (
    click.option("--plain/--no-plain", default=True, help="Run the plain recipe too. [yes]"),
    click.option(
        "--plain-facts",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="On how many of the facts.",
    ),
)


def group_size(context: click.Context, option: click.Parameter, text: str) -> str:
    """A number from 1, ``all`` or ``auto``."""
    number = text.isascii() and text.isdigit() and int(text) > 0
    if not number and text not in ("all", "auto"):
        raise click.BadParameter(f"{text!r} is neither a number from 1, nor all, nor auto")
    return text


def group(default: str) -> Option:
    """How many facts are taught together."""
    return click.option(
        "--group",
        default=default,
        show_default=True,
        callback=group_size,
        metavar="N|all|auto",
        help="Facts taught together.",
    )


def group_sizes(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Several of them."""
    return tuple(group_size(context, option, text) for text in values)


def given(*options: Option) -> Callable[[Command], Command]:
    """Several options at once, in the order given."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def without_plain(plain: bool, values: dict[str, Any]) -> dict[str, Any]:
    """Options of a benchmark, on no facts by the plain recipe where that is not wanted."""
    return values if plain else {**values, "plain_facts": 0}


def require_store_dir(resume: bool, folder: Path | None) -> None:
    """What goes on must say where it is."""
    if resume and folder is None:
        raise UsageError("--resume needs the --store-dir of the run that was stopped")
