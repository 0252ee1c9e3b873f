"""The weights of a revision, rebuilt from the journal: a checkpoint, and the deltas since then.

Invariants:
- Weights that do not give the digest recorded for their revision are never served.
- A checkpoint that is missing or damaged costs time, not knowledge: all deltas are added instead.
- Files that were verified before and did not change since are not hashed again, but by ``doctor``.
"""

import os
from collections.abc import Callable
from pathlib import Path

from kvedit.adapter.deltas import MASTER_FILE, Master, from_bytes
from kvedit.errors import CorruptStoreError, KveditError
from kvedit.files import (
    MANIFEST,
    disk_errors,
    read_verified,
    remove,
    sync_directory,
    temporary_path,
)
from kvedit.store.checks import known_files
from kvedit.store.checks.known_files import Stamps
from kvedit.store.lineage import WHY_GONE, in_ranges
from kvedit.store.rows import Finding, RevisionRow
from kvedit.store.store import Store

KEPT_CHECKPOINTS = 3


def load_revision(store: Store, master: Master, revision: int) -> list[str]:
    """Give the master the weights of a revision; returns which checkpoints were damaged.

    Raises CorruptStoreError when a delta is missing or altered, or the digest differs, UsageError
    when what they are made of was erased or pruned.
    """
    store.require_kept(revision)
    line = store.lineage(revision)
    problems: list[str] = []
    start, known, verified = _from_checkpoint(store, master, line, problems)
    for row in line[start:]:
        add_delta(store, master, row)
    if known and start == len(line):
        return problems
    if master.digest() != store.revision(revision).weights_digest:
        raise CorruptStoreError(
            f"the weights of revision {revision} do not have the digest recorded for it",
            hint="They were made with other versions or on another machine, or the store is"
            " damaged. Run kvedit doctor.",
        )
    if verified is not None:
        known_files.remember(store, *verified)
    return problems


def _from_checkpoint(
    store: Store, master: Master, line: list[RevisionRow], problems: list[str]
) -> tuple[int, bool, tuple[str, Stamps] | None]:
    """Load the newest valid checkpoint of a lineage.

    Returns how many deltas it holds, whether it was known, and, if not, its digest and files.
    """
    order = [row.id for row in line]
    saved = [row for row in store.checkpoints() if row.revision in order]
    for checkpoint in sorted(saved, key=lambda row: order.index(row.revision), reverse=True):
        files = _stamps(checkpoint.path)
        known = known_files.are_known(store, checkpoint.digest, files)
        try:
            master.read_checkpoint(checkpoint.path, checkpoint.digest, trusted=known)
        except KveditError as error:
            sound = not isinstance(error, CorruptStoreError)
            if sound and any(row.dropped for row in line):  # nothing else gives these weights
                raise
            problems.append(f"{error.message}; all deltas are added instead")
            continue
        verified = None if known else (checkpoint.digest, files)
        return order.index(checkpoint.revision) + 1, known, verified
    master.reset()
    return 0, False, None


def _stamps(folder: Path) -> Stamps:
    return known_files.stamps([folder / MANIFEST, folder / MASTER_FILE])


def add_delta(store: Store, master: Master, row: RevisionRow) -> None:
    """Add one revision's delta, if it has one."""
    if row.dropped:
        raise CorruptStoreError(
            f"the checkpoint that stands for the deltas up to revision {row.id} is damaged, and"
            f" they were {row.dropped}",
            hint="Run kvedit doctor; restore the store from a backup.",
        )
    if row.delta is not None:
        master.add(from_bytes(read_verified(store.delta_path(row.delta), row.delta)))


def checkpoint_if_due(store: Store, master: Master, every: int) -> None:
    """After a commit: write the head's weights as a checkpoint once enough deltas have come."""
    line = [row.id for row in store.lineage(store.head())]
    saved = [row.revision for row in store.checkpoints() if row.revision in line]
    since = len(line) - (line.index(max(saved)) + 1 if saved else 0)
    if since >= every:
        write_checkpoint(store, master)


def write_checkpoint(store: Store, master: Master) -> None:
    """Write the master's weights, those of the head, as a checkpoint; remove old ones."""
    keep_checkpoint(store, master, store.head())
    kept = sorted({row.revision for row in store.checkpoints()} - store.pinned())
    for old in kept[:-KEPT_CHECKPOINTS]:
        store.remove_checkpoint(old)


def keep_checkpoint(store: Store, master: Master, revision: int) -> None:
    """Write the master's weights, those of a revision, as a checkpoint."""
    final = store.checkpoint_path(revision)
    building = temporary_path(final)
    with disk_errors(final):
        try:
            digest = master.write_checkpoint(building)
            remove(final)  # left by a writer that ended before it was recorded
            os.replace(building, final)
        finally:
            remove(building)  # where the disk is full it takes the last space
        sync_directory(final.parent)  # before the database names it
    store.add_checkpoint(revision, final, digest)
    known_files.remember(store, digest, _stamps(final))


def check_revisions(store: Store, master: Master, say: Callable[[str], None]) -> list[Finding]:
    """Rebuild every revision and compare its digest with the one recorded.

    They are built from the base, or from the checkpoint that replaces deltas that were pruned.
    """
    findings: list[Finding] = []
    at: list[int] = []  # whose deltas the master has
    gaps = store.gaps()
    master.reset()
    for row in store.revisions():
        if row.id in gaps:
            continue
        say(f"rebuilding revision {row.id}")
        try:
            line = store.lineage(row.id)
        except CorruptStoreError as error:
            findings.append(Finding("error", f"revision {row.id}: {error.message}", error.hint))
            continue
        missing = line[-1:]
        try:
            if [r.id for r in line[:-1]] != at or any(one.dropped for one in missing):
                missing = _from_start(store, master, line)
            for one in missing:
                add_delta(store, master, one)
        except KveditError as error:
            findings.append(Finding("error", f"revision {row.id}: {error.message}", error.hint))
            at = [-1]
            continue
        at = [r.id for r in line]
        if master.digest() != row.weights_digest:
            what = f"revision {row.id}: its weights do not have the digest recorded"
            findings.append(Finding("error", what, "Restore the store from a backup."))
    count = len(store.revisions()) - len(gaps)
    if not findings:
        findings = [Finding("ok", f"{count} revisions rebuilt, every digest as recorded")]
    for why in sorted({*gaps.values()}):
        gone = in_ranges([number for number in gaps if gaps[number] == why])
        what = f"revisions {gone} can no longer be restored: {WHY_GONE[why]}"
        findings.append(Finding("ok", what))
    return findings


def from_deltas(store: Store, master: Master, revision: int) -> None:
    """Give the master the weights of a revision by its deltas, also where a checkpoint has them.

    Raises CorruptStoreError.
    """
    for row in _from_start(store, master, store.lineage(revision)):
        add_delta(store, master, row)
    if master.digest() != store.revision(revision).weights_digest:
        what = f"the weights of revision {revision} do not have the digest recorded for it"
        raise CorruptStoreError(what, hint="Run kvedit doctor.")


def _from_start(store: Store, master: Master, line: list[RevisionRow]) -> list[RevisionRow]:
    """Give the master the base, or the first checkpoint after all deltas that were dropped; returns
    the revisions whose deltas are still to be added.
    """
    dropped = [place for place, row in enumerate(line) if row.dropped]
    saved = {row.revision: row for row in store.checkpoints()}
    for place in range(dropped[-1], len(line)) if dropped else ():
        if (checkpoint := saved.get(line[place].id)) is not None:
            master.read_checkpoint(checkpoint.path, checkpoint.digest)
            return line[place + 1 :]
    master.reset()
    return line
