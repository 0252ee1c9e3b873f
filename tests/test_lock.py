"""The lock of a store."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvedit.errors import DiskFullError, LockedError
from kvedit.lock import StoreLock


def test_the_lock_keeps_others_out_and_names_its_holder(tmp_path: Path) -> None:
    with StoreLock(tmp_path, command="kvedit add"):
        with pytest.raises(LockedError) as caught, StoreLock(tmp_path):
            pass
        assert f"process {os.getpid()} (kvedit add)" in caught.value.message
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()
    with StoreLock(tmp_path) as lock:
        assert lock.is_held


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["/bin/kvedit", "--store", "poems", "ingest", "facts.jsonl"], "kvedit ingest"),
        (["/lib/kvedit/__main__.py", "-q", "add", "Porto", "--text", "secret"], "kvedit add"),
        ([""], "python"),
    ],
)
def test_a_holder_is_named_by_program_and_command(
    argv: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    with StoreLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["command"] == named


def test_the_same_lock_may_be_entered_again_and_is_held_to_the_end(tmp_path: Path) -> None:
    lock = StoreLock(tmp_path)
    with lock:
        with lock:
            pass
        assert lock.is_held
        assert (tmp_path / "lock.json").exists()
    assert not lock.is_held


def test_a_damaged_note_of_the_holder_does_not_hide_the_lock(tmp_path: Path) -> None:
    with StoreLock(tmp_path):
        (tmp_path / "lock.json").write_text("[")
        with pytest.raises(LockedError, match=r"is in use\n"), StoreLock(tmp_path):
            pass


def test_the_lock_is_free_the_moment_its_holder_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kvedit.lock import StoreLock\n"
        "with StoreLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(LockedError), StoreLock(tmp_path):
            pass
    finally:
        child.kill()
        child.communicate()
    started = time.monotonic()
    with StoreLock(tmp_path) as lock:
        assert lock.is_held
    assert time.monotonic() - started < 5


def test_a_lock_whose_note_cannot_be_written_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DiskFullError), StoreLock(tmp_path):
            pass
    with StoreLock(tmp_path) as lock:
        assert lock.is_held
