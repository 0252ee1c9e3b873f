"""Calls to the disk and to SQLite that fail in turn, and power cuts, on a store without a model.

Each case is what the tests of the same name judge; here they are counted one by one.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvedit.errors import DiskFullError, KveditError
from kvedit.store.store import Store


def failing_calls(folder: Path, first: int) -> Iterator[str | None]:
    """Each call of each command fails once, in each way."""
    from store_steps import add, new_store

    judge: Any = importlib.import_module("tests.store.test_disk_faults")
    with new_store(folder / "template") as store:
        add(store, "first", "old")
        add(store, "second")
    number = 0
    for kind, (where_name, where), code in itertools.product(
        judge.WORK, judge.WHERE.items(), judge.CODES
    ):
        spare = judge.copy_of(folder / "template", folder / "spare")
        count = len(judge.calls(where, folder, code, lambda k=kind, s=spare: judge.command(s, k)))
        shutil.rmtree(spare)
        for call in range(1, count + 1):
            number += 1
            if number > first:
                label = f"{kind}, {where_name}, {code}, call {call}"
                yield _failing_call(judge, folder, kind, where, code, call, label)


def _failing_call(
    judge: Any, folder: Path, kind: str, where: Any, code: int, call: int, label: str
) -> str | None:
    path = judge.copy_of(folder / "template", folder / "store")
    from disk_faults import Fault

    failed: KveditError | None = None
    try:
        with where(Fault(call, code), path.parent):
            try:
                judge.command(path, kind)
            except KveditError as error:
                failed = error
        if failed is not None and (
            not failed.hint or isinstance(failed, DiskFullError) != (code == 28)
        ):
            return f"{label}: {failed!r}"
        judge.check_and_go_on(path, kind, label, whole=failed is None)
    except Exception as error:
        return f"{label}: {type(error).__name__}: {error}"[:300]
    finally:
        shutil.rmtree(path)
    return None


def power_cuts(folder: Path, first: int) -> Iterator[str | None]:
    """The power is cut after each call that changes what is durable, in two ways of losing."""
    from store_steps import add, checkpoint, committed_texts, new_store

    judge: Any = importlib.import_module("tests.store.test_power_cut")
    with new_store(folder / "template") as store:
        add(store, "first", "old")
        checkpoint(store)
        add(store, "second")
    number = 0
    for kind, work in judge.WORK.items():
        live = Path(shutil.copytree(folder / "template", folder / "live"))
        revisions = _revisions(live, committed_texts)
        states = judge.moments(live, work)
        with Store.open(live) as store:
            revisions[store.head()] = committed_texts(store)
        for moment in states:
            number += 1
            if number > first:
                wrong = judge.broken(moment, folder / "cut", revisions)
                shutil.rmtree(folder / "cut", ignore_errors=True)
                yield f"{kind}: {wrong}"[:300] if wrong else None
        shutil.rmtree(live)


def _revisions(path: Path, texts: Callable[[Store], dict[str, str]]) -> dict[int, dict[str, str]]:
    with Store.open(path) as store:
        return {store.head(): texts(store)}


def failing_mappings(folder: Path, first: int) -> Iterator[str | None]:
    """Each mmap of weights, checkpoints and statistics fails once, in each way, in each command."""
    import pytest

    judge: Any = importlib.import_module("tests.mmap_faults")
    template = _trained_store(folder)
    number = 0
    with pytest.MonkeyPatch.context() as patch:
        _train_at_random(patch)
        for kind in judge.WORK:
            spare = Path(shutil.copytree(template, folder / "spare"))
            labels = judge.calls(spare, kind)
            shutil.rmtree(spare)
            for (call, label), code in itertools.product(enumerate(labels, 1), judge.CODES):
                number += 1
                if number > first:
                    what = _failing_mapping(judge, template, folder / "store", kind, call, code)
                    yield what and f"{kind}, {label}, {code}, call {call}: {what}"


def _failing_mapping(
    judge: Any, template: Path, path: Path, kind: str, call: int, code: int
) -> str | None:
    shutil.copytree(template, path)
    try:
        wrong: str | None = judge.wrong(path, kind, call, code)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"[:300]
    finally:
        shutil.rmtree(path)
    return wrong


def _trained_store(folder: Path) -> Path:
    """A store of the small model with three facts."""
    import pytest
    from small_engine import configure
    from small_model import FREE, build

    from kvedit import KnowledgeBase

    models = build(folder / "models")
    path = folder / "trained"
    path.mkdir()
    configure(path)
    with pytest.MonkeyPatch.context() as patch:
        _train_at_random(patch)
        with KnowledgeBase.create(path, model=models["bf16"]) as base:
            for fact in FREE[:3]:
                base.add(*fact, force=True)
    return path


def _train_at_random(patch: Any) -> None:
    from small_engine import random_train

    from kvedit.training.engine import Engine

    patch.setattr(Engine, "train", random_train())


CASES: dict[str, Callable[[Path, int], Iterator[str | None]]] = {
    "failing calls (EIO, ENOSPC, EPERM)": failing_calls,
    "failing mappings (EIO, ENOSPC, ENOMEM, EPERM)": failing_mappings,
    "power cuts": power_cuts,
}
