"""Files whose digest was computed before: known as long as their sizes and times of change stay.

Invariant: the list is in the store's cache and may be deleted; files are then read in full again.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvedit.errors import KveditError
from kvedit.files import disk_errors, write_atomic
from kvedit.store.store import Store

Stamps = dict[str, list[int]]  # of each file, by its path: size in bytes, time of change in ns


def stamps(files: Iterable[Path]) -> Stamps:
    """What tells whether files were changed; to be taken before they are read."""
    status = [(path.resolve(), path.stat()) for path in files if path.is_file()]
    return {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in status}


def are_known(store: Store, digest: str, files: Stamps) -> bool:
    """Whether exactly these files had this digest when it was computed last."""
    return bool(files) and _read(store).get(digest) == files


def remember(store: Store, digest: str, files: Stamps) -> None:
    """Keep that these files have this digest; at most a later start is slower if that fails."""
    if store.readonly:
        return
    kept = {
        one: old for one, old in _read(store).items() if all(Path(path).exists() for path in old)
    }
    with suppress(KveditError), disk_errors(store.cache):
        store.cache.mkdir(exist_ok=True)
        write_atomic(_path(store), json.dumps(kept | {digest: files}).encode())


def _read(store: Store) -> dict[str, Stamps]:
    try:
        known: dict[str, Stamps] = json.loads(_path(store).read_bytes())
        return {digest: files for digest, files in known.items() if isinstance(files, dict)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _path(store: Store) -> Path:
    return store.cache / "known-files.json"
