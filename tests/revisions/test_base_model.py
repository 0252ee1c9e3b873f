"""The model of a store: what is refused when one is made, and when one is opened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_model import settings

from kvedit.cli import cli
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import CorruptStoreError, ModelError, ModelMismatchError, UsageError
from kvedit.model import loading
from kvedit.revisions import base_model
from kvedit.store.checks import known_files
from kvedit.store.store import Store
from kvedit.trust import consent, fingerprint


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
    identify = loading.identify

    def counted(source: str, revision: str | None = None) -> Any:
        computed.append(source)
        return identify(source, revision)

    monkeypatch.setattr(loading, "identify", counted)
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
    assert len(found) == 1 and "model.safetensors has changed" in found[0].what
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


@pytest.fixture
def with_code(small: dict[str, Path], tmp_path: Path) -> Path:
    """A model with code of its own, which leaves a mark where it is run."""
    folder = Path(shutil.copytree(small["bf16"], tmp_path / "with code"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()"
    (folder / "own.py").write_text(f"{mark}\nclass Config: ...\n", encoding="utf-8")
    return folder


def point_to(store: Path, source: str, **values: str) -> None:
    """Give a store another model, as somebody would who made the store."""
    found = fingerprint.of_folder(Path(source))
    meta = {"model_name": source, "model_path": source, "model_fingerprint": found.digest}
    with Store.open(store) as opened:
        opened.set_metas({**meta, "model_files": json.dumps(dict(found.files)), **values})


def test_a_store_does_not_lead_to_code_being_run(
    trained_store: Path, with_code: Path, tmp_path: Path
) -> None:
    point_to(trained_store, str(with_code), trust_remote_code="1")
    with pytest.raises(ModelError, match="nobody has allowed it") as refused:
        KnowledgeBase.open(trained_store)
    assert "kvedit trust" in refused.value.hint
    with Store.open(trained_store) as store:
        store.set_meta("trust_remote_code", "0")
    with pytest.raises(ModelError):
        KnowledgeBase.open(trained_store)
    with Store.open(trained_store) as store:
        store.set_meta("trust_remote_code", "1")
        base_model.allow_code(store)
        assert not (tmp_path / "mark").exists()  # to allow it is not to run it
    with pytest.raises(ModelError):  # what this code makes is no configuration
        KnowledgeBase.open(trained_store)
    assert (tmp_path / "mark").exists()


def test_code_that_was_changed_is_not_run_whatever_the_store_says(
    trained_store: Path, with_code: Path, tmp_path: Path
) -> None:
    """Neither the consent to other code counts, nor a list of files that are said to be known."""
    consent.give(consent.of_folder(with_code), "x")
    point_to(trained_store, str(with_code), trust_remote_code="1")
    good = fingerprint.of_folder(with_code).digest
    (with_code / "own.py").write_text(
        (with_code / "own.py").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    with pytest.raises(ModelMismatchError, match=r"own\.py has changed"):
        KnowledgeBase.open(trained_store)
    files = known_files.stamps(fingerprint.deciding_files(with_code))
    (trained_store / "cache").mkdir(exist_ok=True)
    known = json.dumps({good: files})
    (trained_store / "cache" / "known-files.json").write_text(known, encoding="utf-8")
    with pytest.raises(ModelError, match="nobody has allowed it"):
        KnowledgeBase.open(trained_store)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("path", ["model", "./model", "../store/model", "", "/tmp/../model"])
def test_a_relative_model_is_refused(
    trained_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with Store.open(trained_store) as store:
        store.set_metas({"model_name": "x", "model_path": path})
    with pytest.raises((CorruptStoreError, UsageError)) as refused:
        KnowledgeBase.open(trained_store)
    assert "doctor --fix --model" in refused.value.hint


def test_every_file_that_decides_an_answer_is_compared(
    trained_store: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(small["bf16"], tmp_path / "model"))
    point_to(trained_store, str(model))
    config = model / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "utf-8")
    assert config.read_text(encoding="utf-8") != text
    with pytest.raises(ModelMismatchError, match=r"config\.json has changed"):
        KnowledgeBase.open(trained_store)
    config.write_text(text, encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(ModelMismatchError, match=r"chat_template\.jinja"):
        KnowledgeBase.open(trained_store)


def test_a_store_of_an_older_version_gets_the_fingerprint_of_whole_files(
    trained_store: Path, small: dict[str, Path]
) -> None:
    folder = small["bf16"]
    with Store.open(trained_store) as store:
        store.set_meta("model_fingerprint", fingerprint.of_ends(folder))
        with store._transaction():
            store._execute("DELETE FROM meta WHERE name = 'model_files'")
    shutil.rmtree(trained_store / "cache")
    KnowledgeBase.open(trained_store).close()
    with Store.open(trained_store) as store:
        assert store.meta("model_fingerprint") == fingerprint.of_folder(folder).digest
        assert "config.json" in json.loads(store.meta("model_files") or "")


def test_the_command_that_allows_code_lists_it_and_asks(
    trained_store: Path, with_code: Path, tmp_path: Path
) -> None:
    point_to(trained_store, str(with_code), trust_remote_code="1")
    words = ["--store", str(trained_store), "trust"]
    refused = CliRunner().invoke(cli, words, input="n\n", prog_name="kvedit")
    assert "own.py" in refused.stdout and refused.exit_code == 130
    assert not consent.is_given(consent.of_folder(with_code))
    allowed = CliRunner().invoke(cli, [*words, "--yes"], prog_name="kvedit")
    assert allowed.exit_code == 0 and "to take it back, delete" in allowed.stdout
    assert consent.is_given(consent.of_folder(with_code)) and not (tmp_path / "mark").exists()
    (with_code / "own.py").write_text("", encoding="utf-8")
    other = CliRunner().invoke(cli, [*words, "--yes"], prog_name="kvedit")
    assert other.exit_code == 13
    assert not consent.is_given(consent.of_folder(with_code))
