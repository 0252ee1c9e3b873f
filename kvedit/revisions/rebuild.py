"""The weights of a revision, rebuilt from the journal: a checkpoint, and the deltas since then.

Invariants:
- Weights that do not give the digest recorded for their revision are never served.
- A checkpoint that is missing or damaged costs time, not knowledge: all deltas are added instead.
"""

import os
from collections.abc import Callable

from kvedit.adapter.deltas import Master, from_bytes
from kvedit.errors import CorruptStoreError
from kvedit.files import disk_errors, read_verified, remove, sync_directory, temporary_path
from kvedit.store.rows import Finding, RevisionRow
from kvedit.store.store import Store

KEPT_CHECKPOINTS = 3


def load_revision(store: Store, master: Master, revision: int) -> list[str]:
    """Give the master the weights of a revision; returns which checkpoints were damaged.

    Raises CorruptStoreError when a delta is missing or altered, or the digest differs.
    """
    line = store.lineage(revision)
    problems: list[str] = []
    start = _from_checkpoint(store, master, line, problems)
    for row in line[start:]:
        add_delta(store, master, row)
    if master.digest() != store.revision(revision).weights_digest:
        raise CorruptStoreError(
            f"the weights of revision {revision} do not have the digest recorded for it",
            hint="They were made with other versions or on another machine, or the store is"
            " damaged. Run kvedit doctor.",
        )
    return problems


def _from_checkpoint(
    store: Store, master: Master, line: list[RevisionRow], problems: list[str]
) -> int:
    """Load the newest valid checkpoint of a lineage; returns how many deltas it holds."""
    order = [row.id for row in line]
    saved = [row for row in store.checkpoints() if row.revision in order]
    for checkpoint in sorted(saved, key=lambda row: order.index(row.revision), reverse=True):
        try:
            master.read_checkpoint(checkpoint.path, checkpoint.digest)
            return order.index(checkpoint.revision) + 1
        except CorruptStoreError as error:
            problems.append(f"{error.message}; all deltas are added instead")
    master.reset()
    return 0


def add_delta(store: Store, master: Master, row: RevisionRow) -> None:
    """Add one revision's delta, if it has one."""
    if row.delta is not None:
        master.add(from_bytes(read_verified(store.delta_path(row.delta), row.delta)))


def checkpoint_if_due(store: Store, master: Master, every: int) -> None:
    """After a commit: write the head's weights as a checkpoint once enough deltas have come."""
    head = store.head()
    line = [row.id for row in store.lineage(head)]
    saved = [row.revision for row in store.checkpoints() if row.revision in line]
    since = len(line) - (line.index(max(saved)) + 1 if saved else 0)
    if since < every:
        return
    final = store.checkpoint_path(head)
    building = temporary_path(final)
    with disk_errors(final):
        digest = master.write_checkpoint(building)
        remove(final)  # left by a writer that ended before it was recorded
        os.replace(building, final)
        sync_directory(final.parent)  # before the database names it
    store.add_checkpoint(head, final, digest)
    for old in sorted(row.revision for row in store.checkpoints())[:-KEPT_CHECKPOINTS]:
        store.remove_checkpoint(old)


def check_revisions(store: Store, master: Master, say: Callable[[str], None]) -> list[Finding]:
    """Rebuild every revision from the base and compare its digest with the one recorded."""
    findings: list[Finding] = []
    at: list[int] = []  # whose deltas the master has
    master.reset()
    for row in store.revisions():
        line = store.lineage(row.id)
        say(f"rebuilding revision {row.id}")
        missing = line[-1:]
        if [r.id for r in line[:-1]] != at:
            master.reset()
            missing = line
        try:
            for one in missing:
                add_delta(store, master, one)
        except CorruptStoreError as error:
            findings.append(Finding("error", f"revision {row.id}: {error.message}", error.hint))
            at = [-1]
            continue
        at = [r.id for r in line]
        if master.digest() != row.weights_digest:
            what = f"revision {row.id}: its weights do not have the digest recorded"
            findings.append(Finding("error", what, "Restore the store from a backup."))
    count = len(store.revisions())
    return findings or [Finding("ok", f"{count} revisions rebuilt, every digest as recorded")]
