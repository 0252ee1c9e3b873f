"""A store from a stranger is data: nothing is run, nothing deleted, nothing packed or written
outside, and whatever stands in the database, a command ends with a documented exit code and says
what is wrong.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hostile
import pytest
from click.testing import CliRunner
from crash_rounds import model_in_memory
from hostile import VALUES, Outcome
from small_engine import StoreTemplate

from kvedit.cli import cli
from kvedit.errors import KveditError
from kvedit.store.store import Store

READING = (
    ("list", "--state", "all", "--json"), ("show", "tide lantern"), ("history", "--json"),
    ("status",), ("similar", "tide"), ("report", "-o", "{work}/report.html"),
    ("erase", "tide lantern", "--dry-run", "--json"), ("prune", "--before", "2", "--dry-run"),
)  # fmt: skip
FORGETTING = READING[-2:]
CHECKING = (("doctor", "--quick", "--json"), ("backup", "{work}/backup.tar", "--force"))
ASKING = (
    ("ask", "What is tide lantern?", "--max-new-tokens", "2"), ("doctor", "--json"), ("verify",),
)  # fmt: skip


@pytest.fixture(scope="module")
def template(
    trained_template: StoreTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A store with a row in every table, a checkpoint among them."""
    from kvedit import KnowledgeBase
    from kvedit.revisions import rebuild

    path = Path(shutil.copytree(trained_template.path, tmp_path_factory.mktemp("hostile") / "s"))
    with KnowledgeBase.open(path) as knowledge:
        rebuild.write_checkpoint(knowledge.store, knowledge.engine.master)
    with closing(sqlite3.connect(path / "kvedit.db", isolation_level=None)) as db:
        db.execute("INSERT OR IGNORE INTO aliases VALUES ('the lantern', 1)")
        db.execute("INSERT OR IGNORE INTO prior_answers VALUES (1, 'What is it?', 'Nothing.')")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with model_in_memory():
        yield path


def run(store: Path, work: Path, *commands: tuple[str, ...]) -> Iterator[Outcome]:
    """What commands do with a store."""
    for words in commands:
        given = [word.format(work=work) for word in words]
        with hostile.ends_in_time():
            result = CliRunner().invoke(cli, ["--store", str(store), *given], prog_name="kvedit")
        yield Outcome(words[0], result.exit_code, result.output + repr(result.exception))


def remove_checkpoints(store: Path) -> Iterator[Outcome]:
    """What follows a commit now and then: old checkpoints are removed."""
    try:
        with hostile.ends_in_time(), Store.open(store) as opened:
            for revision in (1, 2, 3):
                opened.remove_checkpoint(revision)
            opened.recover()
    except KveditError as error:
        yield Outcome("removal", error.exit_code, error.message)


def faults(store: Path, work: Path, *commands: tuple[str, ...]) -> list[str]:
    """What a hostile store achieved."""
    outside = work / "outside"
    before = hostile.contents(outside)
    outcomes = [*run(store, work, *commands), *remove_checkpoints(store)]
    wrong = [
        f"{one.command}: exit {one.code}: {one.text[-500:]}" for one in outcomes
        if one.code not in hostile.EXIT_CODES or "unexpected" in one.text
        or (one.code and "error" not in one.text and one.command != "removal")
    ]  # fmt: skip
    if hostile.contents(outside) != before:
        wrong.append("files outside the store were changed")
    return wrong + hostile.packed_outside(work / "backup.tar")


def poisoned(template: Path, work: Path, table: str, column: str, name: str) -> Path | None:
    """A store with a hostile value in one column; None where SQLite itself refuses it."""
    store = hostile.copy(template, work / "store")
    value = VALUES[name]
    if isinstance(value, str):
        value = value.replace("{outside}", str(work / "outside"))
    raw = name in hostile.RAW
    reached = hostile.poison(store / "kvedit.db", table, column, value, raw=raw)
    return store if reached else None


def columns() -> list[tuple[str, str]]:
    """Every column of the schema."""
    from kvedit.store.migrations import empty_database

    with closing(empty_database()) as db:
        names = [name for name in db.table_names() if not name.startswith(("sqlite", "_sqlite"))]
        return [(name, column.name) for name in names for column in db[name].columns]


def chosen(table: str, column: str, count: int) -> list[str]:
    """Some of the values, others for each column."""
    names = list(VALUES)
    start = sum(map(ord, table + column)) % len(names)
    return [names[(start + 5 * step) % len(names)] for step in range(count)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is a model's on a hub is not asked for."""

    def cached_file(*_: object, **__: object) -> None:
        raise OSError("there is no network")

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)


