"""What a store may name: one form each, everything else is refused before any path is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvedit.errors import CorruptStoreError, UsageError
from kvedit.trust import names

OUTSIDE = ("../x", "/etc", "..", "", "a\0b", "x" * 100_000, 7, -1, None, b"\xff", "checkpoints/1")


@pytest.mark.parametrize("value", [*OUTSIDE, "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_a_delta_is_a_digest(value: object) -> None:
    with pytest.raises(CorruptStoreError, match="no name of a delta"):
        names.delta(value)
    assert names.delta("a" * 64) == "a" * 64


@pytest.mark.parametrize("value", [*OUTSIDE, "checkpoints/00000003/", "checkpoints/00000004"])
def test_a_checkpoint_is_named_by_its_revision(value: object) -> None:
    with pytest.raises(CorruptStoreError, match="not checkpoints/00000003"):
        names.checkpoint(3, value)
    assert names.checkpoint(3, "checkpoints/00000003") == "checkpoints/00000003"


@pytest.mark.parametrize("value", ["-1", "01", "1.0", "٣", "9" * 5000, "", " 1", 3, None])
def test_a_revision_is_a_plain_number(value: object) -> None:
    with pytest.raises(CorruptStoreError, match="no number"):
        names.revision(value, "head")
    assert names.revision("0", "head") == 0 and names.revision("12", "head") == 12


@pytest.mark.parametrize("value", ["./m", "../m", "a/b/c", "", "/a/../b", "a\0b", "~/m", None])
def test_a_model_is_an_absolute_folder_or_a_name_on_a_hub(value: str | None) -> None:
    with pytest.raises(CorruptStoreError, match=r"neither an absolute path") as raised:
        names.model(value, Path("store"))
    assert "doctor --fix --model" in raised.value.hint


def test_a_folder_is_not_taken_for_a_name_on_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names.model("org/model-1.5_x", Path("s")) == "org/model-1.5_x"
    assert names.model(str(tmp_path), Path("s")) == str(tmp_path)
    (tmp_path / "org" / "model-1.5_x").mkdir(parents=True)
    with pytest.raises(UsageError, match="a folder of that name"):
        names.model("org/model-1.5_x", Path("s"))


@pytest.mark.parametrize("name", ["deltas", "checkpoints", "cache", "exports", "phrasings"])
def test_a_linked_folder_is_refused(tmp_path: Path, name: str) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    store.mkdir()
    elsewhere.mkdir()
    names.refuse_links(store)
    (store / name).symlink_to(elsewhere)
    with pytest.raises(CorruptStoreError, match=f"{name} is not a plain folder"):
        names.refuse_links(store)


@pytest.mark.parametrize("name", ["lock", "lock.json", "kvedit.db", "kvedit.db-wal"])
def test_a_linked_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptStoreError, match="not a plain file"):
        names.refuse_links(tmp_path)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kvedit.toml")
    with pytest.raises(CorruptStoreError, match="not a plain file"):
        names.refuse_links(tmp_path)
