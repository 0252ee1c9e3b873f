"""The model of a store: what is refused when one is made, and when one is opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_model import settings

from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import ModelError, ModelMismatchError, UsageError
from kvedit.model import loading
from kvedit.store.store import Store


def test_create_refuses_a_store_that_is_there(trained_store: Path, small: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="already"):
        KnowledgeBase.create(trained_store, small["bf16"])
    with Store.open(trained_store) as store:
        assert store.head() == 3


def test_create_without_a_model_makes_no_store(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        KnowledgeBase.create(tmp_path / "store", tmp_path / "model")
    assert not (tmp_path / "store").exists()


def test_another_model_is_refused(
    small: dict[str, Path], trained_store: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "model"
    shutil.copytree(small["bf16"], moved)
    with Store.open(trained_store) as store:
        store.set_meta("model_path", str(moved))
        store.set_meta("model_name", str(moved))
    with KnowledgeBase.open(trained_store) as knowledge:  # the same files at another place
        assert knowledge.store.head() == 3
    weights = moved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelMismatchError) as raised:
        KnowledgeBase.open(trained_store)
    assert raised.value.exit_code == 13
    shutil.rmtree(moved)
    with pytest.raises(ModelError):
        KnowledgeBase.open(trained_store)


def test_files_that_did_not_change_are_not_hashed_again(
    small: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with a newer time is refused; one that only looks the same is found by doctor."""
    model, path = tmp_path / "model", tmp_path / "store"
    shutil.copytree(small["bf16"], model)
    path.mkdir()
    (path / "kvedit.toml").write_text(settings(), encoding="utf-8")
    KnowledgeBase.create(path, model).close()
    KnowledgeBase.open(path).close()  # the first time, all is hashed
    computed: list[str] = []
    fingerprint = loading.fingerprint

    def counted(source: str, model: Any) -> str:
        computed.append(source)
        return fingerprint(source, model)

    monkeypatch.setattr(loading, "fingerprint", counted)
    with KnowledgeBase.open(path) as knowledge:
        assert computed == []
        assert not [f for f in knowledge.doctor() if f.level != "ok"]
    assert computed == [str(model.resolve())]
    weights = model / "model.safetensors"
    status, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ModelMismatchError):
        KnowledgeBase.open(path)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    with KnowledgeBase.open(path) as knowledge:
        found = [finding for finding in knowledge.doctor() if finding.level == "error"]
    assert len(found) == 1 and "was altered" in found[0].what
    (path / "cache" / "known-files.json").write_text("[1")
    with pytest.raises(ModelMismatchError):
        KnowledgeBase.open(path)


def test_a_model_is_loaded_again_as_it_was_chosen(small: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "store"
    path.mkdir()
    (path / "kvedit.toml").write_text(settings(), encoding="utf-8")
    chosen: dict[str, Any] = {"targets": ("q_proj", "down_proj"), "device_map": "cpu"}
    with KnowledgeBase.create(path, small["bf16"], **chosen) as knowledge:
        names, digest = knowledge.engine.names, knowledge.engine.master.digest()
    assert {name.rsplit(".", 1)[-1] for name in names} == set(chosen["targets"])
    with KnowledgeBase.open(path) as knowledge:
        assert knowledge.engine.names == names
        assert knowledge.engine.master.digest() == digest
        assert knowledge.engine.base.loading.device_map == "cpu"


def test_weights_packed_otherwise_are_refused(trained_store: Path) -> None:
    text = (trained_store / "kvedit.toml").read_text(encoding="utf-8")
    (trained_store / "kvedit.toml").write_text(text + "[model]\nload_in = '4bit'\n", "utf-8")
    with pytest.raises(ModelMismatchError, match="full width, not in 4bit"):
        KnowledgeBase.open(trained_store)
