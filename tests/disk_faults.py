"""Makes the n-th call to the disk or to SQLite fail, and counts the calls."""

from __future__ import annotations

import builtins
import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

OS_CALLS = ("fsync", "replace", "unlink", "mkdir", "rmdir")
WRITES = ("BEGIN", "COMMIT", "INSERT", "UPDATE", "DELETE", "CREATE", "VACUUM")
SQLITE_CODES = {
    errno.EIO: sqlite3.SQLITE_IOERR,
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EPERM: sqlite3.SQLITE_PERM,
}


class Fault:
    """Counts calls; call number ``at`` (from 1) fails with ``code``, 0 never; with ``lasting`` all
    calls after it do too, until ``armed`` is set to False.
    """

    def __init__(self, at: int = 0, code: int = errno.EIO, *, lasting: bool = False) -> None:
        self.at, self.code, self.lasting = at, code, lasting
        self.labels: list[str] = []
        self.armed = True

    def reach(self, label: str) -> bool:
        """Count one call; whether it has to fail."""
        if not self.armed:
            return False
        self.labels.append(label)
        number = len(self.labels)
        return number == self.at or (self.lasting and 0 < self.at < number)

    def os_error(self) -> OSError:
        """What the operating system would raise."""
        return OSError(self.code, os.strerror(self.code))

    def mapping_error(self, path: Path, *, torch: bool) -> Exception:
        """What safetensors raises when it cannot map a file, or ``torch`` does for it (these were
        seen with an mmap that fails: safetensors 0.8, torch 2.13).
        """
        why = os.strerror(self.code)
        if torch:
            return RuntimeError(f"unable to mmap 96 bytes from file <{path}>: {why} ({self.code})")
        kind = {errno.ENOMEM: MemoryError, errno.EPERM: PermissionError}.get(self.code, OSError)
        return kind(f"{why} (os error {self.code})")

    def sqlite_error(self) -> sqlite3.Error:
        """What SQLite would raise."""
        error = sqlite3.OperationalError(os.strerror(self.code))
        error.sqlite_errorcode = SQLITE_CODES[self.code]
        return error


@contextmanager
def disk(fault: Fault, root: Path) -> Iterator[None]:
    """Every fsync, rename, unlink, mkdir and write below a folder is a call that may fail."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OS_CALLS:
            patch.setattr(os, name, _failing(fault, name, getattr(os, name)))
        real = builtins.open

        def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            stream = real(path, mode, *rest, **options)
            inside = isinstance(path, str | os.PathLike) and root in Path(path).parents
            if inside and set(mode) & set("wxa+"):
                return _Stream(stream, fault)
            return stream

        patch.setattr(builtins, "open", opened)
        yield


def _failing(fault: Fault, name: str, real: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        if fault.reach(name):
            raise fault.os_error()
        return real(*args, **options)

    return call


class _Stream:
    """A file whose writes may fail, half of the bytes written."""

    def __init__(self, stream: Any, fault: Fault) -> None:
        self._stream, self._fault = stream, fault

    def write(self, data: Any) -> Any:
        if self._fault.reach("write"):
            self._stream.write(data[: len(data) // 2])
            raise self._fault.os_error()
        return self._stream.write(data)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def sqlite(fault: Fault) -> Iterator[None]:
    """Every statement of connections that are opened inside is a call that may fail; with another
    error than EIO, every one that writes.
    """

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            # Only a read that gets no answer from the disk can fail; a full disk stops writes.
            words = sql.split()
            counts = words[0] in WRITES or fault.code == errno.EIO
            counts = counts and words[0] != "ROLLBACK"  # needs no disk, and ends by itself
            if counts and fault.reach(" ".join(words[:3])):
                raise fault.sqlite_error()
            return super().execute(sql, *rest)

    real = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sqlite3, "connect", lambda *args, **options: real(*args, factory=Connection, **options)
        )
        yield


@contextmanager
def mapped(fault: Fault) -> Iterator[None]:
    """Every mmap of a safetensors file is a call that may fail: two for each, one by safetensors
    for the header and one by torch for the tensors.
    """
    from transformers import modeling_utils

    from kvedit.adapter import deltas
    from kvedit.revisions import fisher_cache
    from kvedit.training import resume

    def opened(path: Any, *rest: Any, **options: Any) -> Any:
        Path(path).stat()  # a file that is not there is not mapped
        for torch in (False, True):
            if fault.reach(f"mmap {Path(path).name}{', tensors' * torch}"):
                raise fault.mapping_error(path, torch=torch)
        return safe_open(path, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_utils, deltas, fisher_cache, resume):
            patch.setattr(module, "safe_open", opened)
        yield
