"""The status of a store, and its integrity check.

Invariant: nothing here changes the store.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from kvedit.config import FILE_NAME, Config
from kvedit.errors import CorruptStoreError, KveditError
from kvedit.files import (
    TRAINING_CHECKPOINTS,
    sha256_file,
    verify_manifest,
)
from kvedit.store.checks import caches
from kvedit.store.checks.contents import contents
from kvedit.store.checks.values import from_json
from kvedit.store.rows import Finding, Row, require_report
from kvedit.store.store import Store

Query = Callable[[str], list[Row]]
_DESCRIPTION = ("model_name", "model_fingerprint", "dtype", "created_at")
_RESTORE = "Restore it from a backup."
PROTECTED, COMPLETE = "protected_text", "complete"
"""What a store says of its protected texts once its making is finished, or an edit made them."""
MIN_PROBES = 32  # if all of so many pass, the 95% interval of the share begins at 89%


def status(store: Store) -> dict[str, object]:
    """Counts, model, head, sizes in bytes and health, as plain values."""
    query = store.query
    facts = store.facts()
    edits = query("SELECT state, count(*) AS n, max(finished_at) AS last FROM edits GROUP BY state")
    meta = {row["name"]: row["value"] for row in query("SELECT name, value FROM meta")}
    protected = Counter(row["role"] for row in query("SELECT role FROM protected"))
    return {
        "path": str(store.path),
        "head": store.head(),
        "revisions": len(store.revisions()) - 1,
        "gone": dict(Counter(store.gaps().values())),
        **{name: meta.get(name) for name in _DESCRIPTION},
        "facts": dict(Counter(row.state for row in facts)),
        "health": dict(Counter(row.health for row in facts if row.state == "committed")),
        "edits": {row["state"]: row["n"] for row in edits},
        "last_edit_at": max((row["last"] for row in edits if row["last"]), default=None),
        "half_made": is_half_made(store),
        "unfinished_at": _unfinished(store),
        "relative_norm": _largest_norm(query),
        "checkpoints": len(store.checkpoints()),
        "protected": sum(protected.values()),
        "locality_probes": protected["locality"],
        "few_probes": few_probes(protected["locality"]),
        "bytes": {
            "database": _size(store.db_path), "deltas": _size(store.deltas),
            "checkpoints": _size(store.checkpoints_path), "cache": _size(store.cache),
        },
    }  # fmt: skip


def is_half_made(store: Store) -> bool:
    """Whether the making of a store was interrupted, and nothing has gone on with it since."""
    return store.head() == 0 and store.meta(PROTECTED) != COMPLETE


def few_probes(count: int) -> str:
    """What it means that a store has so few locality probes; empty when it has enough."""
    if not count:
        return "no locality probes: this part of the gate checks nothing"
    return f"only {count} locality probes: this part of the gate sees little" * (count < MIN_PROBES)


def _unfinished(store: Store) -> str | None:
    """When the newest training checkpoint was written; None if no training can be resumed."""
    files = _stats(store.cache.glob(TRAINING_CHECKPOINTS))
    written = max((file.st_mtime for file in files), default=None)
    return None if written is None else datetime.fromtimestamp(written, UTC).isoformat()


def _largest_norm(query: Query) -> dict[str, object] | None:
    """Norms of the accumulated deltas at the head, as shares of the base matrices' norms.

    Their number, the median, the largest (``most``) and its matrix; None before the first edit.
    """
    latest = query("SELECT report FROM edits WHERE state = 'committed' ORDER BY id DESC LIMIT 1")
    report = from_json(latest[0]["report"], dict, "the latest edit's report") if latest else {}
    require_report(report, "of the latest edit")
    norms = report.get("relative_norms")
    if not norms:
        return None
    matrix, most = max(norms.items(), key=lambda item: item[1])
    return {
        "matrices": len(norms), "median": median(norms.values()), "most": most, "matrix": matrix,
    }  # fmt: skip


def _size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 if there is none."""
    return sum(file.st_size for file in _stats([path, *path.rglob("*")]))


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """The status of each regular file; one that another process removes meanwhile is left out."""
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield status


