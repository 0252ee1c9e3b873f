"""Files that are either complete or absent, and the lock of a store.

Invariants:
- A file written here appears under its name only after its bytes are on the disk; a crash leaves
  at most a ``.tmp-*`` file, which ``clean_temporary`` removes.
- Bytes read by digest are those that were written, or there is an error.
- The lock belongs to the operating system: it is free as soon as its holder dies.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    InvalidFactError,
    KveditError,
    LockedError,
    TextTooLongError,
    UsageError,
)

TEMPORARY = ".tmp-"
MANIFEST = "manifest.json"
TRAINING_CHECKPOINTS = "training-*.safetensors"  # in the cache, of training that was interrupted
OLD_TRAINING_CHECKPOINTS = "lesson-*.pt"  # as older versions wrote them; never read
MAX_TEXT_BYTES = 16 * 1024 * 1024
_CHUNK = 1024 * 1024
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def now() -> str:
    """The time in UTC, ISO 8601, microseconds included so that it sorts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def temporary_path(path: Path) -> Path:
    """A name in the folder of ``path`` that ``clean_temporary`` recognises."""
    return path.with_name(f"{TEMPORARY}{path.name[:80]}-{secrets.token_hex(6)}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into DiskFullError, any other OSError into a KveditError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise disk_full(path) from error
        raise KveditError(
            f"cannot write {path}: {error.strerror or error}",
            hint="Check that the folder exists and that you may write to it.",
        ) from error


def disk_full(path: Path) -> DiskFullError:
    """The error for a full disk while ``path`` is written."""
    return DiskFullError(
        f"no space left on the disk while writing {path}",
        hint=f"Free some space on the disk of {path.parent} and try again; nothing was changed.",
    )


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, on platforms that can."""
    if os.name == "posix":
        _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, of one piece or of several, so that it is complete or absent, and durable on
    return.

    Raises DiskFullError when there is no space; the previous file is then intact.
    """
    temporary = temporary_path(path)
    with disk_errors(path):
        try:
            with open(temporary, "xb") as stream:
                stream.writelines([data] if isinstance(data, bytes) else data)
                sync_stream(stream)
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def sync_stream(stream: BinaryIO) -> None:
    """Flush a stream down to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def put(directory: Path, data: bytes, suffix: str = "") -> str:
    """Write bytes to a file named by their SHA-256; returns the digest.

    A damaged file of that name is replaced.  Raises what ``write_atomic`` raises.
    """
    digest = hashlib.sha256(data).hexdigest()
    path = directory / f"{digest}{suffix}"
    if not path.is_file() or sha256_file(path) != digest:
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    else:
        sync_directory(directory)  # its first writer may have died between rename and fsync
    return digest


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def read_verified(path: Path, digest: str) -> bytes:
    """Read a file and check its SHA-256; raises CorruptStoreError if it is missing or altered."""
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise CorruptStoreError(message, hint=_RESTORE_HINT) from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        message = f"{path} was altered: its SHA-256 is {actual[:12]}…, recorded was {digest[:12]}…"
        raise CorruptStoreError(message, hint=_RESTORE_HINT)
    return data


_RESTORE_HINT = "Run `kvedit doctor`; restore the file from a backup."


def write_manifest(directory: Path, extra: Mapping[str, object] | None = None) -> str:
    """Write ``manifest.json`` (last: it makes the folder complete) and return its SHA-256.

    It contains ``extra`` and the SHA-256 of every file in the folder; the files are synced first.
    """
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
    for path in paths:
        _sync(path)
    document = {**(extra or {}), "files": {path.name: sha256_file(path) for path in paths}}
    data = json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True).encode()
    write_atomic(directory / MANIFEST, data)
    return hashlib.sha256(data).hexdigest()


def verify_manifest(directory: Path, digest: str) -> dict[str, object]:
    """Return a folder's manifest after checking it and all its files.

    Raises CorruptStoreError, naming the file, if anything is missing or altered.
    """
    document: dict[str, object] = json.loads(read_verified(directory / MANIFEST, digest))
    files = document.get("files")
    if not isinstance(files, dict):
        raise CorruptStoreError(f"{directory / MANIFEST} lists no files", hint=_RESTORE_HINT)
    for name, expected in files.items():
        path = directory / name
        if not path.is_file() or sha256_file(path) != expected:
            raise CorruptStoreError(f"{path} is missing or was altered", hint=_RESTORE_HINT)
    return document


def clean_temporary(directory: Path) -> list[Path]:
    """Remove the temporary files that interrupted writers left in a directory; returns them."""
    if not directory.is_dir():
        return []
    leftovers = sorted(path for path in directory.iterdir() if path.name.startswith(TEMPORARY))
    for path in leftovers:
        remove(path)
    return leftovers


def remove(path: Path) -> None:
    """Remove a file or a folder; a missing one is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_text(source: Path | str, encoding: str | None = None) -> str:
    """Read a text, UTF-8 unless said otherwise, from a file, or from standard input for ``-``.

    A byte order mark is dropped.  Raises UsageError if the file cannot be read, InvalidFactError
    if it is empty, binary or not UTF-8 (naming the byte), TextTooLongError above 16 MiB.
    """
    name = "standard input" if str(source) == "-" else str(source)
    data = _read_bytes(source, name)
    if len(data) > MAX_TEXT_BYTES:
        raise TextTooLongError(
            f"{name} has more than {MAX_TEXT_BYTES // 1024**2} MiB",
            hint="A description is a short text; many facts go in with `kvedit ingest`.",
        )
    text = decode(data, name, encoding)
    if not text.strip():
        raise InvalidFactError(f"{name} is empty", hint="Write the description into it.")
    return text


def _read_bytes(source: Path | str, name: str) -> bytes:
    if str(source) == "-":
        return sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    try:
        with open(source, "rb") as stream:
            return stream.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no file {name}",
            hint="Give the path of a text file, `-` for standard input, or --text.",
        ) from error
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """Decode UTF-8, drop a byte order mark; InvalidFactError names the first bad byte."""
    if encoding is not None:
        try:
            return data.decode(encoding).removeprefix("\ufeff")
        except UnicodeError as error:
            message = f"{name} is not {encoding}: {error}"
            raise InvalidFactError(message, hint="Name another --encoding.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidFactError(
            f"{name} is UTF-16, not UTF-8",
            hint="Name its encoding: --encoding utf-16; or save it as UTF-8.",
        )
    zero = data.find(b"\0")
    if zero >= 0:
        raise InvalidFactError(
            f"{name} is not a text file: zero byte at offset {zero}", hint="Give a plain text file."
        )
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidFactError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="Save it as UTF-8, or name its encoding, for instance --encoding gb18030.",
        ) from error


