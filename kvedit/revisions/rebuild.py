"""Weights from the journal: checkpoints and deltas folded into a revision, and kept curvature.

Invariants:
- Weights that do not give the digest recorded for their revision are never served.
- A checkpoint that is missing or damaged costs time, not knowledge: the deltas are replayed.
- The curvature is a cache: what is on the disk is used only if it is whole, of this revision
  and of the same texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from kvedit.adapter.deltas import Master, from_bytes
from kvedit.adapter.fisher import FisherMoments
from kvedit.errors import CorruptStoreError
from kvedit.files import (
    clean_temporary,
    disk_errors,
    read_verified,
    remove,
    temporary_path,
    write_atomic,
)
from kvedit.store.rows import RevisionRow
from kvedit.store.store import Finding, Store

KEPT_CHECKPOINTS = 3


def load_revision(store: Store, master: Master, revision: int) -> list[str]:
    """Give the master the weights of a revision; returns what was found damaged on the way.

    Raises CorruptStoreError when a delta is missing or altered, or the digest differs.
    """
    line = store.lineage(revision)
    problems: list[str] = []
    start = _from_checkpoint(store, master, line, problems)
    for row in line[start:]:
        add_delta(store, master, row)
    expected = store.revision(revision).weights_digest
    if master.digest() != expected:
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
    kept = {row.revision: row for row in store.checkpoints()}
    for index in range(len(line) - 1, -1, -1):
        checkpoint = kept.get(line[index].id)
        if checkpoint is None:
            continue
        try:
            master.read_checkpoint(checkpoint.path, checkpoint.digest)
            return index + 1
        except CorruptStoreError as error:
            problems.append(f"{error.message}; its deltas are replayed instead")
    master.reset()
    return 0


def add_delta(store: Store, master: Master, row: RevisionRow) -> None:
    """Add one revision's delta, if it has one."""
    if row.delta is not None:
        master.add(from_bytes(read_verified(store.delta_path(row.delta), row.delta)))


def checkpoint_if_due(store: Store, master: Master, every: int) -> None:
    """After a commit: fold the head into a checkpoint when enough deltas have come since."""
    head = store.head()
    line = [row.id for row in store.lineage(head)]
    done = [row.revision for row in store.checkpoints() if row.revision in line]
    since = len(line) - (line.index(max(done)) + 1 if done else 0)
    if since < every:
        return
    final = store.checkpoint_path(head)
    building = temporary_path(final)
    with disk_errors(final):
        digest = master.write_checkpoint(building)
        remove(final)  # left by a writer that ended before it was recorded
        os.replace(building, final)
    store.add_checkpoint(head, final, digest)
    for old in sorted(row.revision for row in store.checkpoints())[:-KEPT_CHECKPOINTS]:
        store.remove_checkpoint(old)


def check_revisions(store: Store, master: Master, say: Callable[[str], None]) -> list[Finding]:
    """Fold every revision from the base and compare its digest with the one recorded."""
    findings: list[Finding] = []
    at: list[int] = []
    master.reset()
    for row in store.revisions():
        line = store.lineage(row.id)
        say(f"replaying revision {row.id}")
        try:
            if [r.id for r in line[:-1]] != at or not line:
                master.reset()
                for earlier in line[:-1]:
                    add_delta(store, master, earlier)
            if line:
                add_delta(store, master, line[-1])
        except CorruptStoreError as error:
            findings.append(Finding("error", f"revision {row.id}: {error.message}", error.hint))
            at = [-1]
            continue
        at = [r.id for r in line]
        if master.digest() != row.weights_digest:
            what = f"revision {row.id}: its weights do not have the digest recorded"
            findings.append(Finding("error", what, "Restore the store from a backup."))
    if not findings:
        count = len(store.revisions())
        findings.append(Finding("ok", f"{count} revisions replayed, every digest as recorded"))
    return findings


def write_fisher(
    store: Store, revision: int, name: str, fisher: FisherMoments, texts: str = ""
) -> None:
    """Keep a curvature measured at a revision beside the store; it may be deleted at any time.

    ``texts`` is a digest of what it was measured on, where the weights alone do not say it.
    """
    path = _fisher_path(store, name)
    weights = store.revision(revision).weights_digest
    if _label_of(path) == (weights, texts):
        return
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        clean_temporary(path.parent)
    label = {"revision": str(revision), "weights": weights, "texts": texts}
    shared: dict[int, str] = {}
    tensors, same = {}, {}
    for part, tensor in fisher.to_tensors().items():
        first = shared.setdefault(tensor.data_ptr(), part)
        if first == part:
            tensors[part] = tensor.contiguous()
        else:
            same[part] = first
    label.update({f"same:{part}": first for part, first in same.items()})
    write_atomic(path, save_tensors(tensors, label))


def _label_of(path: Path) -> tuple[str, str] | None:
    """The digests of the weights and of the texts that a kept curvature was measured on."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            label = stream.metadata() or {}
            return label.get("weights", ""), label.get("texts", "")
    except (OSError, SafetensorError):
        remove(path)
        return None


def read_fisher(store: Store, revision: int, name: str, texts: str = "") -> FisherMoments | None:
    """The kept curvature if it is of this revision's weights, and of these texts; or None."""
    path = _fisher_path(store, name)
    if _label_of(path) != (store.revision(revision).weights_digest, texts):
        return None
    with safe_open(path, framework="pt") as stream:
        tensors = {part: stream.get_tensor(part) for part in stream.keys()}  # noqa: SIM118
        label = stream.metadata()
    for part, first in label.items():
        if part.startswith("same:"):
            tensors[part.removeprefix("same:")] = tensors[first]
    return FisherMoments.from_tensors(tensors)


def _fisher_path(store: Store, name: str) -> Path:
    return store.cache / f"{name}-curvature.safetensors"
