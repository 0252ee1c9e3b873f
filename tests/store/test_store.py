"""Facts are found by key and alias, never doubled; broken stores are refused."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from store_steps import META, add, check, commit, committed_texts, fact, new_store, remove, update

from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    DuplicateKeyError,
    LockedError,
    NoStoreError,
    NotWritableError,
    StoreTooNewError,
    UnknownKeyError,
    UsageError,
)
from kvedit.facts.fact import Fact, LocalityProbe, Question
from kvedit.store.rows import FactChange, ProtectedRow
from kvedit.store.store import Store, resolve_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "s")


def test_a_new_store_is_empty_and_keeps_its_meta(store: Store) -> None:
    assert store.head() == 0
    assert store.facts() == []
    assert store.meta("model_name") == "tiny"
    assert store.meta("none") is None
    assert store.revision(0).weights_digest == "base-digest"
    store.set_meta("note", "x")
    store.set_meta("note", "y")
    assert store.meta("note") == "y"
    with pytest.raises(ValueError, match="by commits only"):
        store.set_meta("head", "5")


def test_writes_are_durable_and_references_are_checked(store: Store) -> None:
    pragmas = [store._one(f"PRAGMA {name}") for name in ("journal_mode", "foreign_keys")]
    assert pragmas == [{"journal_mode": "wal"}, {"foreign_keys": 1}]
    assert store._one("PRAGMA synchronous") == {"synchronous": 2}


def test_a_store_is_not_made_over_another(store: Store) -> None:
    add(store, "k")
    with pytest.raises(UsageError, match="already"):
        Store.create(store.path, META)
    assert store.keys() == ["k"]


def test_a_store_may_be_made_in_a_folder_that_has_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with Store.create(tmp_path, META) as store:
        assert store.head() == 0
    assert (tmp_path / "README.md").read_text() == "mine"


def test_no_store(tmp_path: Path) -> None:
    assert not Store.exists(tmp_path)
    with pytest.raises(NoStoreError, match="no knowledge store at") as caught:
        Store.open(tmp_path)
    assert "kvedit init" in caught.value.hint


def test_killed_while_it_is_made_there_is_no_store(tmp_path: Path) -> None:
    for call in ("replace", "fsync"):
        path = tmp_path / call
        child = os.fork()
        if child == 0:
            setattr(os, call, lambda *_: os._exit(9))
            Store.create(path, META)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not Store.exists(path)
        with Store.create(path, META) as store:
            store.recover()
            assert [item.name for item in path.glob(".tmp-*")] == []


@pytest.mark.parametrize("damage", [b"", b"not a database, but long enough to be read" * 20])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "kvedit.db").write_bytes(damage)
    with pytest.raises(CorruptStoreError):
        Store.open(tmp_path)


def test_a_store_cut_short_is_refused_or_reported(store: Store) -> None:
    for number in range(20):
        store.put_pending(fact(f"key {number}", "text " * 200))
    store.close()
    data = store.db_path.read_bytes()
    store.db_path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptStoreError):
        Store.open(store.path).facts()


def test_a_newer_store_is_refused(store: Store) -> None:
    store.close()
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreTooNewError, match="format 99"):
        Store.open(store.path)


def test_a_store_without_a_head_is_refused(store: Store) -> None:
    store.close()
    with sqlite3.connect(store.db_path) as connection:
        connection.execute("DELETE FROM meta WHERE name = 'head'")
    with pytest.raises(CorruptStoreError, match="no head"):
        Store.open(store.path)


def test_a_full_disk_is_named_and_changes_nothing(store: Store) -> None:
    pages = store._one("PRAGMA page_count")
    assert pages is not None
    store._db.execute(f"PRAGMA max_page_count = {pages['page_count']}").fetchall()
    with pytest.raises(DiskFullError, match=r"no space left .*kvedit\.db") as caught:
        store.put_pending(fact("k", "text " * 20_000))
    assert "Free some space" in caught.value.hint
    assert store.facts() == []
    store.put_pending(fact("k"))
    assert store.keys("pending") == ["k"]


def test_a_database_that_another_program_holds_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvedit.store.database.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(store.db_path)
    other.execute("BEGIN IMMEDIATE")
    with Store.open(store.path) as mine, pytest.raises(LockedError, match="is in use"):
        mine.put_pending(fact("k"))
    other.close()


def test_a_read_only_store_reads_beside_a_writer_and_cannot_write(store: Store) -> None:
    add(store, "k")
    with Store.open(store.path, readonly=True) as reader:
        assert committed_texts(reader) == {"k": "some text"}
        update(store, "k", "new")
        assert committed_texts(reader) == {"k": "new"}
        with pytest.raises(NotWritableError, match="readonly"):
            reader.put_pending(fact("x"))
    store.close()
    with Store.open(store.path, readonly=True) as reader:
        assert committed_texts(reader) == {"k": "new"}


def test_a_fact_comes_back_with_all_its_parts(store: Store) -> None:
    whole = Fact.create(
        "夢中情爐",
        "一種爐",
        aliases=["情爐"],
        prompts=["何謂夢中情爐？"],
        paraphrases=["夢中情爐是什麼？"],
        locality=[LocalityProbe(prompt="李白是誰？"), LocalityProbe(prompt="q", answer="a")],
        questions=[Question(prompt="何處？", answer="夢中", probe=True)],
        statements=["夢中情爐是爐。"],
        relation_of="情爐",
        source="a book",
    )
    fact_id = store.put_pending(whole)
    assert store.get(fact_id).fact == whole
    assert store.get(fact_id).to_json()["key"] == "夢中情爐"


@pytest.mark.parametrize("name", ["夢中情爐", "梦中情炉", " 夢中 情爐 ", "情炉"])
def test_a_fact_is_found_by_key_and_alias_however_written(store: Store, name: str) -> None:
    fact_id = store.put_pending(Fact.create("夢中情爐", "一種爐", aliases=["情爐"]))
    row = store.find(name)
    assert row is not None
    assert row.id == fact_id


def test_an_unknown_key_says_what_may_have_been_meant(store: Store) -> None:
    add(store, "Isaac Newton", aliases=["Sir Isaac"])
    with pytest.raises(UnknownKeyError, match="no fact 'Isac Newton'") as caught:
        store.require("Isac Newton")
    assert caught.value.hint == "Did you mean Isaac Newton?"
    with pytest.raises(UnknownKeyError) as caught:
        store.require("zzz")
    assert "kvedit list" in caught.value.hint
    with pytest.raises(UnknownKeyError):
        store.history("zzz")
    with pytest.raises(UnknownKeyError, match="number 99"):
        store.get(99)


def test_two_relations_of_a_subject_stand_side_by_side(store: Store) -> None:
    def relation(asks: str) -> int:
        return add(store, f"Ada: … {asks}", prompts=[f"Ada {asks}"], relation_of="Ada")

    first = relation("was born in")
    assert store.require("ADA").id == first  # the only one: its subject finds it
    assert store.find("Ada") is None  # a fact about Ada herself may still be added
    second = relation("died in")
    with pytest.raises(UnknownKeyError, match="Ada has 2 relations") as caught:
        store.require("ada")
    assert caught.value.hint == "Name one of them: Ada: … was born in, Ada: … died in"
    whole = add(store, "Ada", "A pioneer.")
    assert store.require("Ada").id == whole
    assert store.require("Ada: … died in").id == second
    assert store.names() == ["Ada", "Ada", "Ada"]


def test_a_committed_key_is_not_added_again(store: Store) -> None:
    add(store, "Key")
    with pytest.raises(DuplicateKeyError) as caught:
        store.put_pending(fact("key", "other text"))
    assert "kvedit update Key" in caught.value.hint
    assert committed_texts(store) == {"Key": "some text"}


def test_a_key_or_alias_of_another_fact_is_refused(store: Store) -> None:
    add(store, "Li Bai", aliases=["Taibai"])
    for new in (fact("taibai"), fact("other", aliases=["Li-Bai"]), fact("x", aliases=["TAIBAI"])):
        with pytest.raises(DuplicateKeyError, match="already belongs to the fact Li Bai"):
            store.put_pending(new)
    assert len(store.facts()) == 1
    remove(store, "Li Bai")
    store.put_pending(fact("taibai"))  # a removed fact's names are free


def test_a_fact_the_model_does_not_hold_is_replaced_in_place(store: Store) -> None:
    first = store.put_pending(fact("Key", "one", aliases=["old name"]))
    assert store.put_pending(fact("KEY", "two")) == first
    row = store.require("key")
    assert (row.fact.key, row.fact.description, row.state) == ("KEY", "two", "pending")
    assert store.find("old name") is None
    assert add(store, "key", "three") == first
    remove(store, "key")
    assert store.put_pending(fact("key", "four")) == first
    assert store.require("key").revision == 2


def test_facts_and_keys_by_state(store: Store) -> None:
    add(store, "a")
    store.put_pending(fact("b"))
    add(store, "c")
    remove(store, "c")
    assert store.keys() == ["a"]
    assert [(row.fact.key, row.state) for row in store.facts()] == [
        ("a", "committed"),
        ("b", "pending"),
        ("c", "removed"),
    ]
    assert [row.fact.key for row in store.facts("removed")] == ["c"]


def test_health_follows_the_checks(store: Store) -> None:
    (store.path / "kvedit.toml").write_text("[retention]\nstale_after_revisions = 2\n")
    number = add(store, "a")
    assert store.require("a").health == "recalled"
    store.record_results(
        [
            check(number, margin=0.5),
            check(number, margin=-0.1, passed=False, kind="retention"),
            check(number, margin=-9, passed=False, kind="paraphrase"),
        ],
        1,
    )
    row = store.require("a")
    assert (row.health, row.margin, row.last_checked_revision) == ("regressed", -0.1, 1)
    store.record_results([check(number, passed=False, kind="locality")], 1)
    store.record_results([check(number, margin=2.0, kind="retention")], 1)
    assert (store.require("a").health, store.require("a").margin) == ("recalled", 2.0)
    for key in ("b", "c"):
        add(store, key)
    assert store.require("a").health == "recalled"
    add(store, "d")
    assert store.require("a").health == "stale"
    row = store.require("a")
    commit(store, "repair", [FactChange(row.id, row.fact, row.fact)])
    assert store.require("a").health == "unchecked"


def test_results_come_newest_first(store: Store) -> None:
    number = add(store, "a")
    store.record_results([check(number, margin=float(n)) for n in range(5)], 1)
    assert [row.margin for row in store.results(number, limit=3)] == [4.0, 3.0, 2.0]
    assert store.results(number)[0].revision == 1


def test_history_is_newest_first_and_by_fact(store: Store) -> None:
    add(store, "a", aliases=["alpha"])
    add(store, "b")
    update(store, "a", "new")
    assert [edit.kind for edit in store.history()] == ["update", "add", "add"]
    assert [edit.id for edit in store.history("ALPHA")] == [3, 1]
    assert store.history("b")[0].to_json()["keys"] == ["b"]


def test_protected_texts_are_replaced_as_a_whole(store: Store) -> None:
    store.set_protected([ProtectedRow(role="control", prompt="", answer="old")])
    rows = [
        ProtectedRow(role="control", prompt="q", answer="a", source="model"),
        ProtectedRow(role="locality", prompt="p", answer="b"),
    ]
    store.set_protected(rows)
    (control,) = store.protected("control")
    assert (control.prompt, control.answer, control.source) == ("q", "a", "model")
    assert [row.answer for row in store.protected("locality")] == ["b"]


def test_protected_texts_are_added(store: Store) -> None:
    store.set_protected([ProtectedRow(role="control", prompt="", answer="old")])
    store.add_protected([ProtectedRow(role="control", prompt="q", answer="new")])
    assert [row.answer for row in store.protected("control")] == ["old", "new"]


def test_checkpoints_move_with_the_store(store: Store, tmp_path: Path) -> None:
    add(store, "a")
    folder = store.checkpoint_path(1)
    folder.mkdir()
    store.add_checkpoint(1, folder, "digest")
    store.close()
    moved = tmp_path / "moved"
    shutil.move(store.path, moved)
    with Store.open(moved) as again:
        (row,) = again.checkpoints()
        assert (row.revision, row.path, row.digest) == (1, moved / "checkpoints/00000001", "digest")
        again.recover()
        assert row.path.is_dir()
        again.remove_checkpoint(1)
        assert again.checkpoints() == []
        assert not row.path.exists()


def test_the_store_is_chosen_by_option_then_environment_then_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KVEDIT_STORE", raising=False)
    assert resolve_store() == Path("store")
    monkeypatch.setenv("KVEDIT_STORE", "~/facts")
    assert resolve_store() == Path.home() / "facts"
    assert resolve_store("here") == Path("here")


def test_many_facts_go_in_together_or_not_at_all(store: Store) -> None:
    ids = store.put_pending_many([fact("a"), fact("b", "t", aliases=["c"])])
    assert [store.get(id_).fact.key for id_ in ids] == ["a", "b"]
    assert store.put_pending_many([fact("b", "new text")]) == [ids[1]]
    with pytest.raises(DuplicateKeyError):
        store.put_pending_many([fact("d"), fact("e", "t", aliases=["a"])])
    assert [row.fact.key for row in store.facts("pending")] == ["a", "b"]
    assert store.put_pending_many([]) == []


def test_pace_and_refusals_come_from_the_journal(store: Store) -> None:
    assert store.pace() == (0, 0.0)
    for key, outcome, seconds in (("a", "rejected", 3.0), ("b", "failed", 9.0)):
        fact_id = store.put_pending(fact(key))
        edit = store.plan_edit("add", [FactChange(fact_id, None, fact(key))], {})
        store.finish_edit(edit, outcome, [f"{key} would not"], {"seconds": seconds})
    assert store.pace() == (1, 3.0)
    assert store.refusals() == {store.require("a").id: ("a would not",)}
