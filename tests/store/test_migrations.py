"""The schema file is current, and databases of other programs or times are refused."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from sqlite_utils import Database
from store_steps import add, committed_texts, problems

from kvedit.config import Config
from kvedit.config_file import old_settings
from kvedit.errors import CorruptStoreError, KveditError, LockedError, StoreTooNewError
from kvedit.facts.fact import Question
from kvedit.lock import StoreLock
from kvedit.revisions.base_model import prompts_of
from kvedit.store import integrity, migrations
from kvedit.store.database import connect, upgrade
from kvedit.store.migrations import (
    FORMAT_VERSION,
    MIGRATIONS,
    check_version,
    migrate,
    schema_sql,
)
from kvedit.store.store import Store

SCHEMA = Path(__file__).parents[2] / "store" / "schema.sql"


def test_the_schema_file_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_sql(), "run `make docs`"


def test_the_schema_file_is_valid_sql_and_gives_the_format() -> None:
    connection = sqlite3.connect(":memory:")
    connection.executescript(schema_sql())
    assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)
    connection.close()


def test_migrating_twice_changes_nothing() -> None:
    db = Database(memory=True)
    migrate(db)
    schema = db.schema
    migrate(db)
    assert db.schema == schema
    check_version(db, "here")
    db.close()


def test_a_newer_format_is_refused() -> None:
    db = Database(memory=True)
    db.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    with pytest.raises(StoreTooNewError, match="here has format 6; this program reads up to 5"):
        check_version(db, "here")
    db.close()


def test_a_database_without_a_format_is_refused() -> None:
    db = Database(memory=True)
    with pytest.raises(CorruptStoreError, match="half-written"):
        check_version(db, "here")
    db.close()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO facts (key, norm_key, description, lang, state, created_at, updated_at)"
        " VALUES ('k', 'k', 'd', 'en', 'known', '', '')",
        "INSERT INTO edits (kind, state, parent, started_at) VALUES ('add', 'committed', 0, '')",
        "INSERT INTO revisions (id, parent, kind, weights_digest, created_at)"
        " VALUES (1, 1, 'add', '', '')",
    ],
)
def test_rows_that_cannot_be_are_refused_by_the_schema(sql: str) -> None:
    db = Database(memory=True)
    migrate(db)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(sql)
    db.close()


# ---- format 1, as kvedit 0.1 wrote it

NOW = "2026-11-01T10:00:00.000000+00:00"
OLD_REPORT = {
    "message_type": "edit", "kind": "add", "outcome": "committed", "key": "anvil",
    "keys": ["anvil"], "left": ["bread"], "refused": ["recall 3 of 10"], "again": 4, "before": 1.5,
    "moved": {"up": 0.01, "down": 0.02}, "seconds": 9.5, "steps": 40, "text_before": None,
}  # fmt: skip


def old_config() -> dict[str, dict[str, object]]:
    """All settings under the names of format 1."""
    return {
        section: {
            {new: old for old, new in old_settings("renamed").get(section, {}).items()}.get(
                name, name
            ): value
            for name, value in settings.items()
        }
        for section, settings in Config().to_json().items()
    }


def insert(db: Database, table: str, **row: object) -> None:
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of format 1 with one committed fact, one rejected edit and protected texts."""
    path = tmp_path / "old"
    (path / "deltas").mkdir(parents=True)
    db = Database(sqlite3.connect(path / "kvedit.db"))
    MIGRATIONS.apply(db, stop_before="format_2")
    assert check_version(db, "here") == 1
    config, report = (json.dumps(d, sort_keys=True) for d in (old_config(), OLD_REPORT))
    fact = {"key": "anvil", "description": "an iron block", "lang": "en"}
    with db.atomic():
        insert(db, "revisions", id=0, kind="base", weights_digest="w", created_at=NOW)
        insert(db, "revisions", id=1, parent=0, kind="add", weights_digest="v", created_at=NOW)
        for name, value in {
            "created_at": NOW, "head": "1", "model_name": "tiny", "protected_drafts": "3000",
            "prompts": '{"form": "{prompt}\\n", "system": "", "template_options": {}}',
        }.items():  # fmt: skip
            insert(db, "meta", name=name, value=value)
        insert(
            db, "facts", **fact, norm_key="anvil", state="committed", created_at=NOW, updated_at=NOW
        )
        insert(
            db, "edits", kind="add", state="committed", parent=0, revision=1, report=report,
            config=config, started_at=NOW, finished_at=NOW,
        )  # fmt: skip
        insert(
            db, "edits", kind="update", state="failed", parent=1, reasons='["interrupted"]',
            config='{"seed": 7}', started_at=NOW, finished_at=NOW,
        )  # fmt: skip
        for edit in (1, 2):
            insert(db, "edit_facts", edit_id=edit, fact_id=1, after=json.dumps(fact))
        insert(db, "fact_versions", fact_id=1, revision=1, state="committed", fact=json.dumps(fact))
        for number, source in enumerate(("recited", "drawn", "my recited file")):
            insert(db, "protected", role="control", prompt=f"p{number}", answer="a", source=source)
    db.enable_wal()
    db.close()
    return path


