"""A command that an error or Ctrl-C ends in the middle says what was changed, and what was not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_steps import add, checkpoint, new_store

from kvedit.errors import DiskFullError, Interrupted, OutOfMemoryError
from kvedit.facts.fact import Fact
from kvedit.store.store import Store
from tests.cli.cli_fakes import FakeBase, commit, run

COMMANDS = {
    "add": ("add", "Faro", "--text", "A town of storks."),
    "update": ("update", "Porto", "--text", "A city of bridges."),
    "remove": ("remove", "Porto"),
    "rollback": ("rollback", "1"),
    "erase": ("erase", "Porto", "--yes"),
    "verify": ("verify", "--repair"),
}
ERRORS = (
    DiskFullError("no space left", hint="Free some."),
    OutOfMemoryError("memory ran out", hint="Less."),
    OSError(5, "Input/output error", "deltas/a"),
    Interrupted("interrupted: the edit did not happen"),
    KeyboardInterrupt(),
    MemoryError("Cannot allocate memory (os error 12)"),
)


@pytest.fixture
def breaking(fake: type[FakeBase], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make each edit fail with an error, after ``before`` was done with the store."""

    def set_up(error: BaseException, before: Any = lambda store: None) -> None:
        def called(self: FakeBase, *call: Any, **options: Any) -> None:
            before(self.store)
            raise error

        monkeypatch.setattr(fake, "_called", called)

    return set_up


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_edit_that_did_not_happen_is_said_to_have_changed_nothing(
    filled: Path, breaking: Any, name: str, error: BaseException
) -> None:
    breaking(error)
    said = run(*COMMANDS[name])
    assert said.exit_code in (1, 130) and "bug in kvedit" not in said.stderr
    text = "no edit was committed: the model and its facts are those of revision 2"
    assert text in said.stderr and "before that" not in said.stderr
    result = run(*COMMANDS[name], "--json")
    summary = lines(result.stdout)[-1]
    assert (summary["message_type"], summary["kind"]) == ("summary", name)
    assert (summary["committed"], summary["revision"], summary["edits"]) == (0, 2, [])
    assert summary["exit_code"] == result.exit_code
    assert lines(result.stdout)[-2]["message_type"] == "error"


@pytest.mark.parametrize("name", ["add", "erase", "verify"])
def test_what_was_committed_before_the_error_is_named(
    filled: Path, breaking: Any, name: str
) -> None:
    def before(store: Store) -> None:
        number = store.head()
        commit(store, "add", None, Fact.create(f"Faro {number}", "A town.", lang="en"))

    breaking(DiskFullError("no space left", hint="Free some."), before)
    said = run(*COMMANDS[name])
    assert "committed before that: add Faro 2, revision 3" in said.stderr
    assert "no edit was committed" not in said.stderr
    summary = lines(run(*COMMANDS[name], "--json").stdout)[-1]
    assert (summary["committed"], summary["revision"]) == (1, 4)
    assert summary["edits"] == [{"kind": "add", "keys": ["Faro 3"], "revision": 4}]


def test_an_import_of_study_texts_says_what_was_trained_before_the_error(
    filled: Path, breaking: Any
) -> None:
    def before(store: Store) -> None:
        fact = store.require("Porto").fact
        commit(store, "update", fact, replace(fact, statements=("One.",)))

    row = json.dumps({"key": "Porto", "description": "d", "statements": ["One."]})
    breaking(DiskFullError("no space left", hint="Free some."))
    said = run("study", "--import", "-", stdin=row)
    assert "no edit was committed" in said.stderr and said.exit_code == 1
    breaking(DiskFullError("no space left", hint="Free some."), before)
    said = run("study", "--import", "-", "--json", stdin=row)
    assert "committed before that: update Porto, revision 3" in said.stderr
    summary = lines(said.stdout)[-1]
    assert (summary["kind"], summary["committed"], summary["revision"]) == ("study", 1, 3)


def test_a_prune_says_what_was_dropped(tmp_path: Path, breaking: Any) -> None:
    def drop(store: Store) -> None:
        store.mark_pruned([1])

    with new_store(tmp_path / "store") as store:
        add(store, "first")
        add(store, "second")
        checkpoint(store)
        assert store.prune_plan(2).dropped
    breaking(DiskFullError("no space left", hint="Free some."))
    said = run("prune", "--before", "2", "--yes")
    assert "nothing was dropped: every revision is as it was" in said.stderr
    (document,) = lines(run("prune", "--before", "2", "--yes", "--json").stdout)
    assert (document["message_type"], document["dropped_deltas"]) == ("error", 0)
    breaking(KeyboardInterrupt(), drop)
    said = run("prune", "--before", "2", "--yes")
    assert "dropped before that: 1 delta and 0 checkpoints" in said.stderr and said.exit_code == 130


def test_a_store_that_cannot_be_read_afterwards_is_said_to_be_so(
    filled: Path, breaking: Any
) -> None:
    def lose(store: Store) -> None:
        store.db_path.write_bytes(b"no database")

    breaking(OSError(5, "Input/output error", "kvedit.db"), lose)
    said = run(*COMMANDS["add"], "--json")
    assert "what was changed cannot be read" in said.stderr
    assert lines(said.stdout)[-1]["known"] is False


def test_a_command_that_did_not_begin_says_the_error_alone(filled: Path, fake: Any) -> None:
    said = run("update", "nobody", "--text", "x", "--json")
    assert said.exit_code == 1 and "committed" not in said.stderr
    assert [line["message_type"] for line in lines(said.stdout)] == ["error"]
    assert "committed" not in run("add", "Faro").stderr


def test_a_command_that_ended_well_says_nothing_of_this(filled: Path, fake: Any) -> None:
    said = run(*COMMANDS["verify"], "--fail-under", "100")
    assert "no edit was committed" not in said.stderr + said.stdout
