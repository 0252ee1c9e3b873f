"""The database schema of a store, and how an older one is brought up to it.

Invariants:
- ``PRAGMA user_version`` is the format's version; a newer one is refused, never guessed at.
- A released migration is never changed: a change of the schema or of stored names is a new one,
  with a new ``FORMAT_VERSION``.  ``store/schema.sql`` is the result of all of them.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database, Migrations

from kvedit.config_file import old_settings
from kvedit.errors import CorruptStoreError, StoreTooNewError
from kvedit.store.checks.values import from_json
from kvedit.store.rows import to_text

FORMAT_VERSION = 5
MIGRATIONS = Migrations("kvedit")


@MIGRATIONS()
def format_1(db: Database) -> None:
    """The first format."""
    db.executescript(Path(__file__).with_name("format_1.sql").read_text(encoding="utf-8"))
    db.execute("PRAGMA user_version = 1")


REPORT_NAMES = {
    "left": "not_learned", "refused": "refusals", "again": "retrained",
    "before": "resumed_seconds", "moved": "relative_norms",
}  # fmt: skip
"""Fields of an edit's report: the name in format 1, the name since."""


@MIGRATIONS()
def format_2(db: Database) -> None:
    """Names inside values: of report fields, of settings, of where a protected text came from."""
    for edit_id, report, config in db.execute("SELECT id, report, config FROM edits").fetchall():
        db.execute(
            "UPDATE edits SET report = ?, config = ? WHERE id = ?",
            [_renamed_report(report), _renamed_config(config), edit_id],
        )
    db.execute("UPDATE protected SET source = 'extracted' WHERE source = 'recited'")
    db.execute("UPDATE meta SET name = 'protected_samples' WHERE name = 'protected_drafts'")
    for (prompts,) in db.execute("SELECT value FROM meta WHERE name = 'prompts'").fetchall():
        # Compared as text with the settings of today: written as ``base_model.prompts_of`` does.
        names = old_settings("renamed")["prompts"]
        values = from_json(prompts, dict, "the value prompts")
        renamed = json.dumps(_rename(values, names), sort_keys=True)
        db.execute("UPDATE meta SET value = ? WHERE name = 'prompts'", [renamed])
    db.execute("PRAGMA user_version = 2")


@MIGRATIONS()
def format_3(db: Database) -> None:
    """Questions and statements of a fact, and the subject of a relation."""
    for column in ("questions", "statements"):
        db.execute(f"ALTER TABLE facts ADD COLUMN {column} TEXT NOT NULL DEFAULT '[]'")
    for column in ("relation_of", "norm_subject"):
        db.execute(f"ALTER TABLE facts ADD COLUMN {column} TEXT")
    db.execute("CREATE INDEX facts_by_subject ON facts (norm_subject)")
    db.execute("PRAGMA user_version = 3")


_EDITS_4 = """\
CREATE TABLE edits (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL
        CHECK (kind IN ('add', 'update', 'remove', 'repair', 'rollback', 'erase')),
    state TEXT NOT NULL
        CHECK (state IN ('planned', 'trained', 'committed', 'rejected', 'failed', 'canceled')),
    parent INTEGER NOT NULL REFERENCES revisions (id),
    revision INTEGER UNIQUE REFERENCES revisions (id),
    delta TEXT,
    reasons TEXT NOT NULL DEFAULT '[]',
    report TEXT NOT NULL DEFAULT '{}',
    config TEXT NOT NULL DEFAULT '{}',
    started_at TEXT NOT NULL,
    finished_at TEXT,
    CHECK ((state = 'committed') = (revision IS NOT NULL))
)"""


@MIGRATIONS()
def format_4(db: Database) -> None:
    """Edits of the kind ``erase``, and why the delta of a revision is no longer kept."""
    db.execute("PRAGMA defer_foreign_keys = ON")  # other rows name those of the table made again
    db.execute("CREATE TEMP TABLE edits_before AS SELECT * FROM edits")
    db.execute("DROP TABLE edits")
    db.execute(_EDITS_4)
    db.execute("INSERT INTO edits SELECT * FROM edits_before")
    db.execute("DROP TABLE edits_before")
    db.execute("CREATE INDEX edits_by_state ON edits (state)")
    db.execute(
        "ALTER TABLE revisions ADD COLUMN dropped TEXT CHECK (dropped IN ('erased', 'pruned'))"
    )
    db.execute("PRAGMA user_version = 4")


@MIGRATIONS()
def format_5(db: Database) -> None:
    """Questions and statements that were written from a fact's description, and by whom."""
    db.execute("ALTER TABLE facts ADD COLUMN written TEXT NOT NULL DEFAULT '[]'")
    db.execute("PRAGMA user_version = 5")


def _renamed_report(text: str) -> str:
    return to_text(_rename(from_json(text, dict, "the report of an edit"), REPORT_NAMES))


def _renamed_config(text: str) -> str:
    """The settings of an edit, one object for each section, under their new names."""
    sections = from_json(text, dict, "the settings of an edit")
    for name, settings in sections.items():
        if isinstance(settings, dict):
            sections[name] = _rename(settings, old_settings("renamed").get(name, {}))
    return to_text(sections)


def _rename(document: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {names.get(name, name): value for name, value in document.items()}


def migrate(db: Database) -> None:
    """Bring an empty or older database up to ``FORMAT_VERSION``; each step is one transaction."""
    MIGRATIONS.apply(db)


def empty_database(version: int = FORMAT_VERSION) -> Database:
    """A database in memory with the schema of a version of the format, and no rows."""
    db = Database(memory=True)
    later = f"format_{version + 1}"
    MIGRATIONS.apply(db, stop_before=later if version < FORMAT_VERSION else None)
    return db


def check_version(db: Database, where: str) -> int:
    """The format's version of a database; refuses one that this program cannot read.

    Raises StoreTooNewError for a newer format, CorruptStoreError if it is no store's database, and
    what sqlite3 raises if it cannot be read.
    """
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > FORMAT_VERSION:
        raise StoreTooNewError(
            f"{where} has format {version}; this program reads up to {FORMAT_VERSION}",
            hint="Upgrade kvedit: pip install --upgrade kvedit.",
        )
    if version < 1:
        raise CorruptStoreError(
            f"{where} is half-written or no store: it has no format version",
            hint="Restore it from a backup, or move it away and run `kvedit init`.",
        )
    return version


def schema_sql() -> str:
    """The whole schema as SQL: the contents of ``store/schema.sql``, written by `make docs`."""
    with closing(empty_database()) as db:
        heading = "-- The schema of kvedit.db, generated by `make docs`"
        return f"{heading}\nPRAGMA user_version = {FORMAT_VERSION};\n{db.schema}\n"
