"""Keys that differ in a sign are one, or two where the setting says so; the rule never changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_steps import add, fact, new_store

from kvedit.errors import DuplicateKeyError, UsageError
from kvedit.facts.keys import exact_form, normalise
from kvedit.store import integrity
from kvedit.store.key_forms import key_form_at
from kvedit.store.store import Store

PAIRS = [("A-1", "A1"), (".NET", "NET"), ("后", "後"), ("C", "C++")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = new_store(tmp_path / "s")
    keep_signs(made, "true")
    return made


def keep_signs(store: Store, value: str) -> None:
    (store.path / "kvedit.toml").write_text(f"[keys]\nkeep_signs = {value}\n", encoding="utf-8")


def test_signs_and_scripts_are_kept_apart(store: Store) -> None:
    for pair in PAIRS:
        for key in pair:
            add(store, key)
    for pair in PAIRS:
        for key in pair:
            row = store.find(f" {key.lower()} ")
            assert row is not None and row.fact.key == key
    assert {finding.level for finding in integrity.check(store)} == {"ok"}
    with pytest.raises(DuplicateKeyError, match="A-1 is in the store already"):
        store.put_pending(fact("a - 1"))


def test_an_alias_may_differ_in_a_sign(store: Store) -> None:
    store.put_pending(fact("A-1", aliases=["A1"]))
    row = store.find("a1")
    assert row is not None and row.fact.key == "A-1"
    with pytest.raises(DuplicateKeyError, match="already belongs to the fact A-1"):
        store.put_pending(fact("A1"))


def test_the_rule_is_decided_by_the_first_fact(store: Store) -> None:
    add(store, "A-1")
    keep_signs(store, "false")
    assert store.find("A1") is None and store.find("A-1") is not None
    with pytest.raises(UsageError, match=r"keep_signs in .* was changed after facts"):
        store.put_pending(fact("A1"))
    assert store.keys() == ["A-1"]


def test_a_store_of_an_older_version_keeps_its_rule(tmp_path: Path) -> None:
    store = new_store(tmp_path / "s")
    add(store, "A-1")
    store._execute("DELETE FROM meta WHERE name = 'keep_signs'")
    keep_signs(store, "true")
    assert store.find("A1") is not None
    with pytest.raises(UsageError, match="was changed after facts"):
        store.put_pending(fact("B"))


def test_a_store_that_is_not_made_yet(tmp_path: Path) -> None:
    assert key_form_at(tmp_path) is normalise
    (tmp_path / "kvedit.toml").write_text("[keys]\nkeep_signs = true\n", encoding="utf-8")
    assert key_form_at(tmp_path) is exact_form
