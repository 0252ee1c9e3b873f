"""The names that a store's database may have for files and models: one form each.

Whatever a database from elsewhere says, no path is touched before its name has this form, so no row
leads out of the store's folder.
"""

import re
from pathlib import Path

from kvedit.errors import CorruptStoreError, UsageError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_REVISION = re.compile(r"0|[1-9][0-9]{0,17}")
_HUB_REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]{0,200}", re.ASCII)
_HUB = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_PLAIN_FOLDERS = ("deltas", "checkpoints", "cache", "exports", "phrasings")
_PLAIN_FILES = ("kvedit.db", "kvedit.db-wal", "kvedit.db-shm", "lock", "lock.json")
RESTORE = "Run `kvedit doctor`; restore the store from a backup."


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in hex, the name of a delta."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def delta(value: object) -> str:
    """A delta's name as the database has it; raises CorruptStoreError for any other form."""
    if not is_digest(value):
        raise CorruptStoreError(f"{value!r:.80} is no name of a delta", hint=RESTORE)
    return str(value)


def checkpoint(revision: int, value: object) -> str:
    """A checkpoint's folder, relative to the store; raises CorruptStoreError for any other form."""
    expected = f"checkpoints/{revision:08d}"
    if value != expected:
        what = f"the checkpoint of revision {revision} is named {value!r:.80}, not {expected}"
        raise CorruptStoreError(what, hint=RESTORE)
    return expected


def revision(value: object, where: str) -> int:
    """A revision's number that is kept as text; raises CorruptStoreError for anything else."""
    if not isinstance(value, str) or not _REVISION.fullmatch(value):
        raise CorruptStoreError(f"{where}: {value!r:.80} is no number", hint=RESTORE)
    return int(value)


def count(value: str, what: str) -> int:
    """A number that a store keeps as text; raises CorruptStoreError for anything else."""
    return revision(value, what)


def hub_revision(value: str | None) -> str | None:
    """A branch, tag or commit on a hub; raises CorruptStoreError for anything else."""
    if value and (not _HUB_REVISION.fullmatch(value) or ".." in value):
        raise CorruptStoreError(f"{value!r:.80} is no revision of a model", hint=RESTORE)
    return value or None


def model(value: str | None, store: Path) -> str:
    """Where a store's base model is: an absolute folder, or a name on a hub.

    Raises CorruptStoreError for anything else, UsageError where a name on a hub is also a folder
    here: it would be loaded in its place.
    """
    text = value or ""
    hint = "Say where the model is: `kvedit doctor --fix --model DIR`."
    plain = "\0" not in text and ".." not in Path(text).parts and len(text) < 4096
    if not plain or not (Path(text).is_absolute() or _HUB.fullmatch(text)):
        what = f"{store} says that its model is at {text!r:.200}: neither an absolute path nor a"
        raise CorruptStoreError(f"{what} name on a hub", hint=hint)
    if not Path(text).is_absolute() and Path(text).exists():
        what = f"{store} was made for the model {text} on a hub, but there is a folder of that name"
        raise UsageError(f"{what} here", hint=f"Go to another folder. {hint}")
    return text


def refuse_links(store: Path) -> None:
    """Raise CorruptStoreError where a part of a store is a link, or a device, a pipe, a socket.

    A link could lead kvedit to write, pack or remove files elsewhere.
    """
    hint = "Put a real file or folder there; the whole store may be a link."
    for name in _PLAIN_FOLDERS:
        path = store / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CorruptStoreError(f"{path} is not a plain folder", hint=hint)
    phrasings = list((store / "phrasings").glob("*")) if (store / "phrasings").is_dir() else []
    for path in (*(store / name for name in _PLAIN_FILES), store / "kvedit.toml", *phrasings):
        linked = path.is_symlink() and path.name in _PLAIN_FILES
        if linked or (path.exists() and not (path.is_file() or path.is_dir())):
            raise CorruptStoreError(f"{path} is not a plain file", hint=hint)
