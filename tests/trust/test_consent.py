"""A model's own code runs only where somebody has consented on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvedit.trust import consent

CODE = "class Model: ...\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVEDIT_CONFIG_DIR", str(tmp_path / "settings"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modeling.py").write_text(CODE, encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_consent_is_for_this_code_and_can_be_taken_back(model: Path, tmp_path: Path) -> None:
    digest = consent.of_folder(model)
    assert not consent.is_given(digest)
    file = consent.give(digest, str(model))
    assert file.is_relative_to(tmp_path / "settings") and consent.is_given(digest)
    (model / "weights.safetensors").write_bytes(b"x")
    assert consent.of_folder(model) == digest  # weights are data
    consent.take_back(digest)
    consent.take_back(digest)
    assert not consent.is_given(digest)


@pytest.mark.parametrize("name", ["modeling.py", "config.json", "tokenizer_config.json", "a/b.py"])
def test_other_code_or_settings_need_another_consent(model: Path, name: str) -> None:
    digest = consent.of_folder(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("other", encoding="utf-8")
    assert consent.of_folder(model) != digest


def test_models_on_a_hub_are_told_apart_by_commit() -> None:
    assert (
        len({consent.of_hub("a/b", "1"), consent.of_hub("a/b", "2"), consent.of_hub("a/c", "1")})
        == 3
    )


def test_where_consent_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVEDIT_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert consent.settings_folder() == tmp_path / "kvedit"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # would depend on where one stands
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("APPDATA", raising=False)
    assert consent.settings_folder() == tmp_path / "home" / ".config" / "kvedit"