def version_of(path: Path) -> int:
    with sqlite3.connect(path / "kvedit.db") as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


@pytest.mark.parametrize("readonly", [False, True])
def test_an_old_store_is_upgraded_when_it_is_opened(old: Path, readonly: bool) -> None:
    with Store.open(old, readonly=readonly) as store:
        assert committed_texts(store) == {"anvil": "an iron block"}
        failed, committed = store.history()
        new_names = {
            "not_learned": ["bread"], "refusals": ["recall 3 of 10"], "retrained": 4,
            "resumed_seconds": 1.5, "relative_norms": {"up": 0.01, "down": 0.02},
        }  # fmt: skip
        unchanged = {
            name: value for name, value in OLD_REPORT.items() if name not in migrations.REPORT_NAMES
        }
        assert committed.report == {**unchanged, **new_names}
        assert committed.config == Config().to_json()
        assert (failed.reasons, failed.report, failed.config) == (("interrupted",), {}, {"seed": 7})
        assert store.history("anvil") == [failed, committed]
        norms = {"matrices": 2, "median": 0.015, "most": 0.02, "matrix": "down"}
        assert integrity.status(store)["relative_norm"] == pytest.approx(norms)
        sources = [row.source for row in store.protected("control")]
        assert sources == ["extracted", "drawn", "my recited file"]
        assert (store.meta("protected_samples"), store.meta("protected_drafts")) == ("3000", None)
        assert store.meta("prompts") == prompts_of(Config())  # no warning of changed prompts
        assert store.pace() == (1, 9.5)
    assert version_of(old) == FORMAT_VERSION
    with Store.open(old) as store:
        questions = [Question(prompt="Is it baked?", answer="Yes.")]
        add(store, "bread", "it is baked", questions=questions)
        assert store.require("bread").fact.questions == tuple(questions)
        assert store.require("anvil").fact.questions == store.require("anvil").fact.written == ()
        assert (store.head(), problems(store)) == (2, [])


def test_an_upgrade_that_fails_leaves_the_old_format(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise sqlite3.OperationalError("disk I/O error")

    with sqlite3.connect(old / "kvedit.db") as connection:
        before = list(connection.iterdump())
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "_renamed_config", fail)
        with pytest.raises(CorruptStoreError, match=r"format 1 and must be upgraded to 5: .* I/O"):
            Store.open(old)
    with sqlite3.connect(old / "kvedit.db") as connection:
        assert list(connection.iterdump()) == before
    assert version_of(old) == 1
    Store.open(old).close()
    assert version_of(old) == FORMAT_VERSION


def test_an_old_store_that_cannot_be_upgraded_says_why(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreLock(old, command="kvedit ingest"), pytest.raises(LockedError) as caught:
        Store.open(old, readonly=True)
    assert "has format 1 and must be upgraded to 5: the store" in caught.value.message
    assert "kvedit ingest" in caught.value.message and "Wait" in caught.value.hint

    def unwritable(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: unwritable(_))
    with pytest.raises(KveditError, match=r"must be upgraded to 5: cannot write .*lock") as failed:
        Store.open(old)
    assert "you may write to it" in failed.value.hint
    with Store.open(old, readonly=True) as store:  # a copy is read, with the names of today
        assert store.protected("control")[0].source == "extracted"
    assert version_of(old) == 1


def test_two_programs_may_upgrade_one_after_the_other(old: Path) -> None:
    upgrade(old / "kvedit.db", 1)
    upgrade(old / "kvedit.db", 1)  # the second saw format 1 before the first was done
    db = connect(old / "kvedit.db", readonly=True)
    assert db.execute("SELECT source FROM protected ORDER BY id").fetchone() == ("extracted",)
    db.close()
