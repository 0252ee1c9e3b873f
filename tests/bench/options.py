"""The options that benchmarks share: one name, one meaning and one default wherever they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Option = Callable[[Any], Any]
IN = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
PICTURES = (".png", ".svg", ".pdf")


def number(name: str, text: str, default: int | None, low: int = 1, **more: Any) -> Option:
    """A whole number, with its default shown."""
    shown = default is not None and "multiple" not in more
    kind = click.IntRange(min=low)
    return click.option(name, type=kind, default=default, show_default=shown, help=text, **more)


def _picture(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refused before hours of measuring, not after."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise click.BadParameter(f"{path.name} must end in {', '.join(PICTURES)}")
    return path


def group_size(context: click.Context, option: click.Parameter, text: str) -> str:
    """A number from 1, ``all`` or ``auto``."""
    size = text.isascii() and text.isdigit() and int(text) > 0
    if not size and text not in ("all", "auto"):
        raise click.BadParameter(f"{text!r} is neither a number from 1, nor all, nor auto")
    return text


def group_sizes(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Several of them."""
    return tuple(group_size(context, option, text) for text in values)


def names(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    """Names with commas between them; nothing for ``all``."""
    given = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if given == ("all",) else given


def settings(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str, Any], ...]:
    """METHOD.NAME=VALUE or SECTION.NAME=VALUE, the value in JSON."""
    read = []
    for text in values:
        place, _, value = text.partition("=")
        first, _, name = place.partition(".")
        try:
            read.append((first, name, json.loads(value)))
        except ValueError as error:
            form = option.metavar or "SECTION.NAME=VALUE"
            raise click.BadParameter(f"{text!r} is not {form} (in JSON)") from error
    return tuple(read)


def several_settings(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[tuple[str, str, Any], ...], ...]:
    """Each value has settings with spaces between them."""
    return tuple(settings(context, option, tuple(text.split())) for text in values)


def kind(*more: str, default: str = "poets") -> Option:
    """Which facts of the data folder are trained."""
    text = "Facts to train: poets or relations that pretraining did not see"
    return click.option(
        "--kind", type=click.Choice([*more, "poets", "relations"]), default=default,
        show_default=True, help=f"{text}, or poets that it did." if more else f"{text}.",
    )  # fmt: skip


def group(default: str) -> Option:
    """How many facts are trained together."""
    return click.option(
        "--group", default=default, show_default=True, callback=group_size, metavar="N|all|auto",
        help="Facts trained together.",
    )  # fmt: skip


def facts(default: int) -> Option:
    """How many facts are added."""
    return number("--facts", "How many facts to add.", default)


data = click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True,
    help="Folder with the data; `python -m tests.bench data` says what belongs there.",
)  # fmt: skip
model = click.option("--model", metavar="NAME_OR_DIR", help="Base model. [the embedded one]")
models = click.option(
    "--model", "sources", multiple=True, metavar="NAME_OR_DIR",
    help="Base model; may be given more than once. [the embedded one]",
)  # fmt: skip
seed = click.option("--seed", default=0, show_default=True, help="Which base facts are drawn.")
json_file = click.option(
    "--json", "json_file", type=OUT, metavar="FILE", help="Also write the result as JSON."
)
plot = click.option(
    "--plot", type=OUT, callback=_picture, metavar="FILE",
    help="Also draw a picture (.png, .svg, .pdf).",
)  # fmt: skip
picture = click.option(
    "-o", "--output", type=OUT, callback=_picture, required=True, help="Picture: .png, .svg, .pdf."
)
facts_file = click.option(
    "--facts-file", type=IN, help="JSON Lines with key and description, instead of --kind."
)
store_dir = click.option(
    "--store-dir", type=FOLDER,
    help="Keep the store there; a kvedit.toml in it is used. [a temporary one]",
)  # fmt: skip
protect = click.option(
    "--protect", type=IN, help="A file of text to protect besides the model's own."
)
base_sample = number("--base-sample", "How many facts of each kind to ask the base model.", 300)
resume = click.option(
    "--resume", is_flag=True, help="Go on with runs that were stopped, in the stores they left."
)
baseline = (
    click.option("--baseline/--no-baseline", default=True, help="Run the baseline too. [yes]"),
    number("--baseline-facts", "On how many of the facts.", 10),
)
common = (data, model, seed, json_file)
others = (kind(), facts_file, protect, store_dir)
abilities = click.option(
    "--abilities", type=IN,
    help="JSON Lines of multiple choice: task, prompt, choices, answer (an index).",
)  # fmt: skip
