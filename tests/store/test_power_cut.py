"""Whenever the power is cut, the store opens at the old or the new revision, and it is sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from power_cut import Moment, recorded
from store_steps import (
    META,
    add,
    checkpoint,
    committed_texts,
    digest_of,
    erase,
    new_store,
    problems,
    prune,
    remove,
    roll_back,
    update,
)

from kvedit import files
from kvedit.errors import KveditError
from kvedit.store.forget.scrub import scrub
from kvedit.store.store import Store

WORK: dict[str, Callable[[Store], object]] = {
    "add": lambda store: add(store, "third", "new"),
    "update": lambda store: update(store, "first", "newer"),
    "remove": lambda store: remove(store, "second"),
    "rollback": lambda store: roll_back(store, 1),
    "erase": lambda store: erase(store, "first"),
    "prune": lambda store: checkpoint(store) or prune(store, 2),
    "checkpoint": checkpoint,
    "another checkpoint": lambda store: store.remove_checkpoint(1) or checkpoint(store),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two facts, and a checkpoint of the first revision."""
    path = tmp_path_factory.mktemp("power") / "store"
    with new_store(path) as store:
        add(store, "first", "old")
        checkpoint(store)
        add(store, "second")
    return path


def moments(path: Path, work: Callable[[Store], object]) -> list[Moment]:
    """All states that the disk may be in after a power cut during some work."""
    with recorded(path) as disk, Store.open(path) as store:
        work(store)
    return disk.moments


def broken(moment: Moment, path: Path, revisions: dict[int, dict[str, str]]) -> list[str]:
    """Open what is left; what is wrong with it."""
    moment.write(path)
    try:
        with Store.open(path) as store:
            # Before the recovery: what the database names has to be there already.
            named = [what for what in problems(store) if "missing" in what or "damaged" in what]
            store.recover()
            scrub(store)
            wrong = [*named, *problems(store)]
            head = store.head()
            if committed_texts(store) != revisions.get(head):
                wrong.append(f"revision {head} has {committed_texts(store)}")
            if digest_of(store) != store.revision(head).weights_digest:
                wrong.append("the deltas do not give the weights")
            return [f"{moment.label}: {what}" for what in wrong]
    except (KveditError, OSError) as error:
        return [f"{moment.label}: {error}"]


def all_broken(template: Path, folder: Path, kind: str) -> tuple[list[str], int]:
    """What is wrong after a power cut at any moment of some work; and of how many moments."""
    path = Path(copytree(template, folder / "live"))
    with Store.open(path) as store:
        revisions = {store.head(): committed_texts(store)}
    states = moments(path, WORK[kind])
    with Store.open(path) as store:
        revisions[store.head()] = committed_texts(store)
    wrong = [
        problem
        for number, moment in enumerate(states)
        for problem in broken(moment, folder / str(number), revisions)
    ]
    return wrong, len(states)


@pytest.mark.parametrize("kind", WORK)
def test_after_a_power_cut_the_store_is_sound(template: Path, ram_path: Path, kind: str) -> None:
    wrong, count = all_broken(template, ram_path, kind)
    assert wrong == []
    assert count >= 8


def test_after_a_power_cut_an_erased_text_is_gone_or_all_there(ram_path: Path) -> None:
    """The next command cleans the files, whenever the erasing was cut off."""
    text = "a text that stands nowhere else"
    with new_store(ram_path / "live") as store:
        add(store, "first")
        add(store, "secret", text)
        checkpoint(store)
        add(store, "third")
    found = []
    for number, moment in enumerate(moments(ram_path / "live", lambda one: erase(one, "secret"))):
        path = ram_path / str(number)
        moment.write(path)
        with Store.open(path) as store:
            store.recover()
            scrub(store)
            there = store.find("secret") is not None
            assert there == ("secret" in committed_texts(store)), moment.label
        left = [one for one in path.rglob("*") if one.is_file() and text in str(one.read_bytes())]
        assert bool(left) == there, moment.label
        found.append(there)
    assert found[0] and not found[-1] and len(found) >= 20


@pytest.mark.parametrize(
    "call", ["sync_stream", "sync_directory"], ids=["bytes not synced", "names not synced"]
)
def test_a_missing_fsync_would_be_noticed(
    template: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The check itself: without the sync of a delta the commit names a file that is not there."""
    flush = {"sync_stream": lambda stream: stream.flush(), "sync_directory": lambda folder: None}
    monkeypatch.setattr(files, call, flush[call])
    wrong, _ = all_broken(template, ram_path, "add")
    assert any("delta" in problem for problem in wrong)


def test_a_store_that_is_being_made_is_there_or_not(ram_path: Path) -> None:
    root = ram_path / "live"
    root.mkdir()
    with recorded(root) as disk:
        Store.create(root / "store", META).close()
    existed = []
    for number, moment in enumerate(disk.moments):
        left = ram_path / str(number)
        moment.write(left)
        existed.append(Store.exists(left / "store"))
        if not existed[-1]:
            Store.create(left / "store", META).close()
        with Store.open(left / "store") as store:
            store.recover()
            add(store, "first")
            assert problems(store) == [], moment.label
    assert not any(existed[:2])
    assert all(existed[-2:])  # what ``create`` has made does not go away
