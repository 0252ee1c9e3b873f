"""Files are whole or absent, locks are real, and input that is no text is refused."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit import files
from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    InvalidFactError,
    KveditError,
    TextTooLongError,
    UsageError,
)
from kvedit.files import (
    clean_temporary,
    put,
    read_text,
    read_verified,
    remove,
    sha256_file,
    temporary_path,
    verify_manifest,
    write_atomic,
    write_manifest,
)

EMPTY_SHA = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_write_atomic_leaves_the_last_bytes_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, versions: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("w")
    for data in versions:
        write_atomic(folder / "f", data)
    assert (folder / "f").read_bytes() == versions[-1]
    assert [path.name for path in folder.iterdir()] == ["f"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskFullError) as caught:
        write_atomic(path, b"new")
    assert str(path) in caught.value.message
    assert "Free some space" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["f"]


def test_another_write_error_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KveditError, match="cannot write") as caught:
        write_atomic(tmp_path / "none" / "f", b"x")
    assert not isinstance(caught.value, DiskFullError)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_call_the_old_file_or_the_new_one_is_there(tmp_path: Path, call: str) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")
    for nth in range(1, 4):
        child = os.fork()
        if child == 0:
            _die_at(call, nth)
            write_atomic(path, b"new")
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_bytes() in (b"old", b"new")
        clean_temporary(tmp_path)
        assert [item.name for item in tmp_path.iterdir()] == ["f"]
    assert path.read_bytes() == b"new"


def _die_at(name: str, nth: int) -> None:
    """Kill this process before the nth call of an os function."""
    real, count = getattr(os, name), 0

    def dying(*args: object) -> object:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(os, name, dying)


def test_put_names_bytes_by_their_digest_and_mends_a_damaged_file(tmp_path: Path) -> None:
    digest = put(tmp_path / "deltas", b"", ".bin")
    path = tmp_path / "deltas" / f"{EMPTY_SHA}.bin"
    assert digest == EMPTY_SHA == sha256_file(path)
    before = path.stat().st_ino
    put(tmp_path / "deltas", b"", ".bin")
    assert path.stat().st_ino == before  # the sound file was kept
    path.write_bytes(b"damage")
    put(tmp_path / "deltas", b"", ".bin")
    assert path.read_bytes() == b""


def test_read_verified_gives_what_was_put_or_an_error(tmp_path: Path) -> None:
    digest = put(tmp_path, b"delta")
    assert read_verified(tmp_path / digest, digest) == b"delta"
    (tmp_path / digest).write_bytes(b"delt4")
    with pytest.raises(CorruptStoreError, match="was altered"):
        read_verified(tmp_path / digest, digest)
    (tmp_path / digest).unlink()
    with pytest.raises(CorruptStoreError, match="cannot read"):
        read_verified(tmp_path / digest, digest)


def test_a_manifest_vouches_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"a")
    digest = write_manifest(tmp_path, {"revision": 3})
    assert verify_manifest(tmp_path, digest)["revision"] == 3
    (tmp_path / "a.bin").write_bytes(b"b")
    with pytest.raises(CorruptStoreError, match=r"a\.bin is missing or was altered"):
        verify_manifest(tmp_path, digest)
    (tmp_path / "a.bin").write_bytes(b"a")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    with pytest.raises(CorruptStoreError, match=r"manifest\.json was altered"):
        verify_manifest(tmp_path, digest)


def test_cleaning_removes_temporary_files_and_folders_only(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.write_bytes(b"")
    temporary_path(keep).write_bytes(b"half")
    folder = temporary_path(tmp_path / "0001")
    folder.mkdir()
    (folder / "x").write_bytes(b"half")
    assert len(clean_temporary(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == [keep]
    assert clean_temporary(tmp_path / "none") == []


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    remove(tmp_path / "none")
    (tmp_path / "d" / "e").mkdir(parents=True)
    remove(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"\xef\xbb\xbf" + "夢中\n".encode())
    assert read_text(path) == "夢中\n"


def test_text_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("爐".encode()), "ascii"))
    assert read_text("-") == "爐"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ab\0c", "zero byte at offset 2"),
        (b"ab\xff", "byte 0xff at offset 2"),
        ("A small lamp.".encode("utf-16-be"), "may be UTF-16 without a mark"),
        ("夢".encode("gb18030"), "is not UTF-8"),
        ("ab".encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(data)
    with pytest.raises(InvalidFactError, match=message) as caught:
        read_text(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        read_text(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read"):
        read_text(tmp_path)


def test_a_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 10)
    path = tmp_path / "t"
    path.write_bytes(b"x" * 11)
    with pytest.raises(TextTooLongError):
        read_text(path)
    path.write_bytes(b"x" * 10)
    assert read_text(path) == "x" * 10
