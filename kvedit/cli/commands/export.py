"""export: the model as a folder, or one adapter, that other programs load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import common, output
from kvedit.cli.common import Settings, json_option
from kvedit.cli.output import print_result, score_text
from kvedit.cli.parameters import NEW_FOLDER, file_size
from kvedit.cli.progress import make_reporter
from kvedit.cli.tables.facts import first_of
from kvedit.errors import GateFailedError
from kvedit.facts.keys import in_words
from kvedit.files import require_new_folder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvedit.revisions.export.conditions import Condition
    from kvedit.revisions.export.hf import ExportReport


@click.command()
@click.argument("directory", type=NEW_FOLDER)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Type of the weights. [that of the base model]")  # fmt: skip
@click.option(
    "--format", "kind", type=click.Choice(["hf", "peft"]), default="hf", show_default=True,
    help="A whole model, or one LoRA adapter for the unchanged base model.",
)  # fmt: skip
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=file_size,
    help="Size of one weight file, such as 2GB.",
)
@json_option
@click.pass_obj
def export(settings: Settings, directory: Path, dtype: str | None, kind: str,
           max_shard_size: str | None, as_json: bool) -> None:  # fmt: skip
    """Write the model to a folder that transformers and vLLM load.

    The written files are loaded again and asked for all facts; the exit code is 4 if an answer
    differs. An adapter gets the smallest rank with which every probe still passes; --dtype and
    --max-shard-size are for whole models only.

    \b
    Examples:
      kvedit export my-model
      kvedit export my-model --dtype float16 --max-shard-size 2GB
      kvedit export my-adapter --format peft
    """
    if kind == "peft" and (dtype or max_shard_size):
        raise click.UsageError("--dtype and --max-shard-size do not go with --format peft")
    if not settings.rank:
        require_new_folder(directory)
    with common.knowledge_base(settings, make_reporter(quiet=settings.quiet or as_json)) as base:
        if kind == "peft":
            report = base.export_adapter(directory)
        else:
            report = base.export(directory, dtype=dtype, max_shard_size=max_shard_size)
    names = ("revision", "mismatches", "rank", "error", "serve")
    fields: dict[str, Any] = {"path": str(report.path), "probes": report.probes.to_json()}
    fields["conditions"] = [
        {"name": one.name, "recalled": one.score.to_json(), "lost": list(one.lost)}
        for one in report.conditions
    ]
    fields |= {name: getattr(report, name) for name in names}
    print_result(as_json, fields, *export_parts(report))
    if report.mismatches:
        raise _differs(len(report.mismatches))


def _differs(count: int) -> GateFailedError:
    """The error of an exported model that does not answer like the store's."""
    hint = "They are listed above; try another --dtype or --format."
    return GateFailedError(f"{count} answer(s) differ in the exported model", hint=hint)


def export_parts(report: ExportReport) -> list[RenderableType]:
    """Where the model went and whether it answers as it should."""
    rows = []
    if report.rank is not None:
        rows.append(("adapter", f"rank {report.rank}, leaves out {report.error:.2%} of the change"))
    if report.probes.n:
        rows.append(("same answers", score_text(report.probes)))
    rows += [("differs", prompt) for prompt in first_of(report.mismatches)]
    parts: list[RenderableType] = [f"exported revision {report.revision} to {report.path}"]
    parts += [output.pairs(rows, 2)] if rows else []
    if report.conditions:
        parts += ["", _conditions_table(report.conditions)]
    return [*parts, *(["", f"to serve it: {report.serve}"] if report.serve else [])]


def _conditions_table(conditions: Sequence[Condition]) -> RenderableType:
    """How many facts are recalled where the model is asked or held otherwise, and which are not."""
    rows = []
    for one in conditions:
        score, share = one.score, ("not asked", "")
        if score.n:
            low, high = (round(100 * end) for end in score.interval())
            share = f"{score.passed} of {score.n}", f"{low}-{high}%"
        rows.append((one.name, *share, in_words(one.lost)))
    return output.table(("asked", "facts recalled", "95% interval", "lost"), rows)