def check(store: Store, *, deep: bool = True) -> list[Finding]:
    """Everything that can be checked without the model; one ``ok`` for each part that is sound.

    Without ``deep`` no digest is computed.  A part that cannot be read is a finding, and the others
    are looked at all the same.
    """
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "database": lambda: database(store.query),
        "facts, history and edits": lambda: contents(store.query),
        "revisions and head": lambda: _revisions(store),
        "deltas": lambda: _deltas(store, deep),
        "checkpoints": lambda: _checkpoints(store, deep),
        "cache": lambda: caches.findings(store.cache, deep=deep),
        "settings": lambda: settings(store.path),
        "leftovers": lambda: _leftovers(store),
    }
    return [finding for name, look in parts.items() for finding in part(name, look)]


def part(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of one part; an error that ends the look at it is one of them."""
    problems: list[Finding] = []
    try:
        problems.extend(check())
    except KveditError as error:
        if not any(one.what == error.message for one in problems):
            problems.append(Finding("error", error.message, error.hint))
    return problems or [Finding("ok", f"{name}: sound")]


def database(query: Query) -> Iterator[Finding]:
    """What SQLite itself finds wrong with a database."""
    for row in query("PRAGMA integrity_check"):
        if row["integrity_check"] != "ok":
            yield Finding("error", f"database: {row['integrity_check']}", _RESTORE)
    for row in query("PRAGMA foreign_key_check"):
        what = f"database: a row of {row['table']} names a missing row of {row['parent']}"
        yield Finding("error", what, _RESTORE)


def settings(path: Path) -> Iterator[Finding]:
    """Raises what is wrong with a store's settings."""
    Config.load(path / FILE_NAME)  # raises what is wrong
    yield from ()


def _revisions(store: Store) -> Iterator[Finding]:
    known = {row.id for row in store.revisions()}
    head = store.head()
    if head not in known:
        yield Finding("error", f"the head, revision {head}, does not exist", _RESTORE)
    elif head != max(known):
        yield Finding("error", f"revisions beyond the head, {head}, exist", _RESTORE)
    for revision in sorted(known):
        try:
            store.lineage(revision)
        except CorruptStoreError as error:
            yield Finding("error", error.message, _RESTORE)
            return
    if head in store.gaps():
        yield Finding("error", f"the weights of the head, {head}, can no longer be made", _RESTORE)


def _deltas(store: Store, deep: bool) -> Iterator[Finding]:
    for row in store.revisions():
        if row.delta is None or row.dropped:
            continue
        path = store.delta_path(row.delta)
        if not path.is_file():
            yield Finding("error", f"the delta of revision {row.id} is missing: {path}", _RESTORE)
        elif deep and sha256_file(path) != row.delta:
            yield Finding("error", f"the delta of revision {row.id} was altered: {path}", _RESTORE)


def _checkpoints(store: Store, deep: bool) -> Iterator[Finding]:
    pinned = store.pinned()
    for row in store.checkpoints():
        needed = row.revision in pinned
        level = "error" if needed else "warning"
        hint = _RESTORE if needed else "The deltas replace it; its folder may be deleted."
        if not row.path.is_dir():
            what = f"the checkpoint of revision {row.revision} is missing: {row.path}"
            yield Finding(level, what, hint)
        elif deep:
            try:
                verify_manifest(row.path, row.digest)
            except (KveditError, OSError) as error:
                what = f"the checkpoint of revision {row.revision} is damaged: {error}"
                yield Finding(level, what, hint)


def _leftovers(store: Store) -> Iterator[Finding]:
    hint = "The next command that writes cleans up, unless one is running now."
    for row in store.query("SELECT id, kind FROM edits WHERE state IN ('planned', 'trained')"):
        yield Finding("warning", f"edit {row['id']} ({row['kind']}) was not ended", hint)
    for path in store.stray_files():
        yield Finding("warning", f"a file that nothing needs: {path}", hint)
    if store.needs_scrub:
        yield Finding("warning", "files may still hold text that was erased", hint)
