"""Commands about a store's base model: init makes a store for one, trust allows its code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvedit.cli import parameters
from kvedit.cli.common import Settings, next_step
from kvedit.cli.output import print_parts
from kvedit.cli.progress import make_reporter

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase


@click.command()
@click.option("--model", metavar="NAME_OR_DIR",
              help="Base model: a folder or a hub name. [the embedded one]")  # fmt: skip
@click.option("--revision", metavar="SHA", help="Commit of the model on the hub.")
@click.option("--trust-remote-code", is_flag=True,
              help="Run the model's own Python code, also later and on this machine only. Read it"
              " first.")  # fmt: skip
@click.option("--protect-file", metavar="FILE", type=parameters.INPUT_FILE,
              help="Text of your own that edits must not change, besides what the model knows"
              " already.")  # fmt: skip
@click.option("--targets", metavar="NAMES", default="",
              help="Linear layers that edits may change, with commas: last names such as"
              " q_proj,v_proj, or patterns such as 'model.layers.*.mlp.down_proj'."
              " [those of the model's family]")  # fmt: skip
@click.option("--device-map", default="", metavar="MAP",
              help="Spread the model over devices: auto, balanced, sequential, a device, or a JSON"
              " file of devices by module. [one device]")  # fmt: skip
@click.option("--load-in", type=click.Choice(["4bit", "8bit"]),
              help="Quantize the weights that no edit changes (needs bitsandbytes)."
              " [as they are stored]")  # fmt: skip
@click.option("--time", callback=parameters.seconds, metavar="TIME",
              help="How long to ask the model what it knows, besides loading it: 90s, 2m or 1h;"
              " what does not fit is done after later edits. [2m]")  # fmt: skip
@click.option("--ignore-memory", is_flag=True,
              help="Go on even if the model seems too large to be edited.")  # fmt: skip
@click.pass_obj
def init(settings: Settings, /, model: str | None, targets: str, load_in: str | None,
         ignore_memory: bool, **options: Any) -> None:  # fmt: skip
    """Create a store for a base model.

    The store keeps a fingerprint of the model's files and opens only with the same model. Without
    --model it is made for the small model that comes with kvedit, which needs no download. If it is
    interrupted, the same command goes on where it was.

    \b
    Examples:
      kvedit init
      kvedit --store poems init --model ./my-model
      kvedit init --model Qwen/Qwen2.5-0.5B-Instruct --revision 7ae5576
      kvedit init --model ./my-model --targets o_proj,down_proj
      kvedit init --model ./large-model --device-map auto
      kvedit init --protect-file handbook.txt
      kvedit init --model ./my-model --time 10m
    """
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.model.devices import choose_threads
    from kvedit.store.store import resolve_store

    choose_threads()
    path = resolve_store(settings.store)
    options["targets"] = [name.strip() for name in targets.split(",") if name.strip()]
    options |= {"load_in": load_in or "", "check_memory": not ignore_memory}
    with (make_reporter(quiet=settings.quiet) as reporter,
          KnowledgeBase.create(path, model, on_event=reporter, **options) as base):  # fmt: skip
        said, lines = _created(base), base.example_lines()
    print_parts(*said)
    print_parts(*lines, indent=2)
    next_step(settings, "add", "KEY", "FILE")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def trust(settings: Settings, yes: bool) -> None:
    """Allow the own Python code of the store's model to run on this machine.

    A store cannot allow it: whoever made the store could. The model must be the one that the store
    was made for. Its Python files are listed; read them first. The consent is kept in your settings
    folder ($KVEDIT_CONFIG_DIR, else ~/.config/kvedit) and holds for this code only: delete its file
    to take it back. No code is run by this command.

    \b
    Examples:
      kvedit trust
      kvedit --store poems trust --yes
    """
    from kvedit.revisions import base_model
    from kvedit.store.store import Store, resolve_store

    with Store.open(resolve_store(settings.store)) as store:
        source = base_model.source_of(store)
        base_model.require_same(store, source, in_full=True)
        files = [str(path) for path in base_model.code_files(source)]
        print_parts(
            f"the model at {source} brings this code:", *(files or ["no Python files here"])
        )
        if not yes:
            click.confirm("Run it on this machine, with your rights?", abort=True, err=True)
        print_parts(f"allowed; to take it back, delete {base_model.allow_code(store)}")


def _created(base: KnowledgeBase) -> list[str]:
    """What the new store has, before the example of how facts are trained and asked in it."""
    from kvedit.store import integrity

    status = integrity.status(base.store)
    return [
        f"created the store {base.store.path} for the model {status['model_name']}",
        f"protected: {status['protected']} texts, {status['locality_probes']} of them locality"
        " probes",
        "facts are trained and asked like this (see [prompts] in kvedit.toml):",
    ]
