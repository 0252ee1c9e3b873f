"""A look at a store that changes nothing, also at one whose database cannot be opened."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvedit.errors import (
    DiskFullError,
    KveditError,
    LockedError,
    NoStoreError,
    StoreTooNewError,
)
from kvedit.files import sha256_file, verify_manifest
from kvedit.store import integrity
from kvedit.store.checks import caches
from kvedit.store.integrity import part, settings
from kvedit.store.rows import Finding
from kvedit.store.store import Store
from kvedit.trust.names import RESTORE


@contextmanager
def looked_at(path: Path) -> Iterator[tuple[Store | None, list[Finding]]]:
    """A store whose database is a copy; None, and what was found, if it cannot be opened.

    Raises NoStoreError, StoreTooNewError, LockedError if it is written all the time, and
    DiskFullError if there is no space for the copy.
    """
    with ExitStack() as stack:
        store, findings = None, []
        try:
            store = stack.enter_context(Store.inspect(path))
        except (NoStoreError, StoreTooNewError, LockedError, DiskFullError):
            raise
        except KveditError as error:
            findings = [Finding("error", error.message, error.hint), *files_alone(path)]
        yield store, findings


def examine_files(path: Path) -> list[Finding]:
    """Everything that can be found wrong with a store's database and files, without the model."""
    with looked_at(path) as (store, findings):
        return findings if store is None else integrity.check(store)


def files_alone(path: Path) -> list[Finding]:
    """What can be said of a store's files where its database cannot be opened."""
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "settings": lambda: settings(path),
        "deltas": lambda: _named_deltas(path / "deltas"),
        "checkpoints": lambda: _loose_checkpoints(path / "checkpoints"),
        "cache": lambda: caches.findings(path / "cache", deep=True),
    }
    return [finding for name, check in parts.items() for finding in part(name, check)]


def _named_deltas(folder: Path) -> Iterator[Finding]:
    """Deltas whose content is not what their name says."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.is_file() and sha256_file(path) != path.stem:
            yield Finding("error", f"the delta {path} was altered", RESTORE)


def _loose_checkpoints(folder: Path) -> Iterator[Finding]:
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            verify_manifest(path.parent, sha256_file(path))
        except (KveditError, OSError) as error:
            what = f"the checkpoint {path.parent} is damaged: {error}"
            yield Finding(
                "warning",
                what,
                "The deltas replace it, unless they were pruned: then restore it from a backup.",
            )
