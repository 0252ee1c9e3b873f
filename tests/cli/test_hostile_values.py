"""Every option and argument of every command with values that nobody should give.

The commands and their parameters are found by introspection, so a new option is tried as well.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from kvedit import paths
from kvedit.cli import cli
from kvedit.cli.commands import bench
from kvedit.ingest.report import IngestReport
from tests.cli.cli_fakes import run

SECONDS = 20  # that no command may take, whatever it is given
SIGNS = ("", " ", "\udcff", "\x1b[31m", "\u202e", "-1", "--", "{{ x }}", "a" * 5000, "\U0001f600")
NUMBERS = ("0", "-1", "9" * 23, "9" * 400, "9" * 5000, "1e999", "nan", "inf", "٣", "0x10", "1.5")
TIMES = ("9" * 400, "9" * 5000 + "h", f"{'9' * 9}h{'9' * 9}m{'9' * 9}s", "-1", "nan", "1h1h")
PATHS = (
    "pipe", "/dev/zero", "/dev/full", "/dev/null", "folder", "no/such/file", "f" * 300,
    "f/" * 3000, "loop", "binary", "\udcff", "~nobody-of-that-name/x", "kvedit.toml",
)  # fmt: skip
HOSTILE = tuple(dict.fromkeys((*SIGNS, *NUMBERS, *TIMES, *PATHS)))
NEEDED = {"key": "Porto", "revision": "0", "prompt": "What?", "text": "Porto", "file": "fact.txt"}
"""What the other arguments of a command get, by their names; any other gets a file of facts."""


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[Any]:
    """Every command that does something, with the words that call it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, one in inner.items():
        yield from leaves(one, (*words, name))


COMMANDS = dict(leaves(cli))
PARAMETERS = [
    (words, parameter)
    for words, command in COMMANDS.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False)
]


def name_of(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(getattr(value, "name", value))


@pytest.fixture
def place(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a store and with files of every unpleasant kind, in which nothing is slow."""
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("binary").write_bytes(bytes(range(256)))
    Path("kvedit.toml").write_text("[training]\nseed = 1\n", encoding="utf-8")
    Path("fact.txt").write_text("A text.", encoding="utf-8")
    Path("facts.jsonl").write_text('{"key": "Faro", "description": "A town."}\n', encoding="utf-8")
    monkeypatch.setattr(paths, "PIPE_SECONDS", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = SimpleNamespace(passed=True)
    monkeypatch.setattr(bench, "_run", lambda *_: done)  # measures for minutes
    monkeypatch.setattr("kvedit.ingest.run.ingest", lambda *_: IngestReport(outcomes=()))
    return filled


@contextmanager
def in_time(what: object) -> Iterator[None]:
    """Fail if it takes too long: a test that hangs says nothing."""

    def too_long(*_: object) -> None:
        pytest.fail(f"more than {SECONDS} s: {what!r:.300}")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command_line(words: tuple[str, ...], parameter: click.Parameter, value: str) -> list[str]:
    """A call of a command with one hostile value; whatever else it needs is sound."""
    line, arguments = list(words), []
    for other in COMMANDS[words].params:
        if isinstance(other, click.Argument):
            given = value if other is parameter else NEEDED.get(str(other.name), "facts.jsonl")
            if other is parameter or other.required:
                arguments.append(given)
    if isinstance(parameter, click.Option):
        line.append(f"{parameter.opts[0]}={value}")
    return [*line, "--", *arguments]


def judge(words: list[str], result: Any) -> None:
    """An answer or an error that says what is wrong; never a defect."""
    shown = f"{words!r:.300}\n{result.stderr[-2000:]}"
    assert "unexpected" not in result.stderr, shown
    assert result.exception is None or isinstance(result.exception, SystemExit), shown
    assert result.exit_code in (0, 1, 2, 3, 4, 10, 11, 13), shown
    assert result.exit_code == 0 or result.stderr.strip(), shown


@pytest.mark.parametrize("words,parameter", PARAMETERS, ids=name_of)
def test_no_value_of_a_parameter_is_called_a_defect(
    words: tuple[str, ...], parameter: click.Parameter, place: Path
) -> None:
    for value in HOSTILE:
        line = command_line(words, parameter, value)
        with in_time(line):
            judge(line, run(*line))


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: f"{value!r:.30}")
def test_no_path_of_a_store_is_called_a_defect(value: str, place: Path) -> None:
    for words in (["list"], ["status", "--json"], ["add", "Faro", "--text", "A town."]):
        line = [f"--store={value}", *words]
        with in_time(line):
            judge(line, run(*line))


@pytest.mark.parametrize("words", COMMANDS, ids=name_of)
def test_an_error_with_json_is_a_json_line(words: tuple[str, ...], place: Path) -> None:
    if not any("--json" in parameter.opts for parameter in COMMANDS[words].params):
        pytest.skip("writes no JSON")
    for line in ([*words, "--no-such-option", "--json"], ["--store=nowhere", *words, "--json"]):
        result = run(*line)
        if result.exit_code:
            last = json.loads(result.stdout.splitlines()[-1])
            assert last["exit_code"] == result.exit_code
            assert last["message_type"] in ("error", "summary") and last["message"]
