"""The schema file is current, and databases of other programs or times are refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlite_utils import Database

from kvedit.errors import CorruptStoreError, StoreTooNewError
from kvedit.store.migrations import FORMAT_VERSION, check_version, migrate, schema_sql

SCHEMA = Path(__file__).parents[2] / "store" / "schema.sql"


def test_the_schema_file_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_sql(), (
        "run: python -m kvedit.store.migrations > store/schema.sql"
    )


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
    with pytest.raises(StoreTooNewError, match="here has format 2; this program reads up to 1"):
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
