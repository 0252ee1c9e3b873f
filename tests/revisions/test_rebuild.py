"""Checkpoints, deltas and the cache of Fisher moments: what may be lost, and what may not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from small_engine import StoreTemplate
from small_model import FREE

from kvedit import KnowledgeBase
from kvedit.adapter import deltas
from kvedit.adapter.deltas import Master
from kvedit.errors import CorruptStoreError, DiskFullError
from kvedit.events import Warning_
from kvedit.files import TEMPORARY
from kvedit.lock import StoreLock
from kvedit.model.loading import BaseModel
from kvedit.model.targets import target_names
from kvedit.revisions import checkout, fisher_cache, rebuild
from kvedit.store import integrity
from kvedit.store.store import Store


@pytest.fixture
def store(trained_store: Path) -> Iterator[Store]:
    with Store.open(trained_store) as opened:
        yield opened


@pytest.fixture
def master(load: Any) -> Master:
    base: BaseModel = load("bf16")
    return Master(base.model, target_names(base.model))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_every_revision_is_folded_to_its_digest(
    store: Store, master: Master, trained_template: StoreTemplate
) -> None:
    for revision in (3, 0, 2, 1, 3):
        assert rebuild.load_revision(store, master, revision) == []
        assert master.digest() == trained_template.digests[revision]


def test_a_checkpoint_was_made_and_is_used(store: Store, master: Master) -> None:
    assert [row.revision for row in store.checkpoints()] == [2]
    for revision in (1, 2):  # without the deltas beneath it, the checkpoint alone serves
        store.delta_path(store.revision(revision).delta or "").unlink()
    assert rebuild.load_revision(store, master, 3) == []
    with pytest.raises(CorruptStoreError):
        rebuild.load_revision(store, master, 1)


@pytest.mark.parametrize("harm", ["weights", "manifest", "folder", "half"])
def test_a_damaged_checkpoint_is_reported_and_rebuilt(
    store: Store, master: Master, trained_template: StoreTemplate, harm: str
) -> None:
    folder = store.checkpoints()[0].path
    if harm == "folder":
        shutil.rmtree(folder)
    elif harm == "half":
        (folder / "master.safetensors").unlink()
    else:
        flip(folder / ("manifest.json" if harm == "manifest" else "master.safetensors"))
    problems = rebuild.load_revision(store, master, 3)
    assert len(problems) == 1 and "all deltas are added" in problems[0]
    assert master.digest() == trained_template.digests[3]


def test_opening_warns_of_a_damaged_checkpoint(trained_store: Path, store: Store) -> None:
    flip(store.checkpoints()[0].path / "master.safetensors")
    events: list[Any] = []
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        assert knowledge.store.head() == 3
        assert [f.level for f in knowledge.doctor() if f.level != "ok"] == ["warning"]
    assert [e.code for e in events if isinstance(e, Warning_)][:1] == ["checkpoint"]


@pytest.mark.parametrize("harm", ["altered", "missing", "cut"])
def test_a_damaged_delta_is_an_error(store: Store, master: Master, harm: str) -> None:
    path = store.delta_path(store.revision(3).delta or "")
    if harm == "altered":
        flip(path)
    elif harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptStoreError) as raised:
        rebuild.load_revision(store, master, 3)
    assert path.name in raised.value.message and raised.value.hint
    assert rebuild.load_revision(store, master, 2) == []


def test_weights_without_the_recorded_digest_are_not_served(store: Store, master: Master) -> None:
    with store._transaction():
        store._execute("UPDATE revisions SET weights_digest = ? WHERE id = 3", ["0" * 64])
    with pytest.raises(CorruptStoreError, match="revision 3"):
        rebuild.load_revision(store, master, 3)
    assert rebuild.load_revision(store, master, 2) == []


def test_checkpoints_come_when_due_and_old_ones_go(store: Store, master: Master) -> None:
    rebuild.load_revision(store, master, 3)
    rebuild.checkpoint_if_due(store, master, every=2)
    assert [row.revision for row in store.checkpoints()] == [2]  # one delta since: not due
    rebuild.checkpoint_if_due(store, master, every=1)
    assert [row.revision for row in store.checkpoints()] == [2, 3]
    rebuild.checkpoint_if_due(store, master, every=1)
    assert [row.revision for row in store.checkpoints()] == [2, 3]
    for revision in (0, 1):
        store.add_checkpoint(revision, store.checkpoints_path / f"{revision:08d}", "x")
    with store._transaction():
        store._execute("DELETE FROM checkpoints WHERE revision = 3")
    rebuild.checkpoint_if_due(store, master, every=1)
    assert [row.revision for row in store.checkpoints()] == [1, 2, 3]
    assert not list(store.checkpoints_path.glob(f"{TEMPORARY}*"))


def test_the_head_is_kept_as_a_checkpoint_when_rebuilding_it_took_long(
    trained_store: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    KnowledgeBase.open(trained_store).close()
    assert [row.revision for row in store.checkpoints()] == [2]
    monkeypatch.setattr(checkout, "SLOW_SECONDS", 0.0)
    with StoreLock(trained_store):  # another process is editing
        KnowledgeBase.open(trained_store).close()
    assert [row.revision for row in store.checkpoints()] == [2]
    KnowledgeBase.open(trained_store).close()
    assert [row.revision for row in store.checkpoints()] == [2, 3]
    with KnowledgeBase.open(trained_store) as knowledge:
        recorded = store.revision(3).weights_digest
        assert knowledge.engine.weights_digest() == recorded
        flip(store.checkpoints()[-1].path / "master.safetensors")
        knowledge._session.go_to(3)  # what is damaged is written again
        assert knowledge.engine.weights_digest() == recorded
        assert not [f for f in knowledge.doctor() if f.level != "ok"]


def test_a_known_checkpoint_is_mapped_without_hashing_it(
    store: Store, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild.load_revision(store, master, 3)
    rebuild.write_checkpoint(store, master)
    file = store.checkpoints()[-1].path / "master.safetensors"
    status, hashed = file.stat(), []
    monkeypatch.setattr(deltas, "verify_manifest", lambda *args: hashed.append(args))
    monkeypatch.setattr(rebuild, "add_delta", lambda *args: hashed.append(args))
    monkeypatch.setattr(Master, "digest", lambda self: hashed.append(self))
    master.reset()
    assert rebuild.load_revision(store, master, 3) == []
    assert hashed == []
    monkeypatch.undo()
    assert master.digest() == store.revision(3).weights_digest
    flip(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert rebuild.load_revision(store, master, 3) == []
    assert [f.level for f in integrity.check(store) if f.level != "ok"] == ["warning"]
    flip(file)
    flip(file)
    assert len(rebuild.load_revision(store, master, 3)) == 1
    assert master.digest() == store.revision(3).weights_digest


def test_moments_are_read_back_for_their_own_weights_only(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        store, texts = knowledge.store, knowledge._session.protection._coverage.label
        found = fisher_cache.read(store, 3, "head", texts)
        assert found is not None
        assert fisher_cache.read(store, 2, "head", texts) is None
        assert fisher_cache.read(store, 3, "base", texts) is None
        fisher_cache.write(store, 2, "head", found)
        back = fisher_cache.read(store, 2, "head")
        assert back is not None and back.tokens == found.tokens
        for name, own in found.moments.items():
            assert torch.equal(back.moments[name].inputs, own.inputs)
            assert torch.equal(back.moments[name].gradients, own.gradients)
        assert fisher_cache.read(store, 2, "head", texts="others") is None
        fisher_cache.write(store, 2, "head", found, texts="others")
        assert fisher_cache.read(store, 2, "head") is None
        assert fisher_cache.read(store, 2, "head", texts="others") is not None
        # What several matrices share is kept, and held in memory, once.
        held = {own.inputs.data_ptr() for own in back.moments.values()}
        assert len(held) < len(back.moments)


@pytest.mark.parametrize("part", ["base", "head"])
@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "other"])
def test_a_damaged_cache_is_measured_again(
    trained_store: Path, random_training: None, harm: str, part: str
) -> None:
    file = trained_store / "cache" / f"{part}-fisher.safetensors"
    whole = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "other":
        from safetensors.torch import save

        file.write_bytes(save({"tokens": torch.tensor(3)}, {"weights": "0" * 64}))
    else:
        file.write_bytes(whole[: 0 if harm == "empty" else len(whole) // 2])
    said: list[str] = []

    def listen(event: Any) -> None:
        said.append(getattr(event, "phase", ""))

    with KnowledgeBase.open(trained_store, on_event=listen) as knowledge:
        assert knowledge.add(*FREE[3]).outcome == "rejected"  # measured before it was taught
    assert any(phase.startswith("measuring") for phase in said)
    assert file.is_file() and len(file.read_bytes()) > len(whole) // 2


def test_a_sound_cache_is_not_measured_again(trained_store: Path, random_training: None) -> None:
    said: list[str] = []
    with KnowledgeBase.open(
        trained_store, on_event=lambda event: said.append(getattr(event, "phase", ""))
    ) as knowledge:
        assert knowledge.add(*FREE[3]).outcome == "rejected"
    assert not any(phase.startswith("measuring") for phase in said)


def test_replay_finds_the_revision_that_is_wrong(
    store: Store, master: Master, trained_template: StoreTemplate
) -> None:
    sound = rebuild.check_revisions(store, master, lambda text: None)
    assert [f.level for f in sound] == ["ok"]
    with store._transaction():
        store._execute("UPDATE revisions SET weights_digest = ? WHERE id = 2", ["0" * 64])
    found = rebuild.check_revisions(store, master, lambda text: None)
    assert [f.level for f in found] == ["error"] and "revision 2" in found[0].what
    store.delta_path(store.revision(1).delta or "").unlink()
    missing = rebuild.check_revisions(store, master, lambda text: None)
    assert all(f.level == "error" for f in missing)
    assert {f"revision {n}" for n in (1, 2, 3)} == {f.what.split(":")[0] for f in missing}


def test_a_checkpoint_that_the_disk_has_no_space_for_leaves_nothing_and_names_the_disk(
    store: Store, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild.load_revision(store, master, 3)
    there = sorted(store.checkpoints_path.iterdir())

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(deltas, "save_file", full)
    with pytest.raises(DiskFullError, match=r"no space left .* while writing .*00000003\n"):
        rebuild.write_checkpoint(store, master)
    assert sorted(store.checkpoints_path.iterdir()) == there
