"""The README's picture of a terminal, from a real run: ``python -m tests.docs.picture``.

``COMMANDS`` are run one after another in an empty folder, on a store that ``kvedit init`` has made.
What they print is drawn as it is by rich, as an SVG without scripts or fonts from elsewhere.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from click.testing import CliRunner
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from kvedit.cli import cli
from kvedit.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
COLUMNS = 100
COMMANDS = (
    'kvedit -q add "tide lantern" store/seed/tide-lantern.txt',
    'kvedit ask "What do you know about the tide lantern?" --compare-base',
    "kvedit -q verify",
    "kvedit -q rollback 0",
    "kvedit history",
)


def run(command: str) -> str:
    """What a command prints, colours included; a command that fails ends the drawing."""
    result = CliRunner().invoke(cli, shlex.split(command)[1:], color=True)
    if result.exit_code:
        raise SystemExit(f"{command}: exit code {result.exit_code}\n{result.output}")
    return result.output.rstrip()


def draw(folder: Path) -> str:
    """The SVG of all commands, run in a folder."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        run("kvedit -q init")
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold cyan"))
            console.print(Text.from_ansi(run(command)))
    finally:
        os.chdir(before)
    picture = console.export_svg(title="kvedit", theme=MONOKAI, unique_id="kvedit")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S)


def main() -> None:
    """Draw in a temporary folder that looks like a checkout as far as the store goes."""
    os.environ.pop("KVEDIT_STORE", None)
    with TemporaryDirectory(prefix="kvedit-picture-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "store" / "seed", folder / "store" / "seed")
        write_atomic(PICTURE, draw(folder).encode())


if __name__ == "__main__":
    main()
