"""Pruning: deltas that no revision to keep needs are dropped, and a checkpoint stands for them.

Invariants:
- A delta is dropped only when the checkpoint that replaces it is on the disk, was read back, and
  gives the same matrices to the bit.
- Killed at any instant, every revision that is kept can be restored: the marks are one transaction,
  and files go after it.
"""

import torch

from kvedit.adapter.deltas import Snapshot
from kvedit.errors import CorruptStoreError, KveditError
from kvedit.revisions import rebuild
from kvedit.revisions.session import Session
from kvedit.store.forget.plans import PrunePlan


def prune(session: Session, before: int) -> PrunePlan:
    """Drop the deltas that no revision from ``before`` on needs; returns what was done.

    Raises UsageError if there is no such revision, CorruptStoreError where a revision cannot be
    rebuilt: nothing is dropped then.
    """
    store = session.store
    plan = store.prune_plan(before)
    if plan.stands_on is not None:
        session.say(f"writing and reading back the checkpoint of revision {plan.stands_on}")
        _stand_on(session, plan.stands_on)
    if plan.dropped:
        store.mark_pruned(plan.dropped)
    for revision in plan.checkpoints:
        store.remove_checkpoint(revision)
    store.recover()  # removes the files that nothing names now
    return plan


def _stand_on(session: Session, revision: int) -> None:
    """Make sure that a revision has a checkpoint that gives its matrices to the bit."""
    store, master = session.store, session.engine.master
    try:
        rebuild.from_deltas(store, master, revision)
        expected = master.snapshot()
        if _gives(session, revision, expected):
            return
        if revision not in store.pinned():
            store.remove_checkpoint(revision)
        master.restore(expected)
        rebuild.keep_checkpoint(store, master, revision)
        if not _gives(session, revision, expected):
            what = f"the checkpoint of revision {revision} does not give its weights"
            raise CorruptStoreError(what, hint="Nothing was dropped. Run kvedit doctor.")
    finally:
        session.go_to(store.head())


def _gives(session: Session, revision: int, expected: Snapshot) -> bool:
    """Whether a revision has a checkpoint that, read from the disk, gives these matrices."""
    master = session.engine.master
    for row in session.store.checkpoints():
        if row.revision == revision:
            try:
                master.read_checkpoint(row.path, row.digest)
            except KveditError:
                return False
            there = master.snapshot()
            return all(torch.equal(there[name].rows(), expected[name].rows()) for name in expected)
    return False
