"""Whatever call to the disk or to SQLite fails, an edit is there whole or not at all, the error
says what to do, and the next command works.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from shutil import copytree

import pytest
from disk_faults import Fault, disk, sqlite
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

from kvedit.errors import DiskFullError, KveditError
from kvedit.store.forget.scrub import scrub
from kvedit.store.store import Store

CODES = [errno.EIO, errno.ENOSPC, errno.EPERM]
NAMES = [errno.errorcode[code] for code in CODES]
WORK: dict[str, Callable[[Store], object]] = {
    "add": lambda store: add(store, "third", "new"),
    "update": lambda store: update(store, "first", "newer"),
    "remove": lambda store: remove(store, "second"),
    "rollback": lambda store: roll_back(store, 1),
    "erase": lambda store: erase(store, "first"),
    "prune": lambda store: checkpoint(store) or prune(store, 2),
    "checkpoint": checkpoint,
}
EXPECTED = {
    "add": {"first": "old", "second": "some text", "third": "new"},
    "update": {"first": "newer", "second": "some text"},
    "remove": {"first": "old"},
    "rollback": {"first": "old"},
    "erase": {"second": "some text"},
    "prune": {"first": "old", "second": "some text"},
    "checkpoint": {"first": "old", "second": "some text"},
}
BEFORE = EXPECTED["checkpoint"]
Where = Callable[[Fault, Path], AbstractContextManager[None]]
WHERE: dict[str, Where] = {"disk": disk, "sqlite": lambda fault, root: sqlite(fault)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two facts."""
    path = tmp_path_factory.mktemp("faults") / "store"
    with new_store(path) as store:
        add(store, "first", "old")
        add(store, "second")
    return path


def command(path: Path, kind: str) -> None:
    """What a command does: open the store, recover, edit."""
    with Store.open(path) as store, store.lock():
        store.recover()
        WORK[kind](store)


def calls(where: Where, path: Path, code: int, work: Callable[[], object]) -> list[str]:
    """The calls that a piece of work makes when none fails."""
    fault = Fault(0, code)
    with where(fault, path):
        work()
    return fault.labels


@pytest.mark.parametrize("code", CODES, ids=NAMES)
@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("kind", WORK)
def test_a_failing_call_leaves_the_store_sound(
    template: Path, ram_path: Path, kind: str, where: Where, code: int
) -> None:
    spare = copy_of(template, ram_path / "0")
    count = len(calls(where, ram_path, code, lambda: command(spare, kind)))
    assert count >= 4
    failures = 0
    for number in range(1, count + 1):
        path = copy_of(template, ram_path / str(number))
        fault = Fault(number, code)
        failed = None
        with where(fault, path):
            try:
                command(path, kind)
            except KveditError as error:  # anything else is a fault of the program
                failed = error
        label = f"call {number}, {fault.labels[number - 1]}"
        if failed is not None:
            failures += 1
            assert failed.hint, label
            assert isinstance(failed, DiskFullError) == (code == errno.ENOSPC), (label, failed)
        check_and_go_on(path, kind, label, whole=failed is None)
    assert failures >= count // 4


def copy_of(template: Path, path: Path) -> Path:
    return Path(copytree(template, path))


def check_and_go_on(path: Path, kind: str, label: str, *, whole: bool) -> None:
    """The edit is there or not; the next command recovers, and does it if it was not."""
    with Store.open(path) as store:
        store.recover()
        scrub(store)
        assert problems(store) == [], label
        done = {"checkpoint": bool(store.checkpoints()), "prune": bool(store.gaps())}
        committed = store.head() != 2 or done.get(kind, False)
        assert committed_texts(store) == (EXPECTED[kind] if committed else BEFORE), label
        assert committed or not whole, label
        assert digest_of(store) == store.revision(store.head()).weights_digest, label
    if not committed:
        command(path, kind)
    with Store.open(path) as store:
        assert (committed_texts(store), problems(store)) == (EXPECTED[kind], []), label


@pytest.mark.parametrize("code", CODES, ids=NAMES)
@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
def test_a_failing_call_leaves_no_half_made_store(ram_path: Path, where: Where, code: int) -> None:
    def create(path: Path) -> None:
        Store.create(path, META).close()

    count = len(calls(where, ram_path, code, lambda: create(ram_path / "0")))
    for number in range(1, count + 1):
        path = ram_path / str(number)
        fault = Fault(number, code)
        with where(fault, path):
            try:
                create(path)
            except KveditError as error:
                assert error.hint
        label = f"call {number}, {fault.labels[number - 1]}"
        if not Store.exists(path):
            create(path)
        with Store.open(path) as store:
            store.recover()
            assert problems(store) == [], label
            add(store, "first")
            assert committed_texts(store) == {"first": "some text"}
