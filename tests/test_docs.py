"""The documentation is true: its examples run, its links lead somewhere, its commands exist.

What the first line of a fenced block says decides what happens to it:

- ``python``        executed in an empty folder that holds the seed facts (``store/seed``); the
                    blocks of one file share a namespace and run in order
- ``python slow``   the same, but only when slow tests are asked for (it trains a model)
- ``python no-run`` compiled only
- ``console``       every ``$ `` line must be a command that exists, with options that exist
- ``console slow``  besides, the lines are run by a shell, in order, in such a folder

Output shown in a console block is for the reader and is not compared.  The log is history: its
links are checked, its commands are those of their day.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import click
import pytest
from packaging.requirements import Requirement

import kvedit
from kvedit.cli import cli
from kvedit.config import Config
from kvedit.store.migrations import schema_sql
from tests.docs import picture, results

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("store/*.md"),
        *ROOT.glob("kvedit/data/**/*.md"),
    ]
)
LOG = ROOT / "docs" / "log"
CURRENT = [page for page in PAGES if page.parent != LOG]
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)\s*$", re.M | re.S)
TAGS = {"slow", "no-run"}
LAUNCHERS = ("accelerate", "torchrun")  # ... -m kvedit COMMAND
PLAIN_COMMANDS = {
    "cat", "cd", "cp", "curl", "echo", "git", "ls", "mkdir", "pip", "printf", "sqlite3",
    "transformers",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its tags, its text and the line where the text begins."""

    language: str
    tags: frozenset[str]
    text: str
    line: int


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fenced = []
    for match in FENCE.finditer(text):
        words = match["info"].split() or [""]
        line = text.count("\n", 0, match.start("body")) + 1
        fenced.append(Block(words[0], frozenset(words[1:]), match["body"], line))
    return [block for block in fenced if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def shell_lines(block: Block) -> list[str]:
    """The commands of a console block, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def simple_commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, redirections and assignments taken off."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    command: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[|&;]+", word):
            yield command
            command, redirected = [], False
        elif re.fullmatch(r"[<>]+", word):
            redirected = True
        elif redirected:
            redirected = False
        elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
            command.append(word)


def parse_kvedit(words: list[str]) -> None:
    """Parse a kvedit command line as click would, without running it."""
    # With the settings of a real call: click keeps the help option of the first context it sees.
    context = click.Context(cli, info_name="kvedit", **cli.context_settings)
    _, rest, _ = cli.make_parser(context).parse_args(list(words))
    if rest and "--help" not in rest:
        command = cli.get_command(context, rest[0])
        assert command is not None, f"kvedit has no command {rest[0]!r}"
        command.make_context(rest[0], rest[1:], parent=context)


def check_command(words: list[str]) -> None:
    program = words[0]
    if program == "kvedit":
        parse_kvedit(words[1:])
    elif program in LAUNCHERS:
        parse_kvedit(words[words.index("-m") + 2 :])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no target {target}"
    elif Path(program).name.startswith("python"):
        if words[1:2] == ["-m"] and words[2].split(".")[0] in ("kvedit", "tests"):
            path = ROOT / words[2].replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), words[2]
    else:
        assert program in PLAIN_COMMANDS, f"unknown program {program!r}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that looks like a fresh checkout as far as the store goes."""
    shutil.copytree(ROOT / "store" / "seed", tmp_path / "store" / "seed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    return tmp_path


def run_python(page: Path, *, slow: bool) -> None:
    namespace: dict[str, object] = {"__name__": "example"}
    for block in blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if "no-run" not in block.tags and (slow or "slow" not in block.tags):
            exec(code, namespace)  # the point of the test: the example as a reader would run it


def has(page: Path, language: str, tag: str | None) -> bool:
    return any(tag in b.tags if tag else not b.tags & TAGS for b in blocks(page, language))


def test_tags_are_known() -> None:
    for page in PAGES:
        for language in ("python", "console"):
            for block in blocks(page, language):
                assert block.tags <= TAGS, f"{name_of(page)}:{block.line}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_examples(page: Path, folder: Path) -> None:
    run_python(page, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "python", "slow")], ids=name_of)
def test_slow_python_examples(page: Path, folder: Path) -> None:
    run_python(page, slow=True)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "console")], ids=name_of)
