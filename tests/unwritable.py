"""Places where a store can be read and not written."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

OVERRIDE_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux
VERSION_3 = 0x20080522


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions of files count for this thread, also if it runs as root."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, kept = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, kept) == 0
    reduced = (ctypes.c_uint32 * 6)(*kept)
    reduced[0] &= ~OVERRIDE_PERMISSIONS  # of the effective ones; the permitted ones stay
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, kept) == 0


@contextmanager
def without_permission(store: Path) -> Iterator[None]:
    """Nothing in a store's folder may be written."""
    paths = [store, *store.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with ordinary_user():
            yield
    finally:
        for path in paths:
            path.chmod(0o755)


@contextmanager
def full_disk(store: Path, at: Path) -> Iterator[Path]:
    """A copy of a store on a disk of its own, a file system in memory without a free byte."""
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", at], check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        copy = Path(shutil.copytree(store, at / "store"))
        with suppress(OSError), (at / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        yield copy
    finally:
        subprocess.run(["umount", "-l", at], check=True)