class StoreLock:
    """The writer's lock of a store, for one process at a time; one object may be entered twice.

    An operating system lock on ``lock`` (never the soft kind, which outlives a killed process).
    ``lock.json`` names its holder, for messages only.  Entering raises LockedError at once if
    another process holds the lock.
    """

    def __init__(self, directory: Path, *, command: str | None = None):
        self._directory = directory
        self._command = command if command is not None else _command_line()
        self._lock = FileLock(directory / "lock", thread_local=False, fallback_to_soft=False)

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock now."""
        return self._lock.is_locked

    def __enter__(self) -> StoreLock:
        first = not self.is_held
        with disk_errors(self._directory / "lock"):
            try:  # inside ``disk_errors``: a Timeout is an OSError too
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise LockedError(
                    f"the store {self._directory} is in use{_holder(self._directory)}",
                    hint="Wait until that command has ended, then try again.",
                ) from error
        if first:
            self._announce()
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock.lock_counter == 1:
            with suppress(OSError):
                (self._directory / "lock.json").unlink(missing_ok=True)
        self._lock.release()

    def _announce(self) -> None:
        """Write who holds the lock; release it if that fails."""
        holder = {"pid": os.getpid(), "command": self._command, "since": now()}
        try:
            write_atomic(self._directory / "lock.json", json.dumps(holder).encode())
        except BaseException:
            self._lock.release()
            raise


def _command_line() -> str:
    """The program and its subcommand; never the arguments, which may contain private text."""
    words = [Path(sys.argv[0] or "python").name, *(w for w in sys.argv[1:] if w.isalpha())]
    return " ".join(words[:2])


def _holder(directory: Path) -> str:
    """Who holds the lock, for a message; empty if that is unknown."""
    try:
        holder = json.loads((directory / "lock.json").read_text(encoding="utf-8"))
        return f" by process {holder['pid']} ({holder['command']}) since {holder['since'][:19]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