def test_console_examples_are_commands_that_exist(page: Path) -> None:
    for block in blocks(page, "console"):
        lines = shell_lines(block)
        assert lines, f"{name_of(page)}:{block.line}: no line begins with '$ '"
        for line in lines:
            for words in filter(None, simple_commands(line)):
                try:
                    check_command(words)
                except click.UsageError as error:
                    pytest.fail(f"{name_of(page)}:{block.line}: {line}: {error.format_message()}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if has(p, "console", "slow")], ids=name_of)
def test_slow_console_examples(page: Path, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    slow = [block for block in blocks(page, "console") if "slow" in block.tags]
    script = "\n".join(["set -e", *(line for block in slow for line in shell_lines(block))])
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_commands_named_in_the_text_exist(page: Path) -> None:
    for span in re.findall(r"`kvedit ([^`\n]+)`", prose(page)):
        words = [word for word in span.split() if not word.startswith("[")]
        if not re.fullmatch(r"[a-z][a-z-]*", words[0] if words else ""):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        for word in words[1:]:
            if not isinstance(command, click.Group):
                break
            command = command.get_command(click.Context(command), word)
        assert command is not None, f"{name_of(page)}: `kvedit {span}`: no such command"
        known = {o for param in command.params for o in (*param.opts, *param.secondary_opts)}
        known.add("--help")
        used = set(re.findall(r"--[a-z-]+", span))
        assert used <= known, f"{name_of(page)}: `kvedit {span}`: no {sorted(used - known)}"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, made the way GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"!?\[[^\]\n]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name_of(page)} links to {target}"
        assert other.is_relative_to(ROOT), f"{name_of(page)} links out of the project: {target}"
        if anchor and other.suffix == ".md":
            assert anchor in slugs(other), f"{name_of(page)} links to {target}"


def test_the_map_names_every_folder_and_nothing_absent() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = re.findall(r"^\| `(kvedit/[a-z]+/)` \|", text, re.M)
    present = [f"kvedit/{path.parent.name}/" for path in ROOT.glob("kvedit/*/__init__.py")]
    assert sorted(folders) == sorted(present)


def test_every_guide_is_reachable_from_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", prose(ROOT / "docs" / "index.md")))
    guides = {p.relative_to(ROOT / "docs").as_posix() for p in ROOT.glob("docs/**/*.md")}
    assert guides - {"index.md"} <= linked


def test_the_schema_file_is_current() -> None:
    written = (ROOT / "store" / "schema.sql").read_text(encoding="utf-8")
    assert written == schema_sql(), "run `make docs`"


def test_the_results_page_is_current() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), "run `make docs`"


def test_the_log_index_names_every_entry() -> None:
    index = (LOG / "index.md").read_text(encoding="utf-8")
    for page in sorted(LOG.glob("2*.md")):
        entries = re.findall(r"^## (.+)$", prose(page), re.M)
        assert entries, f"{name_of(page)} has no entries"
        for title in entries:
            date, _, name = title.partition(": ")
            assert date == page.stem, f"{title} stands in {name_of(page)}"
            assert f"- [{name}]({page.name}#" in index, f"{title} is not in docs/log/index.md"


def test_the_picture_shows_the_commands_that_were_run() -> None:
    drawing = ElementTree.fromstring(picture.PICTURE.read_text(encoding="utf-8"))
    shown = re.sub(r"\s+", " ", " ".join(drawing.itertext()))
    for command in picture.COMMANDS:
        assert f"$ {command}" in shown, "run `make picture`"


def test_the_python_page_names_what_the_package_exports() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    paths = re.findall(r"^::: ([\w.]+)$", text, re.M)
    for path in paths:
        module, _, name = path.rpartition(".")
        assert getattr(kvedit, name) is getattr(import_module(module), name), path
    exported = {name for name in kvedit.__all__ if not name.startswith("_")}
    assert {path.rpartition(".")[2] for path in paths} == exported


@pytest.mark.parametrize("page", [p for p in CURRENT if blocks(p, "toml")], ids=name_of)
def test_settings_in_the_text_are_taken(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        file = tmp_path / "kvedit.toml"
        file.write_text(block.text, encoding="utf-8")
        Config.load(file)


def test_no_page_names_a_folder_outside_the_project() -> None:
    assert [name_of(page) for page in CURRENT if "../shared" in page.read_text("utf-8")] == []


def test_the_lock_of_the_site_has_what_its_extra_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "docs" / "requirements.lock").read_text(encoding="utf-8").split()
    pins = dict(line.split("==") for line in lines)
    for need in map(Requirement, project["optional-dependencies"]["docs"]):
        assert need.specifier.contains(pins[need.name]), need
