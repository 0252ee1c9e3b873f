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
)  # fmt: skip
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


@pytest.fixture
def work(ram_path: Path) -> Path:
    hostile.make_outside(ram_path)
    return ram_path


@pytest.mark.parametrize(("table", "column"), columns())
def test_some_values_in_every_column(template: Path, work: Path, table: str, column: str) -> None:
    for name in chosen(table, column, 2):
        if store := poisoned(template, work, table, column, name):
            assert not faults(store, work, *CHECKING, ("history", "--json")), name


@pytest.mark.slow
@pytest.mark.parametrize(("table", "column"), columns())
def test_every_value_in_every_column(template: Path, work: Path, table: str, column: str) -> None:
    for name in VALUES:
        if store := poisoned(template, work, table, column, name):
            assert not faults(store, work, *READING, *CHECKING, *ASKING), name
