"""erase and prune: both say beforehand what will no longer be possible, and ask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvedit.events import Score
from kvedit.store.store import Store
from tests.cli.cli_fakes import FakeBase, run
from tests.store_steps import add, checkpoint, committed_texts, new_store


def test_a_dry_run_says_what_would_be_lost_and_changes_nothing(filled: Path) -> None:
    done = run("erase", "Porto", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "gets the weights of revision 1, which has all other facts" in done.stdout
    assert "restored or asked: revision 2" in done.stdout
    assert "restored or asked: revisions 0-1" in done.stdout
    assert "backups, exports and input files" in done.stdout
    assert done.stdout.endswith("nothing was changed\n")
    assert FakeBase.last is None
    document = json.loads(run("erase", "Porto", "--dry-run", "--json").stdout)
    assert (document["restores"], document["lost"], document["kept"]) == (1, [2], [0, 1])


def test_retraining_is_announced(filled: Path) -> None:
    done = run("erase", "情爐", "--dry-run")
    assert "is trained again from the base model with 1 other fact" in done.stdout


@pytest.mark.parametrize("words", [("erase", "Porto"), ("prune", "--before", "3")])
def test_a_script_has_to_say_yes(words: tuple[str, ...], tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        for key in ("one", "two", "Porto"):
            add(store, key)
        checkpoint(store)
    done = run(*words)
    assert done.exit_code == 2 and "--yes" in done.stderr
    assert "no longer" in done.stderr  # it is announced all the same
    assert FakeBase.last is None


def test_a_person_is_asked(
    filled: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeBase]
) -> None:
    monkeypatch.setattr("kvedit.cli.commands.erase._on_terminal", lambda: True)
    done = run("erase", "Porto", stdin="n\n")
    assert done.exit_code == 0 and "nothing was changed" in done.stderr
    assert fake.last is None
    done = run("erase", "Porto", stdin="y\n")
    assert done.exit_code == 0, done.stderr
    assert fake.last is not None and fake.last.calls == [("erase", ("Porto",), False)]
    assert "committed erase 1 fact: revision 3" in done.stdout
    assert done.stderr.endswith("next: kvedit verify\n")


def test_what_an_erasure_lost_is_to_be_repaired(filled: Path, fake: type[FakeBase]) -> None:
    fake.report = replace(fake.report, retention=Score(1, 2))
    done = run("erase", "Porto", "--yes", "--force")
    assert done.stderr.endswith("next: kvedit verify --repair\n")


def test_with_yes_and_json_the_plan_is_the_first_line(filled: Path) -> None:
    done = run("erase", "Porto", "--yes", "--force", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["message_type"] for line in lines] == ["plan", "edit", "summary"]
    assert lines[0]["keys"] == ["Porto"] and lines[-1]["kind"] == "erase"
    assert FakeBase.last is not None and FakeBase.last.calls == [("erase", ("Porto",), True)]


def test_an_unknown_key_is_reported_before_the_model_is_loaded(filled: Path) -> None:
    done = run("erase", "Port", "--yes")
    assert done.exit_code == 1 and "Porto" in done.stderr
    assert FakeBase.last is None


def test_pruning_announces_and_reports(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        for number in range(4):
            add(store, f"fact {number}")
    dry = run("prune", "--before", "3", "--dry-run")
    assert "the deltas of 3 revisions" in dry.stdout and "checkpoint of revision 3" in dry.stdout
    assert "restored or asked: revisions 1-2" in dry.stdout
    document = json.loads(run("prune", "--before", "3", "--dry-run", "--json").stdout)
    assert document["dropped"] == [1, 2, 3]
    done = run("prune", "--before", "3", "--yes")
    assert done.exit_code == 0 and "dropped 3 deltas" in done.stdout
    done = run("prune", "--before", "9", "--yes")
    assert done.exit_code == 2 and "no revision 9" in done.stderr
    assert "all are needed" in run("prune", "--before", "1", "--yes").stderr


def test_what_is_gone_is_said_by_other_commands(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        for number in range(4):
            add(store, f"fact {number}")
        checkpoint(store)
        store.mark_pruned(store.prune_plan(4).dropped)
        store.recover()
    for words in (("rollback", "2"), ("ask", "What?", "--at", "2")):
        done = run(*words)
        assert done.exit_code == 2 and "revision 2 can no longer be restored" in done.stderr
        assert "Still there: 0, 4" in done.stderr
    assert FakeBase.last is None
    assert "can no longer be restored: pruned" in run("history").stdout
    assert "3 pruned" in run("status").stdout
    assert json.loads(run("status", "--json").stdout)["gone"] == {"pruned": 3}
    assert json.loads(run("history", "--json").stdout)[-1]["gone"] == "pruned"
    with Store.open(tmp_path / "store", readonly=True) as store:
        assert len(committed_texts(store)) == 4
