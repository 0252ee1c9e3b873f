"""What reaches a terminal: no control character, no colour that is not wanted, no line too wide."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len

from kvedit.cli import cli
from kvedit.cli.output import clean, json_text, print_parts, table
from kvedit.errors import KveditError
from kvedit.events import Status, Warning_
from kvedit.store.rows import Finding
from tests.cli.cli_fakes import COMMITTED, LOST, REJECTED, FakeBase, run

EVIL = "\x1b]0;x\x07\x9b31m\x08\u202e\u2066\u200f\u061c\u200ex\u2028y\U000e0041"
STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\U000e0000-\U000e007f]"
)


@pytest.fixture
def hostile(filled: Path) -> Path:
    """A store all of whose texts try to steer the terminal."""
    texts = {
        "facts": ("key", "description", "source"), "edits": ("reasons", "report", "config"),
        "probe_results": ("prompt", "expected", "answer"), "meta": ("value",),
    }  # fmt: skip
    with sqlite3.connect(filled / "kvedit.db") as db:
        db.execute("UPDATE facts SET key = key || ?, description = ?, source = ?", [EVIL] * 3)
        db.execute("UPDATE edits SET reasons = ?", [json.dumps([EVIL])])
        db.execute("UPDATE probe_results SET prompt = ?, expected = ?, answer = ?", [EVIL] * 3)
        db.execute("UPDATE meta SET value = ? WHERE name IN ('model_name', 'dtype')", [EVIL])
    assert texts
    return filled


def shown(*words: str, **options: object) -> str:
    result: Result = CliRunner().invoke(cli, words, prog_name="kvedit", **options)  # type: ignore[arg-type]
    return result.output


READING = [
    ("list",), ("list", "--json"), ("list", "--state", "all"), ("history",), ("history", "--json"),
    ("status",), ("status", "--json"), ("similar", "Porto", "--threshold", "1"), ("show", "情爐"),
    ("show", "情爐", "--json"), ("show", EVIL[8:]), ("doctor",), ("doctor", "--json"),
    ("similar", EVIL), (EVIL,), ("list", f"--{EVIL}"), ("ingest", EVIL), ("--store", EVIL, "list"),
    ("add", "x", EVIL), ("rollback", EVIL), ("list", "--state", EVIL), ("ask", ""),
]  # fmt: skip


@pytest.mark.parametrize("words", READING, ids=lambda words: " ".join(map(ascii, words))[:30])
def test_no_text_of_a_store_or_a_command_line_reaches_the_terminal_raw(
    hostile: Path, words: tuple[str, ...]
) -> None:
    for more in ((), ("-vv",)):
        text = shown(*more, *words)
        assert text and not STEERS.search(text), ascii(text)


@pytest.mark.parametrize("flag", [(), ("--json",)])
@pytest.mark.parametrize("report", [COMMITTED, REJECTED])
def test_edits_answers_and_events(
    filled: Path, fake: type[FakeBase], flag: tuple[str, ...], report: object
) -> None:
    fake.report = replace(  # type: ignore[misc]
        report,
        key=EVIL,
        reasons=(EVIL,),
        broke=(EVIL,),
        text_before=EVIL,
        text_after=EVIL,  # type: ignore[type-var]
    )
    fake.events = (Warning_(text=EVIL), Status(phase=EVIL, key=EVIL, text=EVIL))  # type: ignore[misc]
    fake.findings = (Finding(level="error", what=EVIL, hint=EVIL),)  # type: ignore[misc]
    fake.verified = replace_checks()  # type: ignore[misc]
    words = [("add", "lamp", "--text", EVIL[:0] + "x"), ("update", "Porto", "--text", "y"),
             ("remove", "Porto"), ("ask", EVIL), ("verify",), ("doctor",), ("rollback", "0"),
             ("ask", EVIL, "--compare-base")]  # fmt: skip
    for command in words:
        text = shown(*command, *flag)
        assert text and not STEERS.search(text), (command, ascii(text))
    assert not STEERS.search(shown("chat", input=f"{EVIL[10:]}\n"))


def replace_checks() -> object:
    return LOST._replace(checks=tuple(replace(one, key=EVIL) for one in LOST.checks))


def test_errors_log_lines_and_tracebacks(
    filled: Path, fake: type[FakeBase], capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (KveditError(EVIL, hint=EVIL), RuntimeError(EVIL)):
        fake.error = error  # type: ignore[misc]
        assert not STEERS.search(shown("-vv", "remove", "Porto"))
    shown("list")
    handler = logging.getLogger().handlers[0]
    record = logging.LogRecord("kvedit", logging.WARNING, "x", 1, EVIL, None, None)
    assert not STEERS.search(handler.format(record))


def test_json_keeps_its_meaning() -> None:
    assert json.loads(json_text({"a": EVIL + "夢"})) == {"a": EVIL + "夢"}
    assert "夢" in json_text("夢")
    assert clean("a\nb\tc\u200d夢") == "a\nb\tc\u200d夢"


def test_no_color_means_none(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("remove", "nothing")
    coloured = CliRunner().invoke(cli, words, color=True)
    assert "\x1b[" in coloured.output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(cli, words, color=True).output
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[" in CliRunner().invoke(cli, words, color=True).output


NARROW = [
    ("list",), ("list", "--state", "all"), ("history",), ("status",), ("show", "Porto"),
    ("show", "夢中情爐"), ("similar", "Porto", "--threshold", "1"), ("doctor",), ("verify",),
    ("remove", "Porto"), ("ask", "What is it? " * 9, "--compare-base"),
]  # fmt: skip


@pytest.mark.parametrize("words", NARROW, ids=" ".join)
@pytest.mark.parametrize("width", [40, 60])
def test_tables_fit_a_narrow_terminal(
    filled: Path, fake: type[FakeBase], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...],
    width: int,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    fake.verified = LOST  # type: ignore[misc]
    result = run(*words)
    wide = [line for line in result.stdout.splitlines() if cell_len(line) > width]
    assert not wide, result.stdout


def test_long_keys_are_folded_and_not_cut(capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "40")
    print_parts(table(("key", "state", "health", "revision", "description"),
                      [("k" * 90, "committed", "unchecked", 1234, "word " * 30)]))  # fmt: skip
    text = capsys.readouterr().out
    assert text.count("k") == 92 and "description  word word" in text
    assert re.search("^state +committed$", text, re.MULTILINE)
    assert all(cell_len(line) <= 40 for line in text.splitlines())
