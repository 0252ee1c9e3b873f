"""The database schema of a store, and how an older one is brought up to it.

Invariants:
- ``PRAGMA user_version`` is the format's version; a newer one is refused, never guessed at.
- A released migration is never changed: a change of the schema or of stored names is a new one,
  with a new ``FORMAT_VERSION``.  ``store/schema.sql`` is the result of all of them.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Mapping

from sqlite_utils import Database, Migrations

from kvedit.errors import CorruptStoreError, StoreTooNewError
from kvedit.renamed_settings import RENAMED

FORMAT_VERSION = 2
MIGRATIONS = Migrations("kvedit")

_FORMAT_1 = """
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE TABLE facts (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    norm_key TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL,
    lang TEXT NOT NULL,
    aliases TEXT NOT NULL DEFAULT '[]',
    prompts TEXT NOT NULL DEFAULT '[]',
    paraphrases TEXT NOT NULL DEFAULT '[]',
    locality TEXT NOT NULL DEFAULT '[]',
    source TEXT,
    state TEXT NOT NULL CHECK (state IN ('pending', 'committed', 'rejected', 'removed')),
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
);
CREATE INDEX facts_by_state ON facts (state);
CREATE TABLE aliases (
    norm_alias TEXT PRIMARY KEY,
    fact_id INTEGER NOT NULL REFERENCES facts (id)
);
CREATE INDEX aliases_by_fact ON aliases (fact_id);
CREATE TABLE edits (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('add', 'update', 'remove', 'repair', 'rollback')),
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
);
CREATE INDEX edits_by_state ON edits (state);
CREATE TABLE edit_facts (
    edit_id INTEGER NOT NULL REFERENCES edits (id),
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    before TEXT,
    after TEXT,
    PRIMARY KEY (edit_id, fact_id)
);
CREATE INDEX edit_facts_by_fact ON edit_facts (fact_id);
CREATE TABLE revisions (
    id INTEGER PRIMARY KEY,
    parent INTEGER REFERENCES revisions (id) CHECK (parent < id),
    edit_id INTEGER UNIQUE REFERENCES edits (id),
    kind TEXT NOT NULL,
    restores INTEGER REFERENCES revisions (id) CHECK (restores < id),
    delta TEXT,
    weights_digest TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE TABLE fact_versions (
    id INTEGER PRIMARY KEY,
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    revision INTEGER NOT NULL REFERENCES revisions (id),
    state TEXT NOT NULL CHECK (state IN ('committed', 'removed')),
    fact TEXT NOT NULL,
    UNIQUE (fact_id, revision)
);
CREATE INDEX fact_versions_by_revision ON fact_versions (revision);
CREATE TABLE probe_results (
    id INTEGER PRIMARY KEY,
    fact_id INTEGER REFERENCES facts (id),
    edit_id INTEGER REFERENCES edits (id),
    revision INTEGER REFERENCES revisions (id),
    kind TEXT NOT NULL
        CHECK (kind IN ('recall', 'paraphrase', 'locality', 'retention', 'portability')),
    protocol TEXT NOT NULL CHECK (protocol IN ('teacher-forced', 'generated')),
    prompt TEXT NOT NULL,
    expected TEXT,
    answer TEXT,
    passed INTEGER NOT NULL,
    margin REAL,
    created_at TEXT NOT NULL
);
CREATE INDEX probe_results_by_fact ON probe_results (fact_id, revision);
CREATE INDEX probe_results_by_edit ON probe_results (edit_id);
CREATE TABLE fact_health (
    fact_id INTEGER PRIMARY KEY REFERENCES facts (id),
    last_checked_revision INTEGER NOT NULL REFERENCES revisions (id),
    last_checked_at TEXT NOT NULL,
    passed INTEGER NOT NULL,
    margin REAL
);
CREATE TABLE prior_answers (
    fact_id INTEGER NOT NULL REFERENCES facts (id),
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (fact_id, prompt)
);
CREATE TABLE protected (
    id INTEGER PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('control', 'locality')),
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    source TEXT NOT NULL
);
CREATE TABLE checkpoints (
    revision INTEGER PRIMARY KEY REFERENCES revisions (id),
    path TEXT NOT NULL,
    digest TEXT NOT NULL
);
"""


@MIGRATIONS()
def format_1(db: Database) -> None:
    """The first format."""
    db.executescript(_FORMAT_1)
    db.execute("PRAGMA user_version = 1")


REPORT_NAMES = {
    "left": "not_learned",
    "refused": "refusals",
    "again": "retrained",
    "before": "resumed_seconds",
    "moved": "relative_norms",
}
"""Fields of an edit's report: the name in format 1, the name since."""


@MIGRATIONS()
def format_2(db: Database) -> None:
    """Names inside values: of report fields, of settings, of where a protected text came from."""
    for edit_id, report, config in db.execute("SELECT id, report, config FROM edits").fetchall():
        db.execute(
            "UPDATE edits SET report = ?, config = ? WHERE id = ?",
            [_renamed(report, REPORT_NAMES), _renamed_config(config), edit_id],
        )
    db.execute("UPDATE protected SET source = 'extracted' WHERE source = 'recited'")
    db.execute("UPDATE meta SET name = 'protected_samples' WHERE name = 'protected_drafts'")
    for (prompts,) in db.execute("SELECT value FROM meta WHERE name = 'prompts'").fetchall():
        # Compared as text with the settings of today: written as ``base_model.prompts_of`` does.
        renamed = json.dumps(_rename(json.loads(prompts), RENAMED["prompts"]), sort_keys=True)
        db.execute("UPDATE meta SET value = ? WHERE name = 'prompts'", [renamed])
    db.execute("PRAGMA user_version = 2")


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return _to_text(_rename(json.loads(text), names))


def _renamed_config(text: str) -> str:
    """The settings of an edit, one object for each section, under their new names."""
    sections = json.loads(text)
    renamed = {
        section: _rename(settings, RENAMED.get(section, {})) if isinstance(settings, dict)
        else settings
        for section, settings in sections.items()
    }  # fmt: skip
    return _to_text(renamed)


def _rename(document: Mapping[str, object], names: Mapping[str, str]) -> dict[str, object]:
    return {names.get(name, name): value for name, value in document.items()}


def _to_text(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True)


def migrate(db: Database) -> None:
    """Bring an empty or older database up to ``FORMAT_VERSION``; each step is one transaction."""
    MIGRATIONS.apply(db)


def check_version(db: Database, where: str) -> int:
    """The format's version of a database; refuses one that this program cannot read.

    Raises StoreTooNewError for a newer format, CorruptStoreError if it is no store's database.
    """
    try:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.DatabaseError as error:
        raise CorruptStoreError(
            f"{where} is not a readable database: {error}", hint="Restore it from a backup."
        ) from error
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
    """The whole schema as SQL: the contents of ``store/schema.sql``."""
    db = Database(memory=True)
    try:
        migrate(db)
        return (
            "-- The schema of kvedit.db, generated: python -m kvedit.store.migrations"
            f" > store/schema.sql\nPRAGMA user_version = {FORMAT_VERSION};\n{db.schema}\n"
        )
    finally:
        db.close()


if __name__ == "__main__":
    sys.stdout.write(schema_sql())
