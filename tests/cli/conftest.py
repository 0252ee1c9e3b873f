"""Every test of the command line gets a fake knowledge base and an empty folder to work in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import kvedit
from kvedit.facts.fact import Fact
from kvedit.store.store import Store
from tests.cli.cli_fakes import META, FakeBase, commit


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeBase]]:
    """A class of its own for each test, in place of the editor; cwd is an empty folder."""
    kind = type("FakeBase", (FakeBase,), {})
    editor = ModuleType("kvedit.editing.knowledge_base")
    editor.KnowledgeBase = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvedit.editing.knowledge_base", editor)
    monkeypatch.setattr(kvedit, "editor", editor, raising=False)
    for name in ("KVEDIT_STORE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FakeBase, "last", None)
    yield kind


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A store with two facts at ./store."""
    with Store.create(tmp_path / "store", META) as store:
        commit(store, "add", None, Fact.create("夢中情爐", "一座會唱歌的爐子。", aliases=["情爐"]))
        commit(store, "add", None, Fact.create("Porto", "A harbour town."))
    return tmp_path / "store"
