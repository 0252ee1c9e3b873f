"""Files that are either complete or absent.

Invariants:
- A file written here appears under its name only after its bytes are on the disk; a crash leaves
  at most a ``.tmp-*`` file, which ``clean_temporary`` removes.
- Bytes read by digest are those that were written, or there is an error.
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

from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    InvalidFactError,
    KveditError,
    NotWritableError,
    TextTooLongError,
    UsageError,
)
from kvedit.paths import is_stream, open_input, write_stream

TEMPORARY = ".tmp-"
MANIFEST = "manifest.json"
TRAINING_CHECKPOINTS = "training-*.safetensors"  # in the cache, of training that was interrupted
OLD_TRAINING_CHECKPOINTS = "lesson-*.pt"  # as older versions wrote them; never read
MAX_TEXT_BYTES = 16 * 1024 * 1024
_CHUNK = 1024 * 1024
_TRIED_BYTES = 64 * 1024  # more than SQLite needs beside a database
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        kind = NotWritableError if error.errno in _NOT_ALLOWED else KveditError
        raise kind(
            f"cannot write {path}: {error.strerror or error}",
            hint="Check that the folder exists and that you may write to it.",
        ) from error


def disk_full(path: Path) -> DiskFullError:
    """The error for a full disk while ``path`` is written."""
    return DiskFullError(
        f"no space left on the disk while writing {path}",
        hint=f"Free some space on the disk of {path.parent} and try again; what was there before is"
        " intact.",
    )


def require_writable(path: Path) -> None:
    """Try now whether a file can be written that will be written later; it stays as it is.

    Raises what ``write_atomic`` would raise, and UsageError if there is no such folder.
    """
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} is a link that leads to itself", hint="Name a file.") from error
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="Name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", hint="Create it first.")
    if not is_stream(path):
        _try_to_write(path.parent, path)


def require_new_folder(path: Path) -> None:
    """Try now whether a folder can be made that will be made later, its parents with it.

    Raises UsageError if there is something there already, and what ``write_atomic`` would raise.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} is not an empty folder", hint="Name one that is not there yet.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    _try_to_write(parent, path)


def _try_to_write(folder: Path, path: Path) -> None:
    """Write something into a folder, and remove it again; ``path`` is what the error is about."""
    temporary = temporary_path(folder / "kvedit")
    with disk_errors(path):
        try:
            temporary.write_bytes(bytes(_TRIED_BYTES))
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


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

    A pipe or a device is written to, never replaced.  Raises DiskFullError when there is no space;
    the previous file is then intact.
    """
    pieces = [data] if isinstance(data, bytes) else data
    temporary = temporary_path(path)
    with disk_errors(path):
        if is_stream(path):
            return write_stream(path, pieces)
        try:
            with open(temporary, "xb") as stream:
                stream.writelines(pieces)
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
        if path.exists() and not path.is_file():  # a pipe would never end
            raise CorruptStoreError(f"{path} is not a plain file", hint=_RESTORE_HINT)
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
    try:
        document: dict[str, object] = json.loads(read_verified(directory / MANIFEST, digest))
    except (ValueError, RecursionError) as error:
        what = f"{directory / MANIFEST} cannot be read: {error!s:.200}"
        raise CorruptStoreError(what, hint=_RESTORE_HINT) from error
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
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
        with open_input(source) as stream:
            return stream.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no file {name}",
            hint="Check the path, or give `-` for standard input.",
        ) from error
    except OSError as error:
        what = f"cannot read {name}: {error.strerror}"
        raise UsageError(what, hint="Check the disk, and that you may read it.") from error


def _is_wide(data: bytes) -> bool:
    """Whether every second byte of many is zero, as in UTF-16 of Latin letters."""
    zeros = sorted((data[::2].count(0), data[1::2].count(0)))
    return zeros[0] == 0 and zeros[1] > max(4, len(data) // 4)


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
    if zero >= 0 and _is_wide(data):
        raise InvalidFactError(
            f"{name} is not UTF-8; it may be UTF-16 without a mark",
            hint="Name its encoding: --encoding utf-16-le or utf-16-be; or save it as UTF-8.",
        )
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