@pytest.fixture
def work(ram_path: Path) -> Path:
    hostile.make_outside(ram_path)
    return ram_path


@pytest.mark.parametrize(("table", "column"), columns())
def test_some_values_in_every_column(template: Path, work: Path, table: str, column: str) -> None:
    for name in chosen(table, column, 2):
        if store := poisoned(template, work, table, column, name):
            commands = (*CHECKING, ("history", "--json"), *FORGETTING)
            assert not faults(store, work, *commands), name


@pytest.mark.parametrize(
    ("column", "name"), [("last_checked_revision", "nothing"), ("margin", "a text of digits")]
)
def test_health_that_no_check_gave(template: Path, work: Path, column: str, name: str) -> None:
    store = poisoned(template, work, "fact_health", column, name)
    assert store is not None and not faults(store, work, *READING, *CHECKING)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column"), columns())
def test_every_value_in_every_column(template: Path, work: Path, table: str, column: str) -> None:
    for name in VALUES:
        if store := poisoned(template, work, table, column, name):
            assert not faults(store, work, *READING, *CHECKING, *ASKING), name


@pytest.mark.parametrize(
    "name",
    ["head", "model_name", "model_path", "model_fingerprint", "model_revision", "model_files",
     "targets", "device_map", "load_in", "prompts", "dtype", "trust_remote_code", "created_at",
     "protected_text", "protected_progress", "protected_samples", "weights_digest"],
)  # fmt: skip
def test_some_values_of_every_name(template: Path, work: Path, name: str) -> None:
    for kind in chosen("meta", name, 4):
        value = VALUES[kind]
        if value is None or kind in hostile.RAW:
            continue
        store = hostile.copy(template, work / "store")
        text = value.replace("{outside}", str(work)) if isinstance(value, str) else value
        hostile.set_meta(store / "kvedit.db", name, text)
        commands = (*CHECKING, ("status",), ASKING[0])
        assert not faults(store, work, *commands), kind


SCHEMAS = {
    "a view that never ends": """
        ALTER TABLE prior_answers RENAME TO other;
        CREATE VIEW prior_answers AS WITH RECURSIVE n (fact_id, prompt, answer) AS
            (SELECT 1, 'a', 'b' UNION ALL SELECT fact_id + 1, prompt, answer FROM n)
            SELECT * FROM n;""",
    "a trigger": """CREATE TRIGGER more AFTER UPDATE ON meta BEGIN
        DELETE FROM facts; END;""",
    "another table": "CREATE TABLE facts_2 (id INTEGER);",
    "another column": "ALTER TABLE facts ADD COLUMN extra TEXT;",
    "an index over an expression": "CREATE INDEX odd ON facts (abs(-9223372036854775808 + id));",
    "a missing index": "DROP INDEX facts_by_state;",
    "a missing table": "DROP TABLE checkpoints;",
    "a virtual table": "CREATE VIRTUAL TABLE words USING fts5(text);",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_another_schema_is_refused(template: Path, work: Path, name: str) -> None:
    store = hostile.copy(template, work / "store")
    with closing(sqlite3.connect(store / "kvedit.db", isolation_level=None)) as db:
        db.executescript(SCHEMAS[name])
    outcomes = list(run(store, work, *READING, *CHECKING))
    codes = {one.command: one.code for one in outcomes}
    assert codes.pop("doctor") == 4 and set(codes.values()) == {1}
    assert all("is not kvedit's own" in one.text or "is missing" in one.text for one in outcomes)
    assert not faults(store, work, *READING, *CHECKING)


def test_a_lineage_that_loops_ends(template: Path, work: Path) -> None:
    store = hostile.copy(template, work / "store")
    for number, (column, value) in enumerate([("parent", 3), ("restores", 3), ("parent", 2**60)]):
        assert hostile.poison(store / "kvedit.db", "revisions", column, value), number
        for one in run(store, work, *CHECKING, ("ask", "What?", "--at", "3")):
            assert one.code == (4 if one.command == "doctor" else 1), one
        assert not faults(store, work, *CHECKING)


@pytest.mark.parametrize("name", ["deltas", "checkpoints", "cache", "exports", "phrasings"])
def test_a_folder_that_is_a_link_is_refused(template: Path, work: Path, name: str) -> None:
    store = hostile.copy(template, work / "store")
    shutil.rmtree(store / name, ignore_errors=True)
    (store / name).symlink_to(work / "outside")
    assert [one.code for one in run(store, work, *CHECKING)] == [4, 1]
    assert not faults(store, work, *READING, *CHECKING)
