"""The command group: help, imports, errors and exit codes."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvedit
from kvedit.cli import cli
from kvedit.errors import CorruptStoreError, LockedError, ModelMismatchError, StoreTooNewError
from tests.cli.cli_fakes import ROOT, FakeBase, run
from tests.docs.cli_page import page

# --- the group -------------------------------------------------------------------------------


def test_help_names_every_command_of_the_design() -> None:
    text = run("--help").stdout
    names = (
        "init", "add", "ingest", "update", "remove", "ask", "chat", "verify", "list", "show",
        "similar", "history", "status", "rollback", "doctor", "backup", "export",
    )  # fmt: skip
    for name in names:
        assert f"\n  {name} " in text


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_an_example(name: str) -> None:
    text = run(name, "--help").stdout
    assert "Examples:\n    kvedit" in text or "Examples:\n    echo" in text


def test_version() -> None:
    assert run("--version").stdout == f"kvedit {kvedit.__version__}\n"


def test_command_bodies_are_thin() -> None:
    for path in (ROOT / "kvedit" / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                "command" in ast.unparse(mark) for mark in node.decorator_list
            ):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert lines < 20, f"{path.name}: {node.name} has {lines} lines"


def test_the_reference_page_is_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.docs.cli_page docs/cli.md"


def test_the_reference_page_does_not_depend_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = page()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("KVEDIT_STORE", "/elsewhere")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert page() == expected


# --- what is imported ------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "peft")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "kvedit", "ingest", "-"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write('{"key": "a", "description": "b"}\n' * 20_000)  # more than a pipe holds
        process.stdin.flush()  # so the command is reading it
        process.send_signal(number)
        messages = process.stderr.read()
        assert process.wait(30) == 130, messages
    assert "interrupted" in messages


def in_new_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder from which this kvedit can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command = [sys.executable, *words]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=cwd, env=environment, check=False
    )


def imported_by(*words: str, cwd: Path) -> tuple[int, set[str]]:
    """Run a command in a new process; its exit code and the modules it loaded."""
    code = (
        "import sys\nfrom kvedit.cli import cli\n"
        f"try: cli({list(words)!r}, prog_name='kvedit')\n"
        "except SystemExit as done: code = done.code or 0\n"
        "print('\\n', code, *sorted(sys.modules))"
    )
    done = in_new_process("-c", code, cwd=cwd)
    status, *modules = done.stdout.splitlines()[-1].split()
    return int(status), set(modules)


def test_help_loads_next_to_nothing(tmp_path: Path) -> None:
    status, modules = imported_by("--help", cwd=tmp_path)
    assert status == 0
    assert modules.isdisjoint({*HEAVY, "rich", "sqlite_utils", "opencc", "rapidfuzz", "sqlite3"})


def test_help_is_quick(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy with something else
        start = time.perf_counter()
        assert in_new_process("-m", "kvedit", "--help", cwd=tmp_path).returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.6


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "Porto"),
        ("history",),
        ("status",),
        ("similar", "porto"),
        ("backup", "copy.tar"),
        ("doctor", "--quick"),
    ],
    ids=lambda words: words[0],
)
def test_commands_that_read_load_no_torch(filled: Path, words: tuple[str, ...]) -> None:
    status, modules = imported_by(*words, cwd=filled.parent)
    assert status == 0
    assert modules.isdisjoint(HEAVY)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = in_new_process("-m", "kvedit", "list", cwd=tmp_path)
    assert done.returncode == 10
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "words", [("verify",), ("ask", "x"), ("update", "k", "--text", "t"), ("remove", "k")]
)
def test_a_missing_store_is_reported_without_loading_torch(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    status, modules = imported_by(*words, cwd=tmp_path)
    assert status == 10
    assert modules.isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LockedError("the store is locked", hint="wait"), 11),
        (StoreTooNewError("too new", hint="upgrade"), 12),
        (ModelMismatchError("another model", hint="use --model"), 13),
        (CorruptStoreError("half written", hint="kvedit doctor"), 1),
        (PermissionError(13, "Permission denied", "deltas"), 1),
        (RuntimeError("boom"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_exit_codes_without_a_traceback(
    filled: Path, fake: type[FakeBase], error: BaseException, code: int
) -> None:
    fake.error = error
    result = run("add", "x", "--text", "y")
    assert result.exit_code == code
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert getattr(error, "hint", "") in result.stderr
    assert "Traceback" not in result.stderr
    debug = run("-vv", "add", "x", "--text", "y")
    assert debug.exit_code == code
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("Run `kvedit doctor`.", "Run `kvedit --store 'my store' doctor`."),
        ("To change it: kvedit update x FILE", ": kvedit --store 'my store' update x FILE"),
        ("or make a new store with kvedit init.", "or make a new store with kvedit init."),
        ("kvedit reads JSON.", "kvedit reads JSON."),
    ],
)
def test_hints_name_the_store_that_was_named(
    filled: Path, fake: type[FakeBase], hint: str, expected: str
) -> None:
    filled.rename(filled.with_name("my store"))
    fake.error = CorruptStoreError("broken", hint=hint)
    result = run("--store", "my store", "add", "x", "--text", "y")
    assert expected in result.stderr


def test_a_store_of_another_program_version_is_refused(filled: Path) -> None:
    import sqlite3

    with sqlite3.connect(filled / "kvedit.db") as database:
        database.execute("PRAGMA user_version = 999")
    result = run("list")
    assert result.exit_code == 12
    assert result.stdout == ""
