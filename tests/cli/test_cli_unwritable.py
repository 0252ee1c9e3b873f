"""Reading a store where nothing can be written, and what commands say that would write there."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvedit.facts.fact import Fact
from kvedit.store import migrations
from kvedit.store.store import Store
from tests.cli.cli_fakes import FakeBase, commit, run
from tests.unwritable import full_disk, ordinary_user, without_permission

READING = (
    ("list",), ("show", "Porto"), ("history",), ("status",), ("similar", "Porto"),
    ("ask", "Porto?"), ("ask", "Porto?", "--at", "1"), ("chat",), ("verify",),
    ("doctor", "--quick"),
    ("ingest", "facts.jsonl", "--dry-run"), ("report", "-o", "page.html"),
    ("backup", "copy.tar"), ("export", "model"),
)  # fmt: skip
WRITING = (
    ("add", "Faro", "--text", "A town."), ("update", "Porto", "--text", "A town."),
    ("remove", "Porto"), ("rollback", "0"), ("verify", "--repair"), ("ingest", "facts.jsonl"),
)  # fmt: skip


@pytest.fixture(params=["closed", "killed"])
def unwritable(request: pytest.FixtureRequest, filled: Path) -> Iterator[Path]:
    """A store without permission to write: as a finished command left it, and as a killed one did,
    with a last commit that stands in the write-ahead log alone.
    """
    Path("facts.jsonl").write_text('{"key": "Faro", "description": "A town."}\n', encoding="utf-8")
    store = filled
    if request.param == "killed":
        with Store.open(filled) as opened:
            commit(opened, "add", None, Fact.create("Braga", "A town of stairs."))
            store = Path(shutil.copytree(filled, filled.with_name("killed")))
        (store / "kvedit.db-shm").unlink()
    with without_permission(store):
        yield store


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_reading_needs_no_permission_to_write(words: tuple[str, ...], unwritable: Path) -> None:
    result = run("--store", str(unwritable), *words)
    assert result.exit_code == 0, result.stderr


@pytest.mark.skipif(shutil.which("mount") is None, reason="no file system can be mounted")
def test_a_full_disk_is_read_and_called_full(filled: Path, tmp_path: Path) -> None:
    with full_disk(filled, tmp_path / "disk") as store:
        listed = run("--store", str(store), "list", "--json")
        assert len(json.loads(listed.stdout)) == 2
        assert run("--store", str(store), "ask", "Porto?").stdout == "now: Porto?\n"
        added = run("--store", str(store), "add", "Faro", "--text", "A town.")
    assert added.exit_code == 1
    assert added.stderr.startswith(f"error: no space left on the disk while writing {store}")


def test_the_last_commit_is_read_from_the_log(unwritable: Path) -> None:
    listed = run("--store", str(unwritable), "list", "--json").stdout
    keys = [row["key"] for row in json.loads(listed)]
    assert keys[:2] == ["夢中情爐", "Porto"]
    assert keys[2:] == (["Braga"] if (unwritable / "kvedit.db-wal").exists() else [])


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_writing_says_at_once_why_it_cannot(words: tuple[str, ...], unwritable: Path) -> None:
    FakeBase.last = None
    result = run("--store", str(unwritable), *words)
    assert result.exit_code == 1
    assert f"cannot write {unwritable}" in result.stderr
    assert "Permission denied" in result.stderr
    assert FakeBase.last is None  # no model was loaded for it


def test_an_unreadable_database_is_called_that(filled: Path) -> None:
    (filled / "kvedit.db").chmod(0)
    with ordinary_user():
        result = run("list")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot read store/kvedit.db: Permission denied")


def test_a_store_of_an_older_format_is_read_as_it_is(filled: Path) -> None:
    """Elsewhere reading upgrades it, which needs a place to write."""
    (filled / "kvedit.db").unlink()
    with closing(sqlite3.connect(filled / "kvedit.db")) as database, database:
        database.executescript("".join(migrations.empty_database(1).conn.iterdump()))
        database.execute(
            "INSERT INTO facts (key, norm_key, description, lang, state, created_at, updated_at)"
            " VALUES ('Porto', 'porto', 'A harbour town.', 'en', 'pending', '', '')"
        )
        database.execute("INSERT INTO meta VALUES ('head', '0')")
        database.execute("PRAGMA user_version = 1")
    assert migrations.FORMAT_VERSION > 1
    with without_permission(filled):
        result = run("list", "--state", "all", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)[0]["key"] == "Porto"
