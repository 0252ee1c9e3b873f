"""`python -m tests.bench memory`: how much memory editing takes."""

from __future__ import annotations

import click

from kvedit.cli.common import Settings
from tests.bench.commands.show import show


@click.command()
@click.option(
    "--measure",
    "shapes",
    type=click.Choice(["0.5B", "1.5B", "3B", "7B", "14B", "32B"]),
    multiple=True,
    help="Make a store for a random model of this shape, on the GPU if there is one, and"
    " teach it; may be given more than once.",
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
@click.option(
    "--operations",
    "counted",
    is_flag=True,
    help="Also teach as many facts with the operations of a step counted, and set them against a"
    " large matrix product of the same machine.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.pass_obj
def memory(
    settings: Settings,
    shapes: tuple[str, ...],
    groups: tuple[int, ...],
    steps: int | None,
    counted: bool,
    dtype: str,
) -> None:
    """How much memory editing takes, by model size and setting, computed; or, with --measure, how
    much it took, and how long.

    \b
    Examples:
      python -m tests.bench memory
      python -m tests.bench memory --measure 0.5B --measure 1.5B --dtype bfloat16
      python -m tests.bench memory --measure 0.5B --dtype bfloat16 --facts 16 --steps 8 --operations
    """
    import torch

    from kvedit.cli.progress import make_reporter
    from tests.bench import footprint

    model = "shapes of Qwen2.5, random weights"
    if not shapes:
        show("Memory", model, "", [footprint.computed()])
    for shape in shapes:
        with make_reporter(quiet=settings.quiet) as reporter:
            kind = getattr(torch, dtype)
            found = footprint.measure(shape, kind, steps, groups, reporter, counted=counted)
        show("Memory", model, "", [footprint.measured_sheet(found)])
