"""The fingerprint of a model: every file that decides an answer, whole files, nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kvedit.errors import ModelError
from kvedit.trust import fingerprint

DECIDING = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "qwen.tiktoken",
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "modeling_own.py", "quantize_config.json",
)  # fmt: skip
OTHERS = ("README.md", "LICENSE", "pretraining.json", "trainer_state.json", "notes.txt", "x.gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*DECIDING, *OTHERS, "sub/helper.py", "additional_chat_templates/rag.jinja"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    return tmp_path


def test_every_deciding_file_counts_and_no_other(folder: Path) -> None:
    before = fingerprint.of_folder(folder)
    nested = {"sub/helper.py", "additional_chat_templates/rag.jinja"}
    assert set(before.files) == {*DECIDING, *nested}
    for name in OTHERS:
        (folder / name).write_text("other", encoding="utf-8")
    assert fingerprint.of_folder(folder) == before
    for name in before.files:
        (folder / name).write_text("other", encoding="utf-8")
        assert fingerprint.of_folder(folder).digest != before.digest, name
        (folder / name).write_text(name, encoding="utf-8")
    assert fingerprint.of_folder(folder) == before


def test_a_change_in_the_middle_of_a_large_file_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 1000)
    file = folder / "model.safetensors"
    data = bytearray(i % 251 for i in range(10_500))
    file.write_bytes(data)
    before = fingerprint.of_folder(folder)
    blocks = [hashlib.sha256(data[i : i + 1000]).digest() for i in range(0, 10_500, 1000)]
    leaf = f"10500 {hashlib.sha256(b''.join(blocks)).hexdigest()}"
    assert before.files["model.safetensors"] == leaf
    data[5_300] ^= 1
    file.write_bytes(data)
    after = fingerprint.of_folder(folder)
    assert after.digest != before.digest
    error = fingerprint.difference("here", before.files, after.files)
    assert error.message.endswith("model.safetensors has changed") and error.hint


def test_a_difference_names_files_that_came_and_went(folder: Path) -> None:
    before = fingerprint.of_folder(folder)
    (folder / "vocab.txt").unlink()
    (folder / "extra.py").write_text("", encoding="utf-8")
    error = fingerprint.difference("here", before.files, fingerprint.of_folder(folder).files)
    assert "extra.py is new, vocab.txt is missing" in error.message


def test_an_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, start: int) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fingerprint, "_block", refuse)
    with pytest.raises(ModelError, match=r"cannot be read: Permission denied"):
        fingerprint.of_folder(folder)
