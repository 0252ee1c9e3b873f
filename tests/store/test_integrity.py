"""Status and integrity."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from store_steps import add, check, fact, new_store, problems, remove

from kvedit.files import write_manifest
from kvedit.store import integrity
from kvedit.store.rows import FactChange
from kvedit.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = new_store(tmp_path / "s")
    add(store, "a")
    add(store, "b")
    folder = store.checkpoint_path(2)
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"w")
    store.add_checkpoint(2, folder, write_manifest(folder))
    return store


def test_status_counts(store: Store) -> None:
    remove(store, "b")
    store.put_pending(fact("c"))
    store.record_results([check(store.require("a").id, passed=False)], store.head())
    status = integrity.status(store)
    assert (status["head"], status["revisions"], status["checkpoints"]) == (3, 3, 1)
    assert status["facts"] == {"committed": 1, "removed": 1, "pending": 1}
    assert status["health"] == {"regressed": 1}
    assert status["edits"] == {"committed": 3}
    assert (status["model_name"], status["model_fingerprint"]) == ("tiny", "base-digest")
    sizes = status["bytes"]
    assert isinstance(sizes, dict)
    assert sizes["deltas"] == sum(path.stat().st_size for path in store.deltas.iterdir()) > 0
    assert sizes["database"] > 0
    assert sizes["cache"] == 0


def test_status_reports_training_that_can_be_resumed(store: Store) -> None:
    assert integrity.status(store)["unfinished_at"] is None
    store.cache.mkdir()
    (store.cache / "training-5-0123456789abcdef.safetensors").write_bytes(b"kept")
    kept = integrity.status(store)["unfinished_at"]
    assert isinstance(kept, str)
    assert datetime.now(UTC) - datetime.fromisoformat(kept) < timedelta(minutes=1)


def test_a_training_checkpoint_of_an_older_version_is_a_leftover(store: Store) -> None:
    store.cache.mkdir()
    old = store.cache / "lesson-4-0123456789abcdef.pt"
    old.write_bytes(b"kept")
    assert integrity.status(store)["unfinished_at"] is None
    assert problems(store) == [f"a file that nothing needs: {old}"]
    store.recover()
    assert not old.exists()


def test_status_reports_the_norm_of_the_accumulated_deltas(store: Store, tmp_path: Path) -> None:
    norms = {"matrices": 2, "median": 0.03, "most": 0.04, "matrix": "down"}
    assert integrity.status(store)["relative_norm"] == pytest.approx(norms)
    assert integrity.status(new_store(tmp_path / "empty"))["relative_norm"] is None


def test_a_sound_store_has_no_problem_and_lists_what_was_checked(store: Store) -> None:
    assert problems(store) == []
    assert len(integrity.check(store)) == 8


def test_a_missing_or_altered_delta_is_an_error(store: Store) -> None:
    first, second = (store.delta_path(str(row.delta)) for row in store.lineage(2))
    first.unlink()
    second.write_bytes(b"other")
    errors = [finding for finding in integrity.check(store) if finding.level == "error"]
    assert [error.what for error in errors] == [
        f"the delta of revision 1 is missing: {first}",
        f"the delta of revision 2 was altered: {second}",
    ]
    assert all(error.hint for error in errors)
    assert len([f for f in integrity.check(store, deep=False) if f.level == "error"]) == 1


def test_a_damaged_or_missing_checkpoint_is_a_warning(store: Store) -> None:
    weights = store.checkpoint_path(2) / "weights.safetensors"
    weights.write_bytes(b"x")
    (finding,) = [f for f in integrity.check(store) if f.level != "ok"]
    assert finding.level == "warning"
    assert "checkpoint of revision 2 is damaged" in finding.what
    weights.unlink()
    (weights.parent / "manifest.json").unlink()
    weights.parent.rmdir()
    assert "checkpoint of revision 2 is missing" in problems(store)[0]


def test_leftovers_are_warnings_until_recovery(store: Store) -> None:
    new = fact("c")
    store.plan_edit("add", [FactChange(store.put_pending(new), None, new)], {})
    (store.deltas / ".tmp-half").write_bytes(b"")
    leftovers = problems(store)
    assert leftovers[0] == "edit 3 (add) was not ended"
    assert ".tmp-half" in leftovers[1]
    store.recover()
    assert problems(store) == []


def test_a_head_that_does_not_exist_is_an_error(store: Store) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("UPDATE meta SET value = '9' WHERE name = 'head'")
    assert "the head, revision 9, does not exist" in problems(store)
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("UPDATE meta SET value = '1' WHERE name = 'head'")
    assert "revisions beyond the head, 1, exist" in problems(store)


def test_a_reference_to_nothing_is_an_error(store: Store) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("INSERT INTO prior_answers VALUES (99, 'p', 'a')")
    assert problems(store) == ["database: a row of prior_answers names a missing row of facts"]


@pytest.mark.parametrize("column", ["description", "lang", "aliases", "source"])
def test_a_changed_part_of_a_fact_is_found_by_its_history(store: Store, column: str) -> None:
    value = {"lang": "zh-Hans", "aliases": '["x"]'}.get(column, "some texts")
    with sqlite3.connect(store.db_path) as connection:
        connection.execute(f"UPDATE facts SET {column} = ? WHERE key = 'a'", [value])
    (finding,) = [one for one in integrity.check(store) if one.level != "ok"]
    assert finding.what == f"{column} of the fact a is not what the history says"
    assert "doctor --fix" in finding.hint


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE fact_versions SET fact = replace(fact, 'some', 'same') WHERE id = 1",
        "UPDATE edit_facts SET after = replace(after, 'some', 'same') WHERE edit_id = 1",
    ],
)
def test_a_changed_letter_in_the_history_is_found(store: Store, sql: str) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute(sql)
    found = [one for one in integrity.check(store) if one.level != "ok"]
    assert "the text of a at revision 1 is another one in the journal" in found[0].what
    assert not any("--fix" in one.hint for one in found)  # nobody can tell which one is right


@pytest.mark.parametrize(
    ("table", "column"),
    [("facts", "prompts"), ("fact_versions", "fact"), ("edits", "report"), ("edits", "reasons"),
     ("edit_facts", "after")],
)  # fmt: skip
@pytest.mark.parametrize("value", ["{", "7", '"x"', "[" * 100_000, "", "[7]"])
def test_broken_json_is_a_finding_and_the_rest_is_looked_at(
    store: Store, table: str, column: str, value: str
) -> None:
    store.delta_path(str(store.revision(1).delta)).unlink()
    with sqlite3.connect(store.db_path) as connection:
        connection.execute(f"UPDATE {table} SET {column} = ?", [value])
    found = problems(store)
    assert any("JSON" in one or "no text" in one or "is no fact" in one or "must hold" in one
               for one in found)  # fmt: skip
    assert any("the delta of revision 1 is missing" in one for one in found)


def test_broken_settings_are_a_finding(store: Store) -> None:
    (store.path / "kvedit.toml").write_text("[training\n")
    assert ["not valid TOML" in one for one in problems(store)] == [True]


def test_rows_that_no_program_of_ours_writes_are_found(store: Store) -> None:
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE revisions SET parent = 2 WHERE id = 2")
        connection.execute("UPDATE facts SET state = 'odd' WHERE key = 'a'")
    found = " / ".join(problems(store))
    assert "CHECK constraint failed in facts" in found
    assert "revision 2 comes from revision 2, which is not older" in found
